"""`--dry_run` of the training commands: what the training would do, in text."""

import torch

from vrpo.commands.arguments import ModelArguments
from vrpo.commands.plan import plan_text, training_setup
from vrpo.models.quantized import Quantization, is_quantized
from vrpo.planning import Machine, TrainingSetup, advice, make_plan
from vrpo.planning.plan import GIB
from vrpo.planning.shape import shape_of
from vrpo.training.config import DiffusionConfig
from vrpo.training.dry_run import Look, data_text, look, pack_text, reference_text, steps_text
from vrpo.training.trainer import DiffusionTrainer


def dry_run_text(
    trainer: DiffusionTrainer,
    model_args: ModelArguments,
    config: DiffusionConfig,
    quantization: Quantization,
) -> str:
    """Data, steps, the estimate of `vrpo plan`, and the first pack.

    Errors: those of a training before its first step.
    """
    trains = not getattr(config, "precompute_only", False)
    if trains:
        trainer.check_start(config.resume_from_checkpoint)
    seen = look(trainer)
    estimate = "no estimate of memory and time: how the checkpoint is quantized is not known\n"
    if quantization.name is not None or not is_quantized(trainer.model):
        estimate = _estimate(trainer, model_args, config, quantization, seen)
    if not trains:
        estimate = "no estimate of memory and time: precompute_only trains nothing\n"
    known = getattr(trainer, "known_reference", None)
    steps = steps_text(seen, config.num_samples) if trains else "steps      none: precompute_only\n"
    return "\n".join(
        (
            data_text(seen.report, seen.lengths),
            steps if known is None else steps + reference_text(known),
            estimate,
            pack_text(trainer.processing_class, seen.batch, seen.pack),
            "dry run: nothing was trained, no weights were saved\n",
        )
    )


def _estimate(
    trainer: DiffusionTrainer,
    model_args: ModelArguments,
    config: DiffusionConfig,
    quantization: Quantization,
    seen: Look,
) -> str:
    setup = training_setup_of(
        trainer,
        model_args,
        config,
        quantization,
        prompt_length=max(1, round(seen.mean_prompt)),
        response_length=max(1, round(seen.mean_response)),
        num_sides=seen.num_sides,
    )
    machine, told = _machine(trainer)
    plan = make_plan(shape_of(trainer.model.config.to_dict()), setup, machine)
    changes = [] if plan.fits else advice(plan)
    least, most = (seconds * seen.max_steps / 3600 for seconds in plan.seconds)
    run = f"time of the run: {least:.3g} to {most:.3g} h, {seen.max_steps} steps"
    return f"{told}\n{plan_text(plan, changes)}{run}\n"


def training_setup_of(
    trainer: DiffusionTrainer,
    model_args: ModelArguments,
    config: DiffusionConfig,
    quantization: Quantization,
    **lengths: int,
) -> TrainingSetup:
    """A trainer as the cost model sees it; lengths: prompt_length, response_length, num_sides."""
    is_narrow = config.bf16 or config.fp16 or next(trainer.model.parameters()).element_size() == 2
    return training_setup(
        model_args,
        config,
        num_gpus=config.world_size,
        compute_bytes=2 if is_narrow else 4,
        is_linear=trainer.linear_objective,
        whole_batches=trainer.whole_batches,
        has_reference=getattr(trainer, "needs_reference", False),
        gradient_mode=trainer.gradient_mode,
        quantization=quantization,
        **lengths,
    )


def _machine(trainer: DiffusionTrainer) -> tuple[Machine, str]:
    """The GPUs of this run; where it runs on CPUs, as many H100s. And what of it is assumed."""
    number, device = trainer.args.world_size, trainer.args.device
    engine = "single" if number == 1 else "ddp"
    if number > 1 and trainer.is_fsdp_enabled:
        engine = "fsdp2"
    elif number > 1 and trainer.is_deepspeed_enabled:
        stage = trainer.accelerator.state.deepspeed_plugin.zero_stage
        engine = "zero3" if stage == 3 else "zero2"
    if device.type != "cuda":
        return Machine(num_gpus=number, engine=engine), "estimate for H100 GPUs: this run has none"
    memory = torch.cuda.get_device_properties(device).total_memory / GIB
    machine = Machine(num_gpus=number, engine=engine, gpu_memory=memory)
    return machine, "estimate with the memory of this GPU and the rates of an H100"
