"""How a test starts each engine on CPUs with gloo: what a process sets, and the arguments that go with it.

On accelerators `fsdp=True` or `deepspeed=...` is all; on the CPU accelerate takes neither unless the state of
the process is made beforehand. DeepSpeed would compile a shared-memory collective at its first start; gloo
does without.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
_SWITCHES = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


def launch(*groups: tuple[Any, ...]) -> None:
    """Run (number of processes, script of this folder, arguments...), one group after the other.

    Fails with what they said, and where they do not end.
    """
    command = [sys.executable, str(HERE / "forked.py")]
    for number, group in enumerate(groups):
        command += [*(["--"] if number else []), *map(str, group)]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(str(HERE.parents[level]) for level in (1, 0)) + os.pathsep + str(HERE),
    }
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]


def use(engine: str, *, is_universal: bool = False, **settings: Any) -> dict[str, Any]:
    """Make this process one of the engine's; the arguments of a trainer's configuration on it.

    is_universal: DeepSpeed loads checkpoints in its universal form.
    settings: of fsdp_config, or of DeepSpeed's zero_optimization.
    """
    import transformers.training_args
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    AcceleratorState._reset_state(reset_partial_state=True)
    unset_hf_deepspeed_config()
    for name in _SWITCHES:
        os.environ.pop(name, None)
    if engine == "ddp":
        return {"use_cpu": True}
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True  # asked unless use_cpu is set
    configured = {"use_cpu": False, "accelerator_config": {"use_configured_state": True}}
    if engine == "fsdp2":
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        PartialState(backend="gloo").distributed_type = DistributedType.MULTI_GPU
        return {**configured, "fsdp": True, "fsdp_config": {"version": 2, **settings}}
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    PartialState(backend="gloo")
    deepspeed_config = zero(int(engine[-1]), **settings)
    if is_universal:
        deepspeed_config["checkpoint"] = {"load_universal": True}
    return {**configured, "deepspeed": deepspeed_config}


def zero(stage: int, **settings: Any) -> dict[str, Any]:
    """A DeepSpeed configuration that leaves everything else to the trainer's arguments."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {"stage": stage, **settings},
    }
