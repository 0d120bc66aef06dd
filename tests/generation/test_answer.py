"""`answer`: one response per prompt and sample, checked before the model is read, written whole."""

import dataclasses
import json

import pytest
import torch

from vrpo.generation.answer import GenerateArguments, answer


@pytest.fixture
def model_path(tiny_model, tokenizer, tmp_path):
    path = tmp_path / "model"
    tiny_model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


def arguments(model_path, **more):
    settings = {"max_new_tokens": 8, "device": "cpu", "prompt": "What is 1 plus 2?"} | more
    return GenerateArguments(model_name_or_path=model_path, **settings)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_return_sequences": 0}, "num_return_sequences must be at least 1, got 0"),
        ({"num_return_sequences": 2}, "raise temperature"),
        ({"num_return_sequences": 2, "remasking": "random", "steps": 1}, "raise temperature"),
        ({"max_tokens_per_pack": 0}, "max_tokens_per_pack must be at least 1"),
        ({"seed": -1}, "seed must be in"),
        ({"seed": 2**64}, "seed must be in"),
        ({"mask_token_id": -1}, "mask_token_id must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be 0 or more and finite"),
        ({"cfg_scale": float("inf")}, "cfg_scale must be 0 or more and finite"),
        ({"steps": 9}, "steps must be between"),
        ({"prompt": "\udcff"}, "prompt: "),
        ({"prompt": " "}, "prompt is empty"),
    ],
)
def test_answer__wrong_settings_are_told_before_the_model_is_read(model_path, monkeypatch, fields, message):
    monkeypatch.setattr("vrpo.generation.answer.load_policy", None)
    with pytest.raises(ValueError, match=message):
        answer(arguments(model_path, **fields))


def test_answer__too_long_a_prompt_names_the_row(model_path, tmp_path):
    rows = [{"prompt": "1"}, {"prompt": "What is 1 plus 2? " * 30}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = tmp_path / "out.jsonl"
    files = {"prompt": None, "dataset_name": str(tmp_path / "a.jsonl"), "output_file": str(output)}
    with pytest.raises(ValueError, match=r"the prompt of row 1 has \d+ tokens .* positions for 64"):
        answer(arguments(model_path, **files))
    assert not output.exists()


def test_answer__a_broken_model_writes_nothing(tiny_model, tokenizer, tmp_path, model_path):
    with torch.no_grad():
        tiny_model.lm_head.weight.fill_(3e38)  # finite, so that it loads; its products are not
    tiny_model.save_pretrained(model_path)
    output = tmp_path / "out.jsonl"
    with pytest.raises(FloatingPointError, match="logits at position 0 of the response to prompt 0"):
        answer(arguments(model_path, output_file=str(output)))
    assert not output.exists()


def test_answer__samples_of_a_prompt_differ_and_can_be_repeated(model_path):
    args = arguments(model_path, num_return_sequences=6, temperature=1.0)
    first = answer(args)
    assert first == answer(args)
    assert [item["sample"] for item in first] == list(range(6))
    assert len({item["response"] for item in first}) == 6
    assert first != answer(dataclasses.replace(args, seed=1))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("suppressed", [False, True])
def test_answer__eos_settings_reach_the_sampler(model_path, tokenizer, monkeypatch, deferred, suppressed):
    seen = []

    def settings_only(model, prompts, sampler, **options):
        seen.append(sampler)
        return torch.zeros(len(prompts), sampler.max_new_tokens, dtype=torch.int64)

    monkeypatch.setattr("vrpo.generation.answer.generate", settings_only)
    answer(arguments(model_path, logits_eos_inf=suppressed, confidence_eos_eot_inf=deferred))
    (sampler,) = seen
    eos, eot = tokenizer.eos_token_id, tokenizer.get_vocab()["<|eot_id|>"]
    assert sampler.suppress_ids == ((eos,) if suppressed else ())
    assert sampler.defer_ids == ((eot, eos) if deferred else ())
    assert sampler.stop_ids == (eot, eos)
