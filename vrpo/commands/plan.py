"""`vrpo plan`: what a training needs of memory and time on a machine, before it runs anywhere."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from vrpo.commands.arguments import ModelArguments, ScriptArguments
from vrpo.commands.console import say
from vrpo.data.output import check_output, to_json, write
from vrpo.models.loading import parse_dtype
from vrpo.models.quantized import Quantization
from vrpo.planning import Machine, ModelShape, Plan, TrainingSetup, advice, make_plan, read_shape
from vrpo.planning.plan import GIB
from vrpo.training.config import DiffusionConfig, VRPOConfig

_DEFAULT = Machine()


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class PlanArguments(ScriptArguments):
    """The machine, and what the data is like. The data fields of a training's config file are not read."""

    dataset_name: list[str] | str | None = field(
        default=None, metadata={"help": "Not read: so that the file of a training serves."}
    )
    prompt_length: int = _field(512, "Mean length of the prompts, tokens.")
    response_length: int = _field(512, "Mean length of the responses, tokens.")
    num_gpus: int = _field(1, "GPUs of the training.")
    engine: str | None = _field(
        None, "single, ddp, zero2, zero3 (DeepSpeed) or fsdp2. Unset: single for one GPU, fsdp2 for several."
    )
    gpus_per_node: int = _field(_DEFAULT.gpus_per_node, "GPUs that NVLink ties together.")
    gpu_memory: float = _field(_DEFAULT.gpu_memory, "GiB of one GPU, as torch sees them; an H100's 79.1.")
    matmul_tflops: float = _field(
        _DEFAULT.matmul_tflops, "bf16 GEMM of one GPU, TFLOP/s that it reaches; measured on an H100."
    )
    copy_bandwidth: float = _field(
        _DEFAULT.copy_bandwidth, "GB/s of a copy on one GPU, read plus written; measured on an H100."
    )
    link_bandwidth: float = _field(
        _DEFAULT.link_bandwidth, "GB/s per GPU of a collective inside a node; assumed, not measured."
    )
    network_bandwidth: float = _field(
        _DEFAULT.network_bandwidth, "The same between nodes; assumed, not measured."
    )
    compute_dtype: str = _field("bfloat16", "Dtype of the matmuls on a GPU: bfloat16 (autocast) or float32.")
    output_file: str | None = _field(None, "Also write the plan there, as JSON.")


def plan(
    args: PlanArguments, model_args: ModelArguments, config: VRPOConfig, quantization: Quantization
) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError(
            "model_name_or_path is needed: a folder with a config.json, such a file, or a hub name"
        )
    if quantization.name is not None:
        raise ValueError(
            f"{quantization.name}: the memory of quantized weights is not modelled; leave it out"
        )
    if args.compute_dtype not in ("bfloat16", "float32"):
        raise ValueError(f"compute_dtype must be bfloat16 or float32, got {args.compute_dtype!r}")
    if args.output_file is not None:
        check_output(args.output_file, models={"model_name_or_path": model_args.model_name_or_path})
    compute = 2 if args.compute_dtype == "bfloat16" else 4
    setup = training_setup(
        model_args,
        config,
        prompt_length=args.prompt_length,
        response_length=args.response_length,
        num_gpus=args.num_gpus,
        compute_bytes=compute,
    )
    found = make_plan(_shape(model_args), setup, _machine(args))
    changes = [] if found.fits else advice(found)
    if args.output_file is not None:
        proposed = [{"change": name, "peak_gib": p.peak_gib, "fits": p.fits} for name, p in changes]
        contents = to_json(found.as_dict() | {"advice": proposed}, indent=2) + "\n"
        write({Path(args.output_file).expanduser(): contents})
    say(plan_text(found, changes))


def _shape(model_args: ModelArguments) -> ModelShape:
    name = model_args.model_name_or_path
    if Path(name).expanduser().exists():
        return read_shape(name)
    path = cached_file(name, "config.json", revision=model_args.model_revision)
    return read_shape(path)


def training_setup(
    model_args: ModelArguments,
    config: DiffusionConfig,
    *,
    prompt_length: int,
    response_length: int,
    num_gpus: int,
    compute_bytes: int,
    num_sides: int = 2,
    has_reference: bool = True,
) -> TrainingSetup:
    """A training as the cost model sees it. Lengths: means in tokens; the rest as in TrainingSetup."""
    reference = "none"
    if has_reference:
        reference = "adapter" if model_args.use_peft else "model"
        reference = "precomputed" if config.precompute_ref_log_probs else reference
    wide = "bfloat16" if model_args.dtype == "auto" else model_args.dtype
    batch = config.per_device_train_batch_size
    return TrainingSetup(
        num_samples=config.num_samples,
        prompt_length=prompt_length,
        response_length=response_length,
        pairs_per_step=batch * config.gradient_accumulation_steps * num_gpus,
        per_device_train_batch_size=batch,
        num_sides=num_sides,
        max_tokens_per_pack=config.max_tokens_per_pack,
        gradient_mode=config.gradient_mode,
        lora_rank=model_args.lora_r if model_args.use_peft else 0,
        reference=reference,
        train_top_layers=config.train_top_layers,
        # The name changed in transformers 5.23.
        gradient_checkpointing=any(
            getattr(config, f"{what}_checkpointing", False) for what in ("activation", "gradient")
        ),
        weight_bytes=min(4, parse_dtype(wide).itemsize),
        compute_bytes=compute_bytes,
    )


def _machine(args: PlanArguments) -> Machine:
    return Machine(
        num_gpus=args.num_gpus,
        engine=args.engine or ("single" if args.num_gpus == 1 else "fsdp2"),
        gpus_per_node=args.gpus_per_node,
        gpu_memory=args.gpu_memory,
        matmul_tflops=args.matmul_tflops,
        copy_bandwidth=args.copy_bandwidth,
        link_bandwidth=args.link_bandwidth,
        network_bandwidth=args.network_bandwidth,
    )


def plan_text(found: Plan, changes: list[tuple[str, Plan]]) -> str:
    """What is printed: sizes, memory, arithmetic, time, and advice."""
    shape, setup, machine = found.shape, found.setup, found.machine
    mode = "replay" if setup.replays else "joint"
    unit = "pairs" if setup.num_sides == 2 else "examples"
    lines = [
        f"model      {shape.total_parameters / 1e9:.2f} B weights, a token meets "
        f"{shape.active_parameters / 1e9:.2f} B",
        f"step       {setup.pairs_per_step} {unit}, K = {setup.num_samples}, {setup.pair_tokens} tokens "
        f"each, packs of {setup.pack_tokens}, {mode}",
        f"machine    {machine.num_gpus} x {machine.gpu_memory:.1f} GiB, {machine.engine}",
        "",
        "Every figure below is modelled.",
        "",
        "memory of one GPU, GiB",
    ]
    lines += [f"  {name:<14}{size / GIB:9.2f}" for name, size in found.memory.items() if size]
    lines += [f"  {'peak':<14}{found.peak_gib:9.2f}  of {found.usable_gib:.1f} that tensors may take"]
    lines += ["", "arithmetic of one GPU and step, PFLOP"]
    lines += [f"  {name:<14}{value / 1e15:9.3f}" for name, value in found.flops.items() if value]
    lines[-1] += "  (counted in the others)"
    least, most = found.seconds
    lines += ["", f"time of a step: {least:.3g} to {most:.3g} s", ""]
    lines += ["It fits." if found.fits else "It does not fit. What would:"]
    lines += [
        f"  {name}: {changed.peak_gib:.1f} GiB, {changed.seconds[0]:.3g} to {changed.seconds[1]:.3g} s"
        + ("" if changed.fits else ", and still does not fit")
        for name, changed in changes
    ]
    return "\n".join(lines) + "\n"
