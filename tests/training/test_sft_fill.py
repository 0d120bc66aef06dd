"""SFT with EOS fill: exact loss and gradient, a fill of (seed, epoch, example) alone, and what is refused."""

import copy
import shutil
from itertools import pairwise

import pytest
import torch
from datasets import Dataset
from naive import naive_elbo
from plain_llada import PlainLLaDA
from test_trainer import config, logged, parameters
from transformers import PreTrainedTokenizerFast

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.estimator import masking
from vrpo.estimator.eos_fill import EosFill
from vrpo.training import sft_trainer

ROWS = [{"prompt": f"What is {n}?", "completion": " one" * (1 + n % 5)} for n in range(12)]


def trainer_of(tmp_path, model, tokenizer, rows=ROWS, eval_dataset=None, **fields) -> DiffusionSFTTrainer:
    return DiffusionSFTTrainer(
        model,
        args=config(tmp_path, DiffusionSFTConfig, **fields),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
    )


def fills_seen(monkeypatch) -> dict[tuple[int, int], int]:
    """(epoch, example) -> fill, of every example that goes through a step from now on."""
    seen: dict[tuple[int, int], int] = {}
    original = DiffusionSFTTrainer._parts

    def spy(self, model, batch, pack, epoch):
        if batch.fill_R is not None:
            keys = [(epoch, example) for example in batch.example_R.tolist()]
            assert not set(keys) & set(seen)
            seen.update(zip(keys, batch.fill_R.tolist(), strict=True))
        return original(self, model, batch, pack, epoch)

    monkeypatch.setattr(DiffusionSFTTrainer, "_parts", spy)
    return seen


def test_sft__gradient_is_that_of_the_filled_responses(tmp_path, tiny_model, tokenizer):
    model = tiny_model.double()
    trainer = trainer_of(tmp_path, model, tokenizer, ROWS[:4], learning_rate=0.0, max_grad_norm=0.0)
    batch = trainer._responses(next(iter(trainer.get_train_dataloader())), model.train())
    assert batch.fill_R.sum() > 0
    ((_, step),) = trainer._steps(model, trainer._micro_batches(batch))
    loss_B = step.losses()
    loss_B.mean().backward()
    metrics = trainer._metrics(batch, step.result)
    plain = PlainLLaDA.like(model)

    drawn = masking.draw(batch, design="paper", num_samples=2, seed=trainer.args.seed, epoch=0)
    bounds = drawn.offsets_S1.tolist()
    segments = [(drawn.position_N[a:b].tolist(), drawn.weight_N[a:b].tolist()) for a, b in pairwise(bounds)]
    prepared = {row["example_id"]: row for row in trainer.train_dataset}
    losses = []
    for index, (example, fill) in enumerate(
        zip(batch.example_R.tolist(), batch.fill_R.tolist(), strict=True)
    ):
        row = prepared[example]
        response = row["completion_ids"] + [tokenizer.eos_token_id] * fill
        samples = segments[2 * index : 2 * index + 2]
        elbo = naive_elbo(plain, row["prompt_ids"], response, samples, tokenizer.mask_token_id)
        losses.append(-elbo / len(response))
        assert metrics["logps/completion"][index].item() == pytest.approx(elbo.item(), rel=1e-6)
    torch.stack(losses).mean().backward()
    torch.testing.assert_close(loss_B, torch.stack(losses).to(loss_B), rtol=1e-6, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain.gradient_of(name), rtol=1e-6, atol=1e-9, msg=name)


def test_sft__batches_accumulation_and_token_budget_do_not_appear_in_the_fill(
    tmp_path, tiny_model, tokenizer, monkeypatch
):
    spread = [(1, 8, 65536), (8, 1, 65536), (2, 4, 65536), (8, 1, 150)]
    ends = []
    for number, (batch, accumulate, budget) in enumerate(spread):
        seen = fills_seen(monkeypatch)
        trainer = trainer_of(
            tmp_path / str(number),
            copy.deepcopy(tiny_model).double(),
            tokenizer,
            num_train_epochs=2,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulate,
            max_tokens_per_pack=budget,
        )
        trainer.train()
        monkeypatch.undo()
        ends.append((seen, parameters(trainer.model)))
    seen, end = ends[0]
    assert set(seen) == {(epoch, example) for epoch in range(2) for example in range(12)}
    assert [seen[0, i] for i in range(12)] != [seen[1, i] for i in range(12)]
    for other_seen, other_end in ends[1:]:
        assert other_seen == seen
        torch.testing.assert_close(other_end, end, rtol=1e-9, atol=1e-12)


def test_sft__resume_equals_the_straight_run_bitwise(tmp_path, tiny_model, tokenizer):
    def run(name, **kwargs):
        trainer = trainer_of(
            tmp_path / name,
            copy.deepcopy(tiny_model),
            tokenizer,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=4,
        )
        trainer.train(**kwargs)
        return trainer

    straight = run("straight")
    shutil.copytree(tmp_path / "straight/out/checkpoint-4", tmp_path / "saved/checkpoint-4")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "saved/checkpoint-4"))
    assert torch.equal(parameters(straight.model), parameters(resumed.model))
    assert logged(straight, "sft/eos_fill") == logged(resumed, "sft/eos_fill")


def test_sft__evaluation_is_without_fill(tmp_path, tiny_model, tokenizer):
    rows = Dataset.from_list(ROWS)
    results = []
    for number, max_eos_fill in enumerate((None, 0)):
        trainer = trainer_of(
            tmp_path / str(number),
            copy.deepcopy(tiny_model),
            tokenizer,
            eval_dataset={"a": rows, "b": rows},
            max_eos_fill=max_eos_fill,
        )
        results.append(
            {k: v for k, v in trainer.evaluate().items() if "per_second" not in k and "time" not in k}
        )
    filled, bare = results
    assert filled == bare
    assert not any("eos_fill" in key for key in filled)


def test_sft__automatic_fill_is_four_times_the_longest_response(tmp_path, tiny_model, tokenizer):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer)
    longest = max(len(row["completion_ids"]) for row in trainer.train_dataset)
    assert trainer.eos_fill.max_fill == 4 * longest
    assert trainer.eos_fill.max_length == 64  # the model's positions, below max_length
    assert trainer.eos_fill.eos_token_id == tokenizer.eos_token_id


def test_sft__zero_switches_the_fill_off(tmp_path, tiny_model, tokenizer, monkeypatch):
    seen = fills_seen(monkeypatch)
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, max_eos_fill=0)
    trainer.train()
    assert trainer.eos_fill is None and not seen
    assert not logged(trainer, "sft/eos_fill")


def test_sft__fills_with_eos_where_padding_is_another_token(tmp_path, tiny_model, tokenizer):
    """Dream's kind of tokenizer: the padding token is not the end of text."""
    other = copy.deepcopy(tokenizer)
    other.pad_token = "<|startoftext|>"
    trainer = trainer_of(tmp_path, tiny_model, other)
    batch = trainer._responses(next(iter(trainer.get_train_dataloader())), tiny_model.train())
    assert batch.fill_R.sum() > 0
    ends = batch.length_R.cumsum(0).tolist()
    for end, fill in zip(ends, batch.fill_R.tolist(), strict=True):
        assert set(batch.tokens_U[end - 1 - fill : end].tolist()) == {other.eos_token_id}


CHATML = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '\n' + m['content'] + '<|eot_id|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("template", ["LLaDA", "line break after EoT"])
def test_sft__chat_answers_are_filled_after_their_last_token(tmp_path, tiny_model, tokenizer, template):
    chat = copy.deepcopy(tokenizer)
    if template != "LLaDA":
        chat.chat_template = CHATML
    rows = [
        {
            "prompt": [{"role": "user", "content": f"What is {n}?"}],
            "completion": [{"role": "assistant", "content": "one " * n}],
        }
        for n in range(1, 9)
    ]
    trainer = trainer_of(tmp_path, tiny_model, chat, rows, max_length=60)
    whole = [trainer.eos_fill.is_whole(row["completion_ids"]) for row in trainer.train_dataset]
    assert all(whole)
    if template != "LLaDA":
        assert trainer.train_dataset[0]["completion_ids"][-1] != chat.convert_tokens_to_ids("<|eot_id|>")


def test_sft__truncated_responses_are_named_and_left_alone(tmp_path, tiny_model, tokenizer, monkeypatch):
    rows = [*ROWS, {"prompt": "Count.", "completion": " one two three" * 30}]
    warned: list[str] = []
    monkeypatch.setattr(sft_trainer.logger, "warning", warned.append)
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, rows, max_length=40)
    assert "1 of 13 responses do not end with '<|eot_id|>' or '<|endoftext|>'" in warned[0]
    batch = trainer.data_collator([trainer.train_dataset[12]])["responses"]
    assert batch.length_R.tolist() == [40]
    for epoch in range(20):
        assert trainer.eos_fill(batch, epoch).fill_R.tolist() == [0]


def test_sft__fill_needs_an_eos_token(tmp_path, tiny_model, tokenizer):
    nameless = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, mask_token="<|mdm_mask|>"
    )
    model = copy.deepcopy(tiny_model)
    model.config.eos_token_id = None
    rows = [{"prompt_ids": [7, 8], "completion_ids": [9, 10]}]
    with pytest.raises(ValueError, match=r"needs an eos_token.*max_eos_fill=0"):
        trainer_of(tmp_path, model, nameless, rows)
    trainer_of(tmp_path, model, nameless, rows, max_eos_fill=0)


def test_sft__token_budget_counts_the_largest_fill(tmp_path, tiny_model, tokenizer):
    longest = max(
        len(r["prompt_ids"] + r["completion_ids"])
        for r in trainer_of(tmp_path, tiny_model, tokenizer).train_dataset
    )
    joint = {"max_tokens_per_pack": 2 * (longest + 5), "gradient_mode": "joint"}
    trainer_of(tmp_path, tiny_model, tokenizer, max_eos_fill=5, **joint)
    with pytest.raises(ValueError, match=r"longer than the token budget.*max_eos_fill \(up to 6 tokens"):
        trainer_of(tmp_path, tiny_model, tokenizer, max_eos_fill=6, **joint)
    # Within max_length there is no more than that to add.
    trainer_of(tmp_path, tiny_model, tokenizer, max_eos_fill=60, max_length=longest + 5, **joint)
    replayed = {"max_tokens_per_pack": longest + 5}
    trainer_of(tmp_path, tiny_model, tokenizer, max_eos_fill=5, **replayed)
    with pytest.raises(ValueError, match=rf"one masked copy takes {longest + 6} tokens"):
        trainer_of(tmp_path, tiny_model, tokenizer, max_eos_fill=6, **replayed)


@pytest.mark.parametrize("value", [-1, 2**30])
def test_config__refuses_a_fill_out_of_range(tmp_path, value):
    with pytest.raises(ValueError, match=f"max_eos_fill must be .* got {value}"):
        config(tmp_path, DiffusionSFTConfig, max_eos_fill=value)


def test_vrpo__knows_no_fill(tmp_path, tiny_model, tokenizer, pair_rows, monkeypatch):
    """Preference losses, and their SFT term, stay free of padding (arXiv 2505.19223)."""
    assert not hasattr(VRPOConfig, "max_eos_fill")
    monkeypatch.setattr(EosFill, "__call__", lambda *args: pytest.fail("VRPO filled a response"))
    VRPOTrainer(
        tiny_model, args=config(tmp_path, max_steps=1), train_dataset=pair_rows, processing_class=tokenizer
    ).train()
