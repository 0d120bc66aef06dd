"""Whether the processes that a run was started as are the ones that its arguments ask for.

accelerate falls back where the two do not fit: to DistributedDataParallel, to one process, or to as many runs
as there are processes. Nothing says so, and the weights look plausible. Here each of these is an error that
tells how to launch.
"""

from accelerate.utils import DistributedType, get_int_from_env, parse_flag_from_env
from transformers import TrainingArguments

_SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_SLURM = ("SLURM_NTASKS", "SLURM_STEP_NUM_TASKS")
_SRUN = (
    "Start one torchrun a node: srun --ntasks-per-node=1 torchrun --nnodes $SLURM_NNODES --nproc_per_node "
    "<GPUs> --rdzv_backend c10d --rdzv_endpoint <first node>:29500 -m vrpo train --config <file>"
)
_TORCHRUN = "torchrun --nproc_per_node <GPUs> -m vrpo train --config <file>"


def check_engine(args: TrainingArguments) -> None:
    """ValueError where engines are asked for that exclude each other, or a CPU; before any is set up."""
    wanted = {
        "fsdp": _names("fsdp", args.fsdp, "ACCELERATE_USE_FSDP"),
        "deepspeed": _names("deepspeed", args.deepspeed, "ACCELERATE_USE_DEEPSPEED"),
    }
    if wanted["fsdp"] and wanted["deepspeed"]:
        raise ValueError(
            f"{wanted['fsdp']} and {wanted['deepspeed']} are two engines for one model: keep one of them, in "
            "the arguments or in the configuration that accelerate launch reads"
        )
    for flag, name in (
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "a parallelism_config"),
    ):
        if parse_flag_from_env(flag):
            raise ValueError(
                f"accelerate's configuration asks for {name}, which is not supported: use DDP, FSDP or "
                "DeepSpeed"
            )
    if args.ddp_backend is not None and max(get_int_from_env([name], 1) for name in _SIZES) == 1:
        raise ValueError(
            f"ddp_backend={args.ddp_backend!r} is how several processes talk, and this run is one: launch it "
            "with torchrun or accelerate launch, or leave ddp_backend out"
        )
    for name in filter(None, wanted.values()):
        if args.use_cpu or parse_flag_from_env("ACCELERATE_USE_CPU"):
            raise ValueError(
                f"{name} does nothing with use_cpu=True: accelerate would run under DDP, or in one "
                "process. Leave use_cpu out on a machine with GPUs, or train under DDP on CPUs"
            )


def check_launch(args: TrainingArguments) -> None:
    """ValueError where this run has other processes than its arguments ask for, or batches that differ."""
    launched = max(get_int_from_env([name], 1) for name in _SIZES)
    if launched > args.world_size:
        cure = "Set use_cpu=True" if args.device.type == "cpu" else "Launch with torchrun, or accelerate"
        raise ValueError(
            f"{launched} processes were launched, and this one trains by itself: each would write the same "
            f"output_dir. {cure} to make them one run, or unset {'/'.join(_SIZES)} to train in one process"
        )
    _check_slurm()
    _check_fsdp(args)
    kind = args.distributed_state.distributed_type
    wants_deepspeed = _names("deepspeed", args.deepspeed, "ACCELERATE_USE_DEEPSPEED")
    if wants_deepspeed and kind != DistributedType.DEEPSPEED:
        raise ValueError(
            f"{wants_deepspeed} needs a launcher, also for one process, and this run has none: {_TORCHRUN}, "
            "or accelerate launch"
        )
    if args.world_size > 1:
        for name, needed in (("even_batches", True), ("split_batches", False)):
            if getattr(args.accelerator_config, name) != needed:
                raise ValueError(
                    f"accelerator_config: {name} must be {needed} with {args.world_size} processes: they "
                    "wait for each other in every batch, so all need as many, of "
                    "per_device_train_batch_size each"
                )


def _check_slurm() -> None:
    """ValueError where SLURM has tasks that nothing joins: srun alone is no launcher of torch's.

    torchrun and accelerate set WORLD_SIZE; the number of torchruns that know each other is GROUP_WORLD_SIZE.
    """
    in_step = get_int_from_env(["SLURM_STEP_NUM_TASKS"], 0)
    tasks = in_step or get_int_from_env(["SLURM_NTASKS"], 1)
    if tasks == 1:
        return
    is_launched = any(get_int_from_env([name], 0) for name in _SIZES)
    if not is_launched:
        what = (
            f"srun started {tasks} tasks, and each would train by itself and write the same output_dir"
            if in_step
            else f"the SLURM allocation has {tasks} tasks, and this process would train by itself"
        )
        raise ValueError(f"{what}. {_SRUN}; or unset {'/'.join(_SLURM)} to train in one process")
    groups = get_int_from_env(["GROUP_WORLD_SIZE"], 0)
    if in_step and 0 < groups < tasks:
        raise ValueError(
            f"srun started {tasks} tasks, and the torchrun of this one knows of {groups}: each would train "
            f"by itself and write the same output_dir. {_SRUN}"
        )


def _check_fsdp(args: TrainingArguments) -> None:
    name = _names("fsdp", args.fsdp, "ACCELERATE_USE_FSDP")
    if not name:
        return
    if args.world_size == 1:
        raise ValueError(
            f"{name} shards a model over several processes, and this run is one: launch it with {_TORCHRUN} "
            "or accelerate launch, or leave fsdp out"
        )
    if args.distributed_state.distributed_type == DistributedType.MULTI_CPU:
        raise ValueError(f"{name} does nothing on CPUs: accelerate would run under DDP")


def _names(name: str, value: object, flag: str) -> str:
    """The argument, or accelerate's setting, that asks for an engine; empty where neither does."""
    if value:
        return f"{name}={value!r}" if isinstance(value, str | bool) else name
    return f"{flag}=true (accelerate's configuration)" if parse_flag_from_env(flag) else ""
