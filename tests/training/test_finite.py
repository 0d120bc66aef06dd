"""No step with a gradient that is not finite, no file with such a weight, and a true word on what is left."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from trainers import LORA, parameters, trainer_of
from transformers import TrainerCallback

from vrpo.training import finite
from vrpo.training.finite import last_good_checkpoint, not_finite


class AtStep(TrainerCallback):
    """Calls `action(model)` at a moment of the step `step`."""

    def __init__(self, step, action, moment):
        def call(args, state, control, model=None, **kwargs):
            if state.global_step == step:
                action(model)

        setattr(self, moment, call)


def trained(model):
    return next(parameter for parameter in model.parameters() if parameter.requires_grad)


def poison_all_weights(model):
    trained(model).data.fill_(math.nan)


def poison_weight(model):
    trained(model).data.view(-1)[3] = math.nan


def saving(tmp_path, model, tokenizer, rows, **fields):
    return trainer_of(
        tmp_path,
        model,
        tokenizer,
        rows,
        **{"save_strategy": "steps", "save_steps": 1, "max_steps": 3} | fields,
    )


def saved_weights(folder):
    return [tensor for file in folder.rglob("*.safetensors") for tensor in load_file(file).values()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "fields", [{}, {"max_grad_norm": 0.0}, {"peft_config": LORA}], ids=["clip", "no clip", "lora"]
)
def test_train__stops_before_a_step_whose_gradient_is_not_finite(
    tmp_path, tiny_model, tokenizer, pair_rows, value, fields
):
    trainer = saving(tmp_path, tiny_model, tokenizer, pair_rows, **fields)
    weight = trained(trainer.model)

    def poisoned(gradient):
        return gradient.index_fill(0, torch.tensor([0]), value) if trainer.state.global_step == 2 else None

    weight.register_hook(poisoned)
    with pytest.raises(
        FloatingPointError, match=r"gradient is not finite at step 2: .*checkpoint-2"
    ) as error:
        trainer.train()
    assert "\n" not in str(error.value)
    assert torch.isfinite(parameters(trainer.model)).all()
    assert not (tmp_path / "out/checkpoint-3").exists()


def test_train__saves_no_weight_that_is_not_finite(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = saving(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        save_total_limit=1,
        callbacks=[AtStep(3, poison_weight, "on_step_end")],
    )
    with pytest.raises(FloatingPointError, match=r"weights are not finite after step 3: .*checkpoint-2"):
        trainer.train()
    assert [folder.name for folder in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    assert all(torch.isfinite(tensor).all() for tensor in saved_weights(tmp_path / "out"))
    with pytest.raises(FloatingPointError, match="Nothing was saved"):
        trainer.save_model()
    assert not (tmp_path / "out/model.safetensors").exists()


@pytest.mark.parametrize("fields", [{}, {"peft_config": LORA}, {"bf16": True}], ids=["full", "lora", "bf16"])
def test_train__a_diverging_rate_leaves_no_checkpoint_that_is_not_finite(
    tmp_path, tiny_model, tokenizer, pair_rows, fields
):
    trainer = saving(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        learning_rate=1e30,
        save_total_limit=1,
        max_steps=20,
        **fields,
    )
    with pytest.raises(FloatingPointError) as error:
        trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in saved_weights(tmp_path / "out"))
    for folder in (tmp_path / "out").glob("checkpoint-*"):
        assert folder.name in str(error.value)


def test_train__says_that_no_checkpoint_is_left(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, callbacks=[AtStep(1, poison_all_weights, "on_step_begin")]
    )
    with pytest.raises(FloatingPointError, match="holds no checkpoint with finite weights"):
        trainer.train()


def test_last_good_checkpoint__skips_bad_and_broken_ones(tmp_path):
    good, bad = {"w": torch.ones(3)}, {"w": torch.tensor([1.0, math.nan])}
    for step, weights in ((9, good), (10, bad), (20, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if weights is not None:
            save_file(weights, folder / "model.safetensors")
    (tmp_path / "checkpoint-30").mkdir()
    (tmp_path / "checkpoint-30/model.safetensors").write_bytes(b"cut")
    (tmp_path / "checkpoint-final").mkdir()
    assert last_good_checkpoint(str(tmp_path)).endswith("checkpoint-9")
    assert "no checkpoint" in last_good_checkpoint(str(tmp_path / "nowhere"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_not_finite__names_exactly_the_bad_tensors(dtype):
    large = torch.full((2, 3), torch.finfo(dtype).max, dtype=dtype)
    tensors = {
        "large": large,
        "nan": torch.tensor([0.0, math.nan], dtype=dtype),
        "inf": torch.tensor([[-math.inf]], dtype=dtype),
        "empty": torch.zeros(0, dtype=dtype),
        "none": None,
        "integers": torch.tensor([1, 2]),
    }
    assert not_finite(tensors.items()) == ["nan", "inf"]


def test_save_model__is_free_to_save_buffers_of_any_value(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1)
    trainer.model.register_buffer("attend", torch.tensor([-math.inf]), persistent=False)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out/model.safetensors").exists()


def test_file_is_finite__holds_one_tensor_at_a_time(tmp_path, monkeypatch):
    path, held = tmp_path / "model.safetensors", []
    save_file({name: torch.ones(3) for name in "abc"}, path)
    look = finite.not_finite
    monkeypatch.setattr(finite, "not_finite", lambda named: look(held.append(len(named)) or named))
    assert finite._file_is_finite(path)
    assert held == [1, 1, 1]
