"""What a person should know of a run is told once, with its numbers and its cure; a sound run is silent."""

import pytest
import torch
from trainers import config, logged, trainer_of
from transformers import TrainerCallback

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer
from vrpo.training.advice import about_rounding, displacement_per_token
from vrpo.training.memory import peak_memory_gb


def told(caplog):
    return [record.message for record in caplog.records if record.name == "vrpo.training.advice"]


def test_train__a_sound_run_is_silent(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=2, learning_rate=1e-5).train()
    assert told(caplog) == []


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"warmup_steps": 2}, "warmup_steps=2 are not over when the run ends at step 2"),
        ({"save_strategy": "steps", "save_steps": 3}, "save_steps=3 is longer than the run of 2 steps"),
        ({"eval_strategy": "steps", "eval_steps": 5}, "eval_steps=5 is longer than the run of 2 steps"),
        ({"per_device_train_batch_size": 13}, "has 12 examples, fewer than one batch of all processes, 13"),
    ],
)
def test_train__tells_what_the_run_is_too_short_for(
    tmp_path, tiny_model, tokenizer, pair_rows, caplog, fields, text
):
    fields = {"max_steps": 2, "learning_rate": 1e-5, "eval_dataset": pair_rows, **fields}
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **fields)
    trainer.train()
    if "save_strategy" not in fields:  # a second run would overwrite the checkpoints of the first
        trainer.train()
    assert [text in message for message in told(caplog)] == [True]


def test_train__tells_that_a_finished_run_takes_no_step(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    fields = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "learning_rate": 1e-5}
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **fields).train()
    tiny_model.load_state_dict(start)
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **fields).train(resume_from_checkpoint=True)
    assert [message[:18] for message in told(caplog)] == ["no step is taken: "]


@pytest.mark.parametrize(("dtype", "bits"), [(torch.bfloat16, 9), (torch.float16, 12)])
def test_about_rounding__is_what_adding_to_such_weights_does(tmp_path, dtype, bits):
    model = torch.nn.Linear(64, 64).to(dtype)
    with torch.no_grad():
        model.weight.fill_(0.7)
        model.bias.fill_(0.7)
    lost, kept = 0.69 * 2.0**-bits, 3 * 0.7 * 2.0**-bits
    assert torch.equal(model.weight - lost, model.weight) and not torch.equal(
        model.weight - kept, model.weight
    )
    assert "100% of the trained weights cannot move" in next(
        about_rounding(config(tmp_path, learning_rate=lost), model)
    )
    assert not list(about_rounding(config(tmp_path, learning_rate=kept), model))
    assert not list(about_rounding(config(tmp_path, learning_rate=lost, optim="sgd"), model))
    assert not list(about_rounding(config(tmp_path, learning_rate=lost), model.float()))


def test_displacement_per_token__is_the_difference_over_the_length():
    logs = {"logps/chosen": -60.0, "elbo/ref_chosen": -40.0, "elbo/chosen_per_token": -3.0}
    assert displacement_per_token(logs) == pytest.approx(-1.0)  # 20 nats over 20 tokens
    assert displacement_per_token({"loss": 1.0}) is None


class Displaced(TrainerCallback):
    """Logs chosen responses that fall behind the reference by 0.2 nats per token."""

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer.log({"logps/chosen": -44.0, "elbo/ref_chosen": -40.0, "elbo/chosen_per_token": -2.2})


def test_train__tells_once_that_the_chosen_are_displaced(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    callback = Displaced()
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, max_steps=6, logging_strategy="no", callbacks=[callback]
    )
    callback.trainer = trainer
    trainer.train()
    [message] = told(caplog)
    assert "at step 3 the chosen responses are 0.2 nats per token less likely" in message


def test_sft__tells_of_a_fill_below_the_longest_response(
    tmp_path, tiny_model, tokenizer, completion_rows, caplog
):
    for fill in (1, 60):
        args = config(tmp_path, DiffusionSFTConfig, max_eos_fill=fill)
        DiffusionSFTTrainer(tiny_model, args=args, train_dataset=completion_rows, processing_class=tokenizer)
    assert caplog.text.count("is below the longest response") == 1
    assert "max_eos_fill=1 is below the longest response" in caplog.text


def test_log__has_the_peak_memory(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=2)
    trainer.train()
    before = logged(trainer, "vrpo/peak_memory_gb")
    block = torch.ones(50_000_000)  # .2 GB
    assert len(before) == 2 and 0.05 < before[-1] <= peak_memory_gb(block.device)
    assert peak_memory_gb(block.device) < 100
