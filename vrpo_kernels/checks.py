"""Argument checks of the public ops: one wording, no casts, no copies."""

import torch
from torch import Tensor


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def require_plain(name: str, tensor: Tensor) -> None:
    """Reject DTensors: their local shard has another shape than the tensor says."""
    if hasattr(tensor, "placements"):  # DTensor, without importing torch.distributed.tensor
        raise ValueError(
            f"{name} is a sharded DTensor; pass the gathered tensor (`.full_tensor()`, or call the "
            "module that owns it so that FSDP gathers it), or use vocab_parallel_linear_cross_entropy for a "
            "sharded head"
        )


def require_dim(name: str, tensor: Tensor, *axes: str) -> None:
    """Require as many dimensions as there are axis names, such as "N", "D"."""
    if tensor.dim() != len(axes):
        raise ValueError(f"{name} must have shape ({', '.join(axes)}), got {_describe(tensor)}")


def require_floating(name: str, tensor: Tensor) -> None:
    """Require float32, bfloat16, float16 or float64."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {_describe(tensor)}")


def require_int64(name: str, tensor: Tensor) -> None:
    """Require dtype int64."""
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {_describe(tensor)}")


def require_same(what: str, name_a: str, a: object, name_b: str, b: object) -> None:
    """Require two facts (sizes, dtypes, devices) to be equal, naming both."""
    if a != b:
        raise ValueError(f"{name_a} and {name_b} must have the same {what}, got {a} and {b}")


def require_head(hidden: Tensor, weight: Tensor, targets: Tensor) -> None:
    """The contract of a linear head: hidden (N, D), weight (V, D), targets (N,) int64, one dtype, one
    device.
    """
    for name, tensor in (("hidden", hidden), ("weight", weight), ("targets", targets)):
        require_plain(name, tensor)
    require_dim("hidden", hidden, "N", "D")
    require_dim("weight", weight, "V", "D")
    require_dim("targets", targets, "N")
    require_floating("hidden", hidden)
    require_int64("targets", targets)
    require_same("dtype", "hidden", hidden.dtype, "weight", weight.dtype)
    require_same("size D", "hidden", hidden.shape[1], "weight", weight.shape[1])
    require_same("size N", "hidden", hidden.shape[0], "targets", targets.shape[0])
    require_same("device", "hidden", hidden.device, "weight", weight.device)
    require_same("device", "hidden", hidden.device, "targets", targets.device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row (V >= 1), got {_describe(weight)}")
