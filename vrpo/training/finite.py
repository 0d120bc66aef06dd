"""No step on a gradient that is not finite, no such weight in a file: the checks, and what is left to use."""

from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import TrainerCallback

from vrpo.models.partitioned import local_part
from vrpo.training.checkpoints import checkpoints


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; of one that is in parts the local one is read."""
    names, largest = [], []
    for name, tensor in tensors:
        if tensor is None or not tensor.is_floating_point():
            continue
        local = local_part(tensor)
        if local.numel():
            names.append(name)
            # Of the largest magnitude and not of a sum of squares, which overflows early.
            largest.append(torch.linalg.vector_norm(local, float("inf")))
    if not names:
        return []
    finite = torch.stack([torch.isfinite(value).to(largest[0].device) for value in largest]).tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]


def _anywhere(bad: list[str], accelerator: Accelerator) -> bool:
    """Whether any process found something: all must stop together, or the others wait for ever."""
    if accelerator.num_processes == 1:
        return bool(bad)
    count = torch.tensor(float(len(bad)), device=accelerator.device)
    return float(accelerator.reduce(count, reduction="sum")) > 0


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "(in another process)"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class StopAtBadGradients(TrainerCallback):
    """FloatingPointError before an optimizer step whose gradient is not finite, clipped or not.

    Under fp16 autocast the gradient scaler expects overflows, skips the step and lowers its scale; DeepSpeed
    keeps gradients to itself. Both are left alone.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if (
            self.accelerator.scaler is not None
            or self.accelerator.distributed_type == DistributedType.DEEPSPEED
        ):
            return
        bad = not_finite((name, parameter.grad) for name, parameter in model.named_parameters())
        if _anywhere(bad, self.accelerator):
            raise FloatingPointError(
                f"gradient is not finite at step {state.global_step}: {_list(bad)}. Training stopped before "
                f"the optimizer step; {last_good_checkpoint(args.output_dir)}. Lower learning_rate, or train "
                "in a wider dtype."
            )


def check_weights(
    model: nn.Module, accelerator: Accelerator, step: int, output_dir: str, run_dir: str
) -> None:
    """FloatingPointError if a weight is not finite; called before anything is written to output_dir."""
    bad = not_finite(model.named_parameters())
    if _anywhere(bad, accelerator):
        raise FloatingPointError(
            f"weights are not finite after step {step}: {_list(bad)}. Nothing was saved in {output_dir}; "
            f"{last_good_checkpoint(run_dir)}. Lower learning_rate, or train in a wider dtype."
        )


def last_good_checkpoint(run_dir: str) -> str:
    """A clause naming the newest checkpoint in run_dir whose weights are finite, or saying there is none."""
    for folder in checkpoints(run_dir):
        files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")]
        if not files:
            continue
        try:
            if all(_file_is_finite(path) for path in files):
                return f"the last checkpoint with finite weights is {folder}"
        except (SafetensorError, OSError):  # cut short by a crash: nothing to resume from
            continue
    return f"{run_dir} holds no checkpoint with finite weights"


def _file_is_finite(path: Path) -> bool:
    with safe_open(path, framework="pt") as file:
        return not not_finite((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118
