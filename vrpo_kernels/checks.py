"""Argument checks of the public ops: one wording, no casts, no copies; and when values are looked at."""

import math

import torch
from torch import Tensor

from vrpo_kernels import autograd

_debug = False


class set_debug:
    """Have every op look at the values of its index arguments (targets, rows, offsets), on every device.

    On the CPU that is always done, because it costs next to nothing: a bad value is a ValueError that names
    the argument, the value and its row. On a GPU the host would have to wait for the device, so by default
    nobody looks: a bad value makes NaN of the results it enters, and nothing out of bounds is read or
    written. In debug mode the same ValueErrors are raised there too, at the price of one synchronisation per
    op and call. Results do not change. The switch belongs to the process; values are never looked at while
    `torch.compile` traces, under `torch.func.vmap`, or in a CUDA graph's capture, where there is none to see.

        vrpo_kernels.set_debug(True)             # from here on
        with vrpo_kernels.set_debug(True): ...   # inside the block

    Args: mode: True switches the mode on, False off.
    """

    def __init__(self, mode: bool) -> None:
        global _debug
        self._before, _debug = _debug, bool(mode)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        global _debug
        _debug = self._before


def values_are_checked(device: torch.device) -> bool:
    """True where an op looks at the values of its index arguments: on the CPU, elsewhere in debug mode.

    False wherever there are no values to look at: while torch.compile or make_fx trace, for fake tensors,
    under `torch.func.vmap` and while a CUDA graph is captured.
    """
    if torch.compiler.is_compiling():
        return False
    if device.type == "meta" or (device.type != "cpu" and not _debug):
        return False
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return not _traced()


def _traced() -> bool:
    """Whether tensors stand for values that are not known here."""
    keys = torch._C._TorchDispatchModeKey
    if any(torch._C._get_dispatch_mode(key) is not None for key in (keys.FAKE, keys.PROXY)):
        return True
    functorch = torch._C._functorch
    stack = functorch.get_interpreter_stack() or ()
    return any(level.key() == functorch.TransformType.Vmap for level in stack)


def _first_outside(index_N: Tensor, size: int) -> int | None:
    """Where the first index outside of [0, size) stands."""
    if not index_N.numel():
        return None
    lowest, highest = torch.aminmax(index_N)
    if int(lowest) >= 0 and int(highest) < size:
        return None
    return int(((index_N < 0) | (index_N >= size)).nonzero()[0, 0])


def require_targets(targets: Tensor, num_classes: int) -> None:
    """Require every target to lie in [0, V), naming the first row that breaks it. Reads values."""
    row = _first_outside(targets, num_classes)
    if row is not None:
        raise ValueError(
            f"targets must lie in [0, {num_classes}), got {int(targets[row])} in row {row}; leave rows "
            "without a target out"
        )


def known_targets(targets: Tensor, num_classes: int) -> Tensor:
    """targets (N,) for code that cannot take bad ones: -1 in their place, or ValueError where values are
    checked. In what torch.compile has traced, and under torch.func transforms, it looks at run time.
    """
    look = _known_op if autograd.is_managed() else _known
    return look(targets, num_classes)


def _known(targets: Tensor, num_classes: int) -> Tensor:
    if values_are_checked(targets.device):
        require_targets(targets, num_classes)
    return in_range(targets, num_classes)


_known_op = torch.library.custom_op("vrpo_kernels::known_targets", _known, mutates_args=())
_known_op.register_fake(lambda targets, num_classes: torch.empty_like(targets))
autograd.register_loop(_known_op)


def require_rows(name: str, row_N: Tensor, num_rows: int) -> None:
    """Require all different indices in [0, num_rows), naming the first that is not. Reads values."""
    place = _first_outside(row_N, num_rows)
    if place is not None:
        raise ValueError(f"{name} must lie in [0, {num_rows}), got {int(row_N[place])} at index {place}")
    count = torch.bincount(row_N, minlength=1)
    if int(count.max()) > 1:
        raise ValueError(f"{name} must be all different, got {int(count.argmax())} more than once")


def in_range(index: Tensor, size: int, otherwise: int = -1) -> Tensor:
    """A copy of the indices with `otherwise` in place of those outside of [0, size)."""
    return torch.where((index >= 0) & (index < size), index, otherwise)


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"


def require_plain(name: str, tensor: Tensor) -> None:
    """Reject tensors that are not one array of strided memory: DTensors (their local shard has another shape
    than the tensor says), nested and sparse ones.
    """
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if hasattr(tensor, "placements"):  # DTensor, without importing torch.distributed.tensor
        raise ValueError(
            f"{name} is a sharded DTensor; pass the gathered tensor (`.full_tensor()`, or call the "
            "module that owns it so that FSDP gathers it), or use vocab_parallel_linear_cross_entropy for a "
            "sharded head"
        )
    if tensor.is_nested or tensor.layout is not torch.strided:
        kind = "nested" if tensor.is_nested else str(tensor.layout)
        raise ValueError(f"{name} must be a dense, strided tensor, got a {kind} one")


def require_dim(name: str, tensor: Tensor, *axes: str) -> None:
    """Require a plain tensor with as many dimensions as there are axis names, such as "N", "D"."""
    require_plain(name, tensor)
    if tensor.dim() != len(axes):
        raise ValueError(f"{name} must have shape ({', '.join(axes)}), got {_describe(tensor)}")


def require_floating(name: str, tensor: Tensor) -> None:
    """Require a plain tensor of float32, bfloat16, float16 or float64."""
    require_plain(name, tensor)
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {_describe(tensor)}")


def require_int64(name: str, tensor: Tensor) -> None:
    """Require a plain tensor of dtype int64."""
    require_plain(name, tensor)
    if tensor.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {_describe(tensor)}")


def require_seed(seed: int) -> None:
    """Require a Philox key."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
        raise ValueError(f"seed must be an integer in [0, 2**64), got {seed!r}")


def require_same(what: str, name_a: str, a: object, name_b: str, b: object) -> None:
    """Require two facts (sizes, dtypes, devices) to be equal, naming both."""
    if a != b:
        raise ValueError(f"{name_a} and {name_b} must have the same {what}, got {a} and {b}")


def require_head(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None) -> None:
    """The contract of a linear head with targets: `require_linear`, and targets (N,) int64."""
    require_linear(hidden, weight, bias)
    require_dim("targets", targets, "N")
    require_int64("targets", targets)
    require_same("size N", "hidden", hidden.shape[0], "targets", targets.shape[0])
    require_same("device", "hidden", hidden.device, "targets", targets.device)


def require_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """hidden (N, D), weight (V, D), V >= 1, bias (V,) or None, one dtype, one device."""
    require_dim("hidden", hidden, "N", "D")
    require_dim("weight", weight, "V", "D")
    require_floating("hidden", hidden)
    require_same("dtype", "hidden", hidden.dtype, "weight", weight.dtype)
    require_same("size D", "hidden", hidden.shape[1], "weight", weight.shape[1])
    require_same("device", "hidden", hidden.device, "weight", weight.device)
    if weight.shape[0] == 0:
        raise ValueError(f"weight must have at least one row (V >= 1), got {_describe(weight)}")
    if bias is not None:
        require_dim("bias", bias, "V")
        require_same("dtype", "bias", bias.dtype, "weight", weight.dtype)
        require_same("size V", "bias", bias.shape[0], "weight", weight.shape[0])
        require_same("device", "bias", bias.device, "weight", weight.device)


_LEAST_FLOAT32, _LARGEST_FLOAT32 = 2.0**-126, torch.finfo(torch.float32).max


def logit_settings(softcap: float | None, scale: float) -> tuple[float, float]:
    """(softcap, 0 for None; scale), both checked: what turns hidden . weight + bias into logits."""
    for name, value in (("softcap", softcap), ("scale", scale)):
        if name == "softcap" and value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
            allowed = " or None" if name == "softcap" else ""
            raise ValueError(f"{name} must be a finite number > 0{allowed}, got {value!r}")
        if not _LEAST_FLOAT32 <= value <= _LARGEST_FLOAT32:  # the backends would compute with 0 or infinity
            raise ValueError(f"{name} must be a normal number of float32, 1.2e-38 to 3.4e38, got {value!r}")
    return 0.0 if softcap is None else float(softcap), float(scale)
