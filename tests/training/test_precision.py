"""Policy and reference run in one precision: at the start the score is 0, bit for bit, in all of them."""

import copy
import math

import pytest
import torch
from trainers import LORA, config, logged, parameters, trainer_of

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOTrainer
from vrpo.training.precision import release

LOG_TWO = math.log(2)


class Float16Trainer(VRPOTrainer):
    """fp16 autocast as on a GPU; accelerate leaves it out on a CPU, whose autocast knows it all the same."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.native_amp = True
        self.accelerator.state._mixed_precision = "fp16"
        self.accelerator.scaler = torch.amp.GradScaler("cpu")


PRECISIONS = {
    "fp32": {},
    "bf16 autocast": {"bf16": True},
    "fp16 autocast": {"kind": Float16Trainer},
    "bf16 weights": {},
    "bf16 weights and autocast": {"bf16": True},
    "fp64": {},
}


@pytest.fixture
def rough_model(tiny_model):
    """Weights large enough that a rounding anywhere shows in the score."""
    for parameter in tiny_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    return tiny_model


def cast(model, precision):
    if precision.startswith("bf16 weights"):
        for parameter in model.parameters():  # not .bfloat16(), which would round RoPE's frequencies too
            parameter.data = parameter.data.bfloat16()
    return model.double() if precision == "fp64" else model


def spy_on_dtypes(trainer):
    seen = {"policy": set(), "reference": set()}
    for name, model in (("policy", trainer.model), ("reference", trainer.ref_model)):
        if model is not None:
            model.get_submodule("model.layers.0.mlp").register_forward_hook(
                lambda _, __, output, name=name: seen[name].add(output.dtype)
            )
    return seen


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("reference", ["frozen copy", "explicit", "adapter", "explicit beside an adapter"])
def test_train__starts_at_log_two_in_every_precision(
    tmp_path, rough_model, tokenizer, pair_rows, precision, reference
):
    model = cast(rough_model, precision)
    extra = dict(PRECISIONS[precision])
    if "adapter" in reference:
        extra["peft_config"] = LORA
    if "explicit" in reference:
        extra["ref_model"] = copy.deepcopy(model)
    trainer = trainer_of(
        tmp_path,
        model,
        tokenizer,
        pair_rows,
        eval_dataset=pair_rows,
        eval_strategy="steps",
        eval_steps=1,
        sft_weight=0.0,
        learning_rate=0.0,
        max_steps=2,
        **extra,
    )
    seen = spy_on_dtypes(trainer) if reference in ("frozen copy", "explicit") else None
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    during = [*logged(trainer, "loss"), *logged(trainer, "eval_loss")]
    losses = [before["eval_loss"], *during, after["eval_loss"]]
    assert losses == pytest.approx([LOG_TWO] * 7, abs=2e-7)
    for key in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert set(logged(trainer, key) + logged(trainer, f"eval_{key}")) == {0.0}, key
    if seen is not None:
        assert seen["policy"] == seen["reference"]
        autocast = {"bf16 autocast": torch.bfloat16, "fp16 autocast": torch.float16}
        assert seen["policy"] == {autocast.get(precision, next(model.parameters()).dtype)}


def test_train__one_step_of_the_defaults_in_bf16_is_log_two(tmp_path, rough_model, tokenizer, pair_rows):
    """The configuration of a GPU run: every default, bf16 autocast, and the sft term switched off."""
    trainer = trainer_of(
        tmp_path, rough_model, tokenizer, pair_rows, num_samples=8, bf16=True, sft_weight=0.0, max_steps=1
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(LOG_TWO, abs=1e-7)
    assert logged(trainer, "rewards/margins")[0] == 0.0


def test_train__the_precision_of_an_earlier_trainer_is_not_kept(
    tmp_path, rough_model, tokenizer, pair_rows, completion_rows
):
    sft = DiffusionSFTTrainer(
        rough_model,
        args=config(tmp_path / "sft", DiffusionSFTConfig, bf16=True, max_steps=1),
        train_dataset=completion_rows,
        processing_class=tokenizer,
    )
    sft.train()
    dtypes = []
    for number in range(2):
        trainer = trainer_of(
            tmp_path / str(number),
            rough_model,
            tokenizer,
            pair_rows,
            ref_model=copy.deepcopy(rough_model),
            bf16=number == 1,
            sft_weight=0.0,
            max_steps=1,
            learning_rate=0.0,
        )
        seen = spy_on_dtypes(trainer)
        trainer.train()
        assert logged(trainer, "rewards/margins") == [0.0]
        assert seen["policy"] == seen["reference"]
        dtypes.append(set(seen["policy"]))
    assert dtypes == [{torch.float32}, {torch.bfloat16}]


def test_release__gives_back_the_forward_of_the_class(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, bf16=True, max_steps=1)
    trainer.train()
    assert "forward" in trainer.model.__dict__
    release(trainer.model)
    assert not {"forward", "_original_forward", "_is_accelerate_prepared"} & set(trainer.model.__dict__)


def test_train__evaluating_before_it_changes_nothing(tmp_path, tiny_model, tokenizer, pair_rows):
    ends = []
    for number in range(2):
        trainer = trainer_of(
            tmp_path / str(number),
            copy.deepcopy(tiny_model),
            tokenizer,
            pair_rows,
            eval_dataset=pair_rows,
            bf16=True,
        )
        if number:
            trainer.evaluate()
        trainer.train()
        ends.append(parameters(trainer.model))
    assert torch.equal(*ends)
