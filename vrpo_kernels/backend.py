"""Which backend runs an op: one pure decision, and the facts it is decided from.

The only place that probes for optional parts (the C++ extension, Triton). Nothing here touches tensors' data.
"""

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")
BACKENDS = ("triton", "cpu", "reference")
_FUSED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Availability:
    """Why a backend cannot run in this process; None means that it can.

    Attributes:
        triton: reason the Triton package is missing, or None.
        cpu: reason the C++ extension `vrpo_kernels._C` is missing, or None.
        interpreted: True if Triton runs its kernels in its CPU interpreter; None to ask Triton when needed.
    """

    triton: str | None
    cpu: str | None
    interpreted: bool | None = None


def _probe_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed"
    return None


def _probe_extension() -> str | None:
    if importlib.util.find_spec("vrpo_kernels._C") is None:
        return (
            "the C++ extension vrpo_kernels._C was not built (no C++ compiler or no torch when the "
            "package was installed); run `pip install --no-build-isolation -e .` with both present"
        )
    try:
        importlib.import_module("vrpo_kernels._C")
    except (ImportError, OSError) as error:  # built against another torch or Python
        return f"the C++ extension vrpo_kernels._C does not load: {error}"
    return None


# Settled at import, so that torch.compile can trace `choose`. Loading the extension registers its ops under
# torch.ops.vrpo and does nothing else; Triton is not imported.
_AVAILABLE = Availability(triton=_probe_triton(), cpu=_probe_extension())


def _is_interpreted(available: Availability) -> bool:
    if available.interpreted is not None:
        return available.interpreted
    if available.triton is not None:
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def extension_loaded() -> bool:
    """True if the C++ extension is there and its ops are registered."""
    return _AVAILABLE.cpu is None


def availability() -> Availability:
    """Which backends exist in this process."""
    return dataclasses.replace(_AVAILABLE, interpreted=_is_interpreted(_AVAILABLE))


def reasons_against(
    backend: str, *, device: str, dtype: torch.dtype | None, available: Availability
) -> list[str]:
    """Every reason why `backend` cannot run on tensors of this device type and dtype; empty if it can.

    Args:
        backend: one of BACKENDS.
        device: device type of the tensors, such as "cpu" or "cuda".
        dtype: floating dtype of the data, or None for ops on integers.
        available: the facts, from `availability()`.
    """
    if backend == "reference":
        return []
    reasons = []
    missing = getattr(available, backend)
    if missing is not None:
        reasons.append(missing)
    if dtype is not None and dtype not in _FUSED_DTYPES:
        reasons.append(f"it computes float32, bfloat16 and float16, not {dtype}")
    if backend == "cpu" and device != "cpu":
        reasons.append(f"it needs tensors on the CPU, not on {device}")
    if backend == "triton" and device != "cuda":
        if not (device == "cpu" and _is_interpreted(available)):
            reasons.append(f"it needs tensors on a CUDA device (or Triton's interpreter), not on {device}")
        elif dtype is torch.bfloat16:
            reasons.append("Triton's interpreter multiplies bfloat16 wrongly")
    return reasons


def reasons_against_float32(op: str, *, device: str, dtype: torch.dtype) -> list[str]:
    """`reasons_against` the C++ backend for an op whose C++ form computes float32 only.

    Args: op: its name under torch.ops.vrpo; an extension built from older sources has none.
    """
    reasons = reasons_against("cpu", device=device, dtype=None, available=_AVAILABLE)
    if not reasons and not hasattr(torch.ops.vrpo, op):
        reasons.append(
            f"the C++ extension vrpo_kernels._C was built from older sources, without {op}; run "
            "`pip install --no-build-isolation -e .` again"
        )
    if dtype is not torch.float32:
        reasons.append(f"it computes float32, not {dtype}")
    return reasons


def choose(
    op: str,
    *,
    device: str,
    dtype: torch.dtype | None,
    requested: str = "auto",
    available: Availability | None = None,
) -> str:
    """The backend that runs `op`: "triton", "cpu" or "reference".

    A pure function of its arguments. "auto" takes triton on CUDA and cpu on the CPU; where the C++ extension
    does not exist, and for float64 (which only the formula computes), it takes reference. A CUDA tensor
    without
    Triton raises: the formula would need the memory these ops exist to save, so it has to be asked for.

    Args:
        op: name of the op, used in messages.
        device: device type of the tensors.
        dtype: floating dtype of the data, or None for ops on integers.
        requested: "auto", "triton", "cpu" or "reference".
        available: facts to decide from; the process's own when None.
    Errors:
        ValueError for an unknown name, or listing every reason why the requested backend cannot run.
    """
    if requested not in ("auto", *BACKENDS):
        raise ValueError(f"{op}: backend must be one of {('auto', *BACKENDS)}, got {requested!r}")
    facts = _AVAILABLE if available is None else available
    wanted = requested
    if requested == "auto":
        if dtype is torch.float64:
            return "reference"
        if device == "cpu":
            return "reference" if facts.cpu is not None else "cpu"
        wanted = "triton"
    reasons = reasons_against(wanted, device=device, dtype=dtype, available=facts)
    if reasons:
        raise ValueError(f"{op}: backend {wanted!r} cannot run because " + "; and because ".join(reasons))
    return wanted


def on_device(launcher: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorates a function that launches Triton kernels: they run on the device of its first tensor.

    Triton launches on the *current* device, which under `device_map` need not be the one the tensors are on.
    """

    @functools.wraps(launcher)
    def guarded(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        first = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        with torch.cuda.device_of(first):  # nothing for tensors on the CPU
            return launcher(*args, **kwargs)

    return guarded


def describe() -> dict[str, str]:
    """One line per backend for `vrpo env`: what is there, or what was lost and why."""
    facts = availability()
    cpu = facts.cpu or "built and loaded"
    if facts.cpu is not None:
        cpu += "; CPU tensors use the slower reference backend"
    if facts.triton is not None:
        triton = facts.triton
    elif facts.interpreted:
        triton = "interpreted on the CPU (for tests; slow)"
    elif not torch.cuda.is_available():
        triton = "installed, but torch sees no CUDA device"
    else:
        triton = f"runs on {torch.cuda.get_device_name()}"
    return {"triton": triton, "cpu": cpu, "reference": "plain PyTorch, always there"}
