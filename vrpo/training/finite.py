"""No step on a gradient that is not finite, no such weight in a file: the checks, and what is left to use."""

import math
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
from vrpo.training.engine_checkpoints import engine_of
from vrpo.training.together import any_process

_CURE = "Lower learning_rate, or train in a wider dtype."


def not_finite(tensors: Iterable[tuple[str, Tensor | None]]) -> list[str]:
    """Names of the tensors that hold a NaN or an infinity; of one that is in parts the local one is read."""
    names, parts = [], []
    for name, tensor in tensors:
        if tensor is None or not tensor.is_floating_point():
            continue
        local = local_part(tensor)
        if local.numel():
            names.append(name)
            parts.append(local)
    if not names:
        return []
    if len({(part.dtype, part.device) for part in parts}) == 1:
        # All finite if their sums of squares are, which is quick to say; these overflow early, so that others
        # are looked at again.
        norms = torch.stack(torch._foreach_norm(parts))
        if bool(torch.isfinite(norms).all()):
            return []
    largest = [torch.linalg.vector_norm(part, float("inf")) for part in parts]
    finite = torch.stack([torch.isfinite(value).to(largest[0].device) for value in largest]).tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]


def _list(names: list[str]) -> str:
    shown = ", ".join(names[:3]) or "(in another process)"
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


class StopAtBadGradients(TrainerCallback):
    """FloatingPointError before an optimizer step whose gradient is not finite, clipped or not.

    Under fp16 the scale of the loss is lowered and the step left out where a gradient overflows: that is left
    alone. DeepSpeed steps in its backward pass; what it found is read afterwards.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if self.accelerator.scaler is not None:
            return
        if self.accelerator.distributed_type == DistributedType.DEEPSPEED:
            self._check_engine(args, state)
            return
        bad = not_finite((name, parameter.grad) for name, parameter in model.named_parameters())
        if any_process(bool(bad), self.accelerator):
            raise FloatingPointError(
                f"gradient is not finite at step {state.global_step}: {_list(bad)}. Training stopped before "
                f"the optimizer step; {last_good_checkpoint(args.output_dir)}. {_CURE}"
            )

    def _check_engine(self, args, state) -> None:
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        if engine.fp16_enabled():
            return
        # The norm of all processes' gradients, the same in each. -1 stands for one that is not finite.
        norm = engine.get_global_grad_norm()
        if engine.was_step_applied() and (norm is None or 0.0 <= float(norm) < math.inf):
            return
        taken = "took" if engine.was_step_applied() else "left out"
        raise FloatingPointError(
            f"gradient is not finite at step {state.global_step}. DeepSpeed {taken} the optimizer step, and "
            f"training stopped; {last_good_checkpoint(args.output_dir)}. {_CURE}"
        )


def check_weights(
    model: nn.Module, accelerator: Accelerator, step: int, output_dir: str, run_dir: str
) -> None:
    """FloatingPointError if a weight is not finite; called before anything is written to output_dir."""
    bad = not_finite(model.named_parameters())
    if any_process(bool(bad), accelerator):
        raise FloatingPointError(
            f"weights are not finite after step {step}: {_list(bad)}. Nothing was saved in {output_dir}; "
            f"{last_good_checkpoint(run_dir)}. {_CURE}"
        )


def last_good_checkpoint(run_dir: str) -> str:
    """A clause naming the newest checkpoint in run_dir whose weights are finite, or saying there is none."""
    for folder in checkpoints(run_dir):
        files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model*.safetensors")]
        if not files and engine_of(folder) in ("fsdp", "deepspeed"):
            return f"the last checkpoint is {folder}, whose weights were finite when they were saved"
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
        # One at a time: together they would be a whole file in memory.
        return not any(not_finite([(name, file.get_tensor(name))]) for name in file.keys())  # noqa: SIM118
