"""The plan of a training says what the trainer does: its passes, packs, reference and trained weights."""

import copy
from collections import Counter

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from peft import LoraConfig

from vrpo import (
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    VRPOConfig,
    VRPOTrainer,
)
from vrpo.commands.arguments import ModelArguments
from vrpo.commands.dry_run import training_setup_of
from vrpo.gradient import JointStep, ReplayStep
from vrpo.models import create_model
from vrpo.models.quantized import Quantization
from vrpo.planning import Machine
from vrpo.planning.memory import packs_per_step, trained_parameters
from vrpo.planning.shape import shape_of
from vrpo.planning.step_time import passes_of
from vrpo.training.trunk import body_of

PROMPT, RESPONSE = 5, 4
LAYERS = 3
KINDS = {
    "vrpo": (VRPOTrainer, VRPOConfig, ("chosen_ids", "rejected_ids")),
    "kto": (DiffusionKTOTrainer, DiffusionKTOConfig, ("completion_ids",)),
    "sft": (DiffusionSFTTrainer, DiffusionSFTConfig, ("completion_ids",)),
}


def rows(number: int, sides: tuple[str, ...]) -> Dataset:
    """Of equal lengths, as the plan takes them."""
    found = []
    for n in range(number):
        row = {"prompt_ids": [9 + n] * PROMPT, "label": n % 2 == 0}
        found.append(row | {name: [20 + n + side] * RESPONSE for side, name in enumerate(sides)})
    return Dataset.from_list(found)


@st.composite
def cases(draw) -> dict:
    """A legal training: kind, fields of its config, and those of ModelArguments."""
    kind = draw(st.sampled_from(("vrpo", "vrpo", "kto", "sft")))
    samples, batch = draw(st.sampled_from((1, 2, 4))), draw(st.integers(1, 3))
    mode = draw(st.sampled_from(("auto", "joint", "replay")))
    segment = PROMPT + RESPONSE
    example = segment * samples * (2 if kind == "vrpo" else 1)
    least = {"joint": example * (batch if kind == "kto" else 1)}.get(mode, segment)
    fields = {
        "num_samples": samples,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": draw(st.integers(1, 2)),
        "gradient_mode": mode,
        "max_tokens_per_pack": draw(st.integers(least, max(least, 2 * batch * example))),
        "train_top_layers": draw(st.sampled_from((None, None, 1, 2, 3))),
        "gradient_checkpointing": draw(st.booleans()),
    }
    use_peft = draw(st.booleans())
    needs_reference = kind != "sft"
    if kind == "vrpo":
        losses = draw(st.sampled_from((["sigmoid"], ["simpo"], ["simpo", "ipo"])))
        fields["loss_type"], needs_reference = losses, losses != ["simpo"]
    if needs_reference:
        how = draw(st.sampled_from(("plain", "plain", "precomputed", "synced")))
        fields["precompute_ref_log_probs"] = how == "precomputed"
        fields["sync_ref_model"] = how == "synced" and not use_peft
        fields["share_trunk"] = draw(st.sampled_from((None, False)))
    model = {"use_peft": use_peft, "lora_r": draw(st.integers(1, 3)), "dtype": "float32"}
    if use_peft:
        model["lora_target_modules"] = draw(st.sampled_from((None, ["q_proj", "v_proj"], ["down_proj"])))
        model["lora_dropout"] = draw(st.sampled_from((0.0, 0.1)))
        # With dropout there is no second pass: a replay is refused, and auto is joint.
        may_drop = kind == "sft" or (mode != "replay" and fields["max_tokens_per_pack"] >= batch * example)
        fields["disable_dropout"] = not may_drop or draw(st.booleans())
    return {"kind": kind, "fields": fields, "model": model}


class Watched:
    """Counts the runs of the lowest and the topmost layer, of policy and reference together.

    rows: (of the topmost MLP, of the head) for each pass that reaches the head.
    """

    def __init__(self, trainer):
        self.calls, self.steps, self.packs, self.rows, upper = Counter(), set(), [], [], []
        models = [trainer.model, *([trainer.ref_model] if getattr(trainer, "ref_model", None) else [])]
        for model in models:
            layers = body_of(model).layers
            for name, layer in (("bottom", layers[0]), ("top", layers[-1])):
                # Inside the layer, where a checkpoint runs it again, and before its attention, because what
                # is recomputed stops when the backward pass has enough.
                layer.self_attn.register_forward_pre_hook(lambda *_, name=name: self.calls.update([name]))
            layers[-1].mlp.register_forward_pre_hook(lambda _, args: upper.append(len(args[0])))
            model.get_output_embeddings().register_forward_pre_hook(
                lambda _, args: self.rows.append((upper[-1], len(args[0])))
            )
        made = trainer._steps

        def steps(*args):
            for batch, step in made(*args):
                self.steps.add(type(step))
                self.packs += [len(pack.tokens_T) for pack in step.packs]
                yield batch, step

        trainer._steps = steps


@pytest.fixture(scope="module")
def base(tokenizer):
    return create_model(
        tokenizer, d_model=16, n_layers=LAYERS, n_heads=2, mlp_hidden_size=24, init_std=0.2, seed=0
    )


def trained_by(case: dict, base, tokenizer, folder):
    """A trainer of the case that took one optimizer step, and what was seen of it."""
    kind, config, sides = KINDS[case["kind"]]
    fields = case["fields"] | ({"max_eos_fill": 0} if case["kind"] == "sft" else {})
    if fields.get("precompute_ref_log_probs"):
        fields["ref_log_probs_cache"] = str(folder / "cache")
    args = config(
        output_dir=str(folder),
        max_steps=1,
        warmup_steps=0,
        save_strategy="no",
        report_to="none",
        training_report=False,
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **fields,
    )
    model_args = ModelArguments(**case["model"])
    adapter = None
    if model_args.use_peft:
        adapter = LoraConfig(
            r=model_args.lora_r,
            lora_dropout=model_args.lora_dropout,
            target_modules=model_args.lora_target_modules or "all-linear",
        )
    number = args.per_device_train_batch_size * args.gradient_accumulation_steps
    trainer = kind(
        copy.deepcopy(base),
        args=args,
        train_dataset=rows(number, sides),
        processing_class=tokenizer,
        peft_config=adapter,
    )
    seen = Watched(trainer)
    trainer.train()
    return trainer, model_args, seen


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@settings(
    max_examples=30,
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(case=cases())
def test_plan__says_what_the_trainer_does(case, base, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    trainer, model_args, seen = trained_by(case, base, tokenizer, folder)
    setup = training_setup_of(
        trainer,
        model_args,
        trainer.args,
        Quantization(),
        prompt_length=PROMPT,
        response_length=RESPONSE,
        num_sides=2 if case["kind"] == "vrpo" else 1,
    )
    shape, passes = shape_of(trainer.model.config.to_dict()), passes_of(setup)
    assert setup.is_cut == (JointStep not in seen.steps) and setup.replays == (ReplayStep in seen.steps)
    assert setup.keeps_reference == (getattr(trainer, "ref_model", None) is not None)
    assert setup.pack_tokens == max(seen.packs)
    assert packs_per_step(shape, setup, Machine()) == len(seen.packs)
    assert seen.calls["top"] == len(seen.packs) * passes.forwards
    assert setup.trims_last_layer and all(upper == head for upper, head in seen.rows)
    assert len(seen.rows) == len(seen.packs) * (passes.forwards - passes.recomputed)
    trained = [p.numel() for p in trainer.model.parameters() if p.requires_grad]
    assert trained_parameters(shape, setup) == sum(trained)
    if setup.train_top_layers not in (None, LAYERS):
        assert seen.calls["bottom"] == len(seen.packs) * passes.frozen
