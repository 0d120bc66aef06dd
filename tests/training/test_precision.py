"""Policy and reference run in one precision: at the start the score is 0, bit for bit, in all of them."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear as LoraLinear
from trainers import LORA, config, logged, parameters, trainer_of

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOTrainer
from vrpo.training.precision import leave_adapter_inputs_to_autocast, release

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


LORA_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(model, dtype=torch.bfloat16, **options):
    """The model in 16 bits with a float32 adapter that is not zero; and one whose inputs autocast settles."""
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    config = LoraConfig(r=2, target_modules=LORA_LAYERS, init_lora_weights=False, **options)
    widening = get_peft_model(model, config).train()
    sparing = copy.deepcopy(widening)
    leave_adapter_inputs_to_autocast(sparing)
    return widening, sparing


def spy_on_adapter_inputs(model):
    """The list that gets the dtype of every input of a LoRA matmul."""
    seen = []
    for name, module in model.named_modules():
        if name.endswith("lora_A.default"):
            module.register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    return seen


def nll_and_gradients(model, dtype, *, checkpointing=False):
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
        enable()
        model.enable_input_require_grads()
    with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        nll = model(
            input_ids=torch.arange(1, 13)[None],
            rows=torch.tensor([3, 8]),
            targets=torch.tensor([1, 2]),
        ).nll
    nll.square().sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert any("lora_A" in name and gradient.abs().max() > 0 for name, gradient in gradients.items())
    return {"nll": nll.detach(), **gradients}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_adapter_inputs__left_to_autocast_give_the_same_bits(rough_model, dtype, checkpointing):
    widening, sparing = adapted(rough_model, dtype)
    seen = [spy_on_adapter_inputs(model) for model in (widening, sparing)]
    results = [nll_and_gradients(m, dtype, checkpointing=checkpointing) for m in (widening, sparing)]
    assert set(seen[0]) == {torch.float32} and torch.float32 not in seen[1]
    assert len(seen[0]) == len(seen[1])
    assert results[0].keys() == results[1].keys()
    for name, expected in results[0].items():
        assert torch.equal(results[1][name], expected), name


def test_adapter_inputs__are_widened_without_autocast(rough_model):
    widening, sparing = adapted(rough_model)
    nll_and_gradients(sparing, torch.bfloat16)  # what autocast settled is not kept
    sparing.zero_grad()
    seen = spy_on_adapter_inputs(sparing)
    expected, found = nll_and_gradients(widening, None), nll_and_gradients(sparing, None)
    assert set(seen) == {torch.float32}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("options", [{"lora_dropout": 0.5}, {"use_dora": True}], ids=str)
def test_adapter_inputs__are_widened_where_the_numbers_would_change(rough_model, options):
    results = []
    for model in adapted(rough_model, **options):
        torch.manual_seed(0)
        results.append(nll_and_gradients(model, torch.bfloat16))
    assert all(torch.equal(results[1][name], value) for name, value in results[0].items())


def test_adapter_inputs__are_widened_for_several_adapters_at_work(rough_model):
    widening, _ = adapted(rough_model, torch.float16)
    widening.add_adapter("second", LoraConfig(r=2, target_modules=LORA_LAYERS, init_lora_weights=False))
    results = []
    for active in (["default", "second"], ["second"]):
        widening.base_model.set_adapter(active)
        sparing = copy.deepcopy(widening)
        leave_adapter_inputs_to_autocast(sparing)
        seen = spy_on_adapter_inputs(sparing)
        results.append(
            [nll_and_gradients(model, torch.float16) for model in (copy.deepcopy(widening), sparing)]
        )
        assert (torch.float32 in seen) == (len(active) > 1)
    for expected, found in results:
        assert expected.keys() == found.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adapter_inputs__a_peft_without_the_switch_works_as_before(rough_model):
    widening, _ = adapted(rough_model)
    older = copy.deepcopy(widening)
    for layer in older.modules():
        if isinstance(layer, LoraLinear):
            del layer.cast_input_dtype_enabled
    leave_adapter_inputs_to_autocast(older)
    seen = spy_on_adapter_inputs(older)
    expected, found = (nll_and_gradients(model, torch.bfloat16) for model in (widening, older))
    assert set(seen) == {torch.float32}
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_adapter_inputs__one_switch_per_layer_and_none_that_was_off(rough_model):
    _, sparing = adapted(rough_model)
    layers = [layer for layer in sparing.modules() if isinstance(layer, LoraLinear)]
    leave_adapter_inputs_to_autocast(sparing)
    assert {len(layer._forward_pre_hooks) for layer in layers} == {1}
    off, _ = adapted(rough_model)
    layers = [layer for layer in off.modules() if isinstance(layer, LoraLinear)]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    leave_adapter_inputs_to_autocast(off)
    assert {len(layer._forward_pre_hooks) for layer in layers} == {0}


@pytest.mark.parametrize("bf16", [True, False], ids=["autocast", "plain"])
def test_train__adapters_read_activations_as_they_are(tmp_path, rough_model, tokenizer, pair_rows, bf16):
    trainer = trainer_of(
        tmp_path,
        cast(rough_model, "bf16 weights"),
        tokenizer,
        pair_rows,
        peft_config=LoraConfig(r=2, target_modules=LORA_LAYERS),
        bf16=bf16,
        max_steps=2,
    )
    seen = spy_on_adapter_inputs(trainer.model)
    trainer.train()
    assert set(seen) == {torch.bfloat16 if bf16 else torch.float32}
    assert logged(trainer, "rewards/margins")[0] == 0.0
