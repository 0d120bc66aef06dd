"""Answers during training: they are there, and training does not notice them."""

import json

import pytest
import torch
from datasets import Dataset

from vrpo import VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import NewModel, build_model
from vrpo.generation.callback import SAMPLES_FILE, LogCompletionsCallback
from vrpo.generation.config import SamplerConfig


def train(folder, tokenizer, rows, steps=4, resume=None, **callback):
    sizes = NewModel(vocab_size=300, d_model=32, n_layers=2, n_heads=4, mlp_hidden_size=64)
    model = build_model(sizes, tokenizer, max_length=64, seed=0)
    callbacks = []
    if callback:
        prompts = [tokenizer(text)["input_ids"] for text in ("What is 1 plus 4?", "What is 7")]
        callbacks = [LogCompletionsCallback(prompts, **callback)]
    args = VRPOConfig(
        output_dir=str(folder), num_samples=2, learning_rate=1e-2, warmup_steps=0, logging_steps=1,
        per_device_train_batch_size=4, gradient_accumulation_steps=1, max_steps=steps, save_steps=2,
        report_to="none", disable_tqdm=True, use_cpu=True, dataloader_pin_memory=False,
    )  # fmt: skip
    trainer = VRPOTrainer(
        model, args=args, train_dataset=rows, processing_class=tokenizer, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def lines(folder):
    return [json.loads(line) for line in (folder / SAMPLES_FILE).read_text().splitlines()]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_callback__training_does_not_notice_it(tmp_path, tokenizer, pair_rows: Dataset, temperature):
    plain = train(tmp_path / "plain", tokenizer, pair_rows)
    state = torch.get_rng_state()
    config = SamplerConfig(max_new_tokens=8, temperature=temperature)
    watched = train(tmp_path / "watched", tokenizer, pair_rows, freq=2, config=config)
    for (name, one), (_, two) in zip(
        plain.model.named_parameters(), watched.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name
    assert torch.equal(torch.get_rng_state(), state)
    assert [entry["loss"] for entry in plain.state.log_history if "loss" in entry] == [
        entry["loss"] for entry in watched.state.log_history if "loss" in entry
    ]
    assert watched.model.training
    found = lines(tmp_path / "watched")
    assert [line["step"] for line in found] == [0, 0, 2, 2, 4, 4]
    assert {line["prompt"] for line in found} == {"What is 1 plus 4?", "What is 7"}


def test_callback__a_resumed_run_has_each_step_once(tmp_path, tokenizer, pair_rows):
    settings = {"freq": 1, "config": SamplerConfig(max_new_tokens=4)}
    train(tmp_path / "one", tokenizer, pair_rows, **settings)
    train(tmp_path / "two", tokenizer, pair_rows, **settings)
    with (tmp_path / "two" / SAMPLES_FILE).open("a") as file:
        file.write('{"step": 5, "pro')  # killed while it wrote
    train(tmp_path / "two", tokenizer, pair_rows, resume=str(tmp_path / "two/checkpoint-2"), **settings)
    assert lines(tmp_path / "two") == lines(tmp_path / "one")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"prompts": [], "freq": 1}, "prompts must have at least one"),
        ({"prompts": [[]], "freq": 1}, "empty"),
        ({"prompts": [[1]], "freq": 0}, "freq must be at least 1"),
        ({"prompts": [[1]], "freq": 1, "config": {"max_new_tokens": 4}}, "config must be a SamplerConfig"),
        ({"prompts": [[1]], "freq": 1, "max_pack_tokens": 0}, "max_pack_tokens must be at least 1"),
        ({"prompts": [[1]], "freq": 1, "num_completions_to_print": -1}, "num_completions_to_print must be"),
    ],
)
def test_callback__refuses_what_it_cannot_ask(arguments, text):
    with pytest.raises(ValueError, match=text):
        LogCompletionsCallback(**arguments)
