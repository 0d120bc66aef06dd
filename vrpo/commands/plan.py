"""`vrpo plan`: what a training needs of memory and time on a machine, before it runs anywhere."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from vrpo.commands.arguments import ModelArguments, ScriptArguments
from vrpo.commands.completions import CompletionArguments
from vrpo.commands.console import say
from vrpo.commands.idle import check_idle
from vrpo.commands.planned_config import PlannedConfig, checkpoints
from vrpo.data.output import check_output, to_json, write
from vrpo.estimator.masking import masked_share
from vrpo.models.loading import parse_dtype
from vrpo.models.paths import check_revision
from vrpo.models.quantized import Quantization
from vrpo.objectives.losses import needs_reference
from vrpo.planning import Machine, ModelShape, Plan, TrainingSetup, advice, make_plan, read_shape
from vrpo.planning.plan import GIB
from vrpo.training.config import DiffusionConfig

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
        None,
        "single, ddp, zero2, zero3 (DeepSpeed) or fsdp2. Unset: what the fields fsdp and deepspeed ask for, "
        "else single for one GPU and fsdp2 for several.",
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
    compute_dtype: str | None = _field(
        None,
        "Dtype of the matmuls on a GPU: bfloat16 (autocast) or float32. Unset: bfloat16, unless bf16 is "
        "false and the weights are float32.",
    )
    output_file: str | None = _field(None, "Also write the plan there, as JSON.")


def plan(
    args: PlanArguments,
    model_args: ModelArguments,
    config: PlannedConfig,
    quantization: Quantization,
    completions: CompletionArguments,
) -> None:
    if model_args.model_name_or_path is None:
        raise ValueError(
            "model_name_or_path is needed: a folder with a config.json, such a file, or a hub name"
        )
    check_idle(model_args, config)
    if quantization.name is not None and not model_args.use_peft:
        raise ValueError(f"{quantization.name} needs use_peft: quantized weights do not train, adapters do")
    if args.num_gpus < 1:
        raise ValueError(f"num_gpus must be at least 1, got {args.num_gpus}")
    if args.compute_dtype not in (None, "bfloat16", "float32"):
        raise ValueError(f"compute_dtype must be bfloat16 or float32, got {args.compute_dtype!r}")
    if args.output_file is not None:
        check_output(args.output_file, models={"model_name_or_path": model_args.model_name_or_path})
    has_reference = needs_reference(config.loss_type)
    _check_reference(model_args, config, has_reference)
    setup = training_setup(
        model_args,
        config,
        prompt_length=args.prompt_length,
        response_length=args.response_length,
        num_gpus=args.num_gpus,
        compute_bytes=_compute_bytes(args, model_args, config),
        has_reference=has_reference,
        gradient_mode=_gradient_mode(model_args, config),
        quantization=quantization,
    )
    _check_lengths(setup, config)
    found = make_plan(_shape(model_args), setup, _machine(args, config.engine))
    changes = [] if found.fits else advice(found)
    if args.output_file is not None:
        proposed = [{"change": name, "peak_gib": p.peak_gib, "fits": p.fits} for name, p in changes]
        more = {"advice": proposed, "not_modelled": list(config.not_modelled)}
        contents = to_json(found.as_dict() | more, indent=2) + "\n"
        write({Path(args.output_file).expanduser(): contents})
    say(plan_text(found, changes, config.not_modelled))


def _compute_bytes(args: PlanArguments, model_args: ModelArguments, config: PlannedConfig) -> int:
    if args.compute_dtype is not None:
        return 2 if args.compute_dtype == "bfloat16" else 4
    return 4 if config.is_narrow is False and _weight_bytes(model_args) == 4 else 2


def _weight_bytes(model_args: ModelArguments) -> int:
    return min(4, parse_dtype("bfloat16" if model_args.dtype == "auto" else model_args.dtype).itemsize)


def _gradient_mode(model_args: ModelArguments, config: DiffusionConfig) -> str:
    """As the trainer takes it: what drops activations at random is not passed twice."""
    drops = model_args.use_peft and model_args.lora_dropout > 0 and not config.disable_dropout
    if drops and config.gradient_mode == "replay":
        raise ValueError("gradient_mode='replay' does not go with lora_dropout: leave disable_dropout=True")
    return "joint" if drops else config.gradient_mode


def _check_reference(model_args: ModelArguments, config: PlannedConfig, has_reference: bool) -> None:
    """ValueError for a reference that training would refuse."""
    if config.precompute_ref_log_probs and not has_reference:
        raise ValueError("precompute_ref_log_probs is of no use to a loss without a reference")
    if config.sync_ref_model and (model_args.use_peft or not has_reference):
        raise ValueError(
            "sync_ref_model needs a second model that can follow: neither adapters nor a loss without a "
            "reference have one"
        )


def _check_lengths(setup: TrainingSetup, config: DiffusionConfig) -> None:
    """ValueError for examples that training would cut, or refuse."""
    if setup.segment_length > config.max_length:
        raise ValueError(
            f"prompt_length + response_length = {setup.segment_length} tokens, but max_length="
            f"{config.max_length} cuts them: give the mean lengths of your data"
        )
    least = setup.pair_tokens if setup.gradient_mode == "joint" else setup.segment_length
    if least > setup.max_tokens_per_pack:
        what = (
            "one masked copy takes"
            if setup.gradient_mode != "joint"
            else "gradient_mode='joint': a pair takes"
        )
        raise ValueError(f"{what} {least} tokens, but max_tokens_per_pack={setup.max_tokens_per_pack}")


def _shape(model_args: ModelArguments) -> ModelShape:
    name = model_args.model_name_or_path
    check_revision(name, model_args.model_revision)
    if Path(name).expanduser().exists():
        return read_shape(name)
    try:
        path = cached_file(name, "config.json", revision=model_args.model_revision)
    except OSError as error:
        raise OSError(
            f"model_name_or_path {name!r}: no config.json could be had: {' '.join(str(error).split())}. Of a "
            "model that is not here, a folder with its config.json, or that file, will do"
        ) from error
    return read_shape(path)


def training_setup(
    model_args: ModelArguments,
    config: DiffusionConfig,
    *,
    prompt_length: int,
    response_length: int,
    num_gpus: int,
    compute_bytes: int,
    has_reference: bool,
    gradient_mode: str,
    quantization: Quantization,
    num_sides: int = 2,
    is_linear: bool = False,
    whole_batches: bool = False,
) -> TrainingSetup:
    """A training as the cost model sees it. Lengths: means in tokens; the rest as in TrainingSetup."""
    if response_length < 1:
        raise ValueError(f"response_length must be a whole number from 1, got {response_length}")
    batch = config.per_device_train_batch_size
    targets = model_args.lora_target_modules
    return TrainingSetup(
        num_samples=config.num_samples,
        prompt_length=prompt_length,
        response_length=response_length,
        pairs_per_step=batch * config.gradient_accumulation_steps * num_gpus,
        per_device_train_batch_size=batch,
        num_sides=num_sides,
        mask_ratio=masked_share(
            config.mask_design,
            config.num_samples // config.masks_per_level,
            getattr(config, "num_replicates", 1),
            # A longer response is refused, but after this.
            length=min(response_length, config.max_length),
        ),
        max_tokens_per_pack=config.max_tokens_per_pack,
        gradient_mode=gradient_mode,
        is_linear=is_linear,
        whole_batches=whole_batches,
        lora_rank=model_args.lora_r if model_args.use_peft else 0,
        lora_targets=None if targets is None else tuple(targets),
        reference=_reference(model_args, config) if has_reference else "none",
        share_trunk=getattr(config, "share_trunk", None) is not False,
        train_top_layers=config.train_top_layers,
        gradient_checkpointing=checkpoints(config),
        weight_bytes=_weight_bytes(model_args),
        quantized_bytes=quantization.bytes_per_weight,
        compute_bytes=compute_bytes,
    )


def _reference(model_args: ModelArguments, config: DiffusionConfig) -> str:
    if config.precompute_ref_log_probs:
        return "precomputed"
    if config.sync_ref_model:
        return "synced"
    return "adapter" if model_args.use_peft else "model"


def _machine(args: PlanArguments, asked: str | None) -> Machine:
    """asked: the engine that the training's own fields ask for."""
    if asked is not None and args.engine not in (None, asked):
        raise ValueError(f"engine={args.engine}, but fsdp or deepspeed of the training ask for {asked}")
    if asked is not None and args.num_gpus == 1:
        raise ValueError(f"fsdp or deepspeed of the training ask for {asked}: give num_gpus, at least 2")
    return Machine(
        num_gpus=args.num_gpus,
        engine=args.engine or asked or ("single" if args.num_gpus == 1 else "fsdp2"),
        gpus_per_node=args.gpus_per_node,
        gpu_memory=args.gpu_memory,
        matmul_tflops=args.matmul_tflops,
        copy_bandwidth=args.copy_bandwidth,
        link_bandwidth=args.link_bandwidth,
        network_bandwidth=args.network_bandwidth,
    )


def plan_text(found: Plan, changes: list[tuple[str, Plan]], not_modelled: Sequence[str] = ()) -> str:
    """What is printed: sizes, memory, arithmetic, time, and advice."""
    shape, setup, machine = found.shape, found.setup, found.machine
    mode = "replay" if setup.replays else "in one pass" if setup.is_cut else "joint"
    unit = "pairs" if setup.num_sides == 2 else "examples"
    lines = [
        f"model      {shape.total_parameters / 1e9:.2f} B weights, a token meets "
        f"{shape.active_parameters / 1e9:.2f} B",
        f"step       {setup.pairs_per_step} {unit}, K = {setup.num_samples}, {setup.pair_tokens} tokens "
        f"each, packs of {setup.pack_tokens}, {mode}",
        f"machine    {machine.num_gpus} x {machine.gpu_memory:.1f} GiB, {machine.engine}",
        "",
        "Every figure below is modelled.",
        *(f"Not in it: {what}." for what in not_modelled),
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
