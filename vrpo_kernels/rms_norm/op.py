"""rms_norm: checks, backend choice, registration with torch.library."""

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.backend import reasons_against_float32
from vrpo_kernels.rms_norm import reference

# Settled at import: torch.compile traces `_choose`.
_RUNS = not reasons_against_float32("rms_norm_forward", device="cpu", dtype=torch.float32)


def _choose(hidden: Tensor, weight: Tensor, requested: str) -> str:
    if requested not in ("auto", "cpu", "reference"):
        raise ValueError(f"rms_norm: backend must be 'auto', 'cpu' or 'reference', got {requested!r}")
    are_float32 = hidden.dtype == weight.dtype == torch.float32
    if requested == "auto":
        return "cpu" if _RUNS and hidden.device.type == "cpu" and are_float32 else "reference"
    if requested == "reference":
        return requested
    reasons = reasons_against_float32("rms_norm_forward", device=hidden.device.type, dtype=hidden.dtype)
    if weight.dtype != hidden.dtype:
        reasons.append(f"it needs a weight of {hidden.dtype}, not {weight.dtype}")
    if reasons:
        raise ValueError("rms_norm: backend 'cpu' cannot run because " + "; and because ".join(reasons))
    return requested


def _rows(hidden: Tensor) -> Tensor:
    return hidden.contiguous().view(-1, hidden.shape[-1])


# In the shape of the caller, so that what is saved for backward is the caller's own tensor.
@torch.library.custom_op("vrpo_kernels::rms_norm_forward", mutates_args=())
def _forward(hidden: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(out, rstd_N) of the N rows, rstd = 1 / sqrt(mean(x^2) + eps)."""
    out_ND, rstd_N = torch.ops.vrpo.rms_norm_forward(_rows(hidden), weight_D, eps)
    return out_ND.view(hidden.shape), rstd_N


@_forward.register_fake
def _(hidden, weight_D, eps):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.numel() // hidden.shape[-1])


@torch.library.custom_op("vrpo_kernels::rms_norm_backward", mutates_args=())
def _backward(dout: Tensor, hidden: Tensor, weight_D: Tensor, rstd_N: Tensor) -> tuple[Tensor, Tensor]:
    """(dhidden, dweight_D)."""
    dx_ND, dweight_D = torch.ops.vrpo.rms_norm_backward(_rows(dout), _rows(hidden), weight_D, rstd_N)
    return dx_ND.view(hidden.shape), dweight_D


@_backward.register_fake
def _(dout, hidden, weight_D, rstd_N):
    return hidden.new_empty(hidden.shape), hidden.new_empty(hidden.shape[-1])


def _setup_context(ctx, inputs, output):
    hidden, weight_D, _eps = inputs
    _out, rstd_N = output
    ctx.mark_non_differentiable(rstd_N)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight_D, rstd_N)


def _autograd_backward(ctx, saved, dout, _drstd_N):
    if dout is None:
        return None, None, None
    gradients = _backward(dout, *saved)
    wanted = zip(gradients, ctx.needs_input_grad, strict=False)
    return *(gradient if is_wanted else None for gradient, is_wanted in wanted), None


_fused = autograd.register(
    _forward,
    "rms_norm",
    autograd.once_differentiable("rms_norm", _autograd_backward),
    _setup_context,
)
autograd.register_loop(_backward)


def rms_norm(hidden: Tensor, weight: Tensor, *, eps: float, backend: str = "auto") -> Tensor:
    """Each row divided by its root mean square, times a weight.

        out = weight * (x / sqrt(mean(x^2) + eps))

    Args:
        hidden: (..., D) float32 (other floating dtypes: reference only).
        weight: (D,), on the same device.
        eps: > 0 keeps rows of zeros finite.
        backend: "auto" (cpu for float32 on the CPU, else reference), "cpu" or "reference".
    Returns:
        shape of hidden; its dtype where the weight's is the same.
    Numerics:
        The mean in fp32, the quotient rounded before it meets the weight. Bitwise the same with and without
        gradients, from run to run and for any number of threads: the gradient of the weight is summed over 64
        rows at a time, and these sums in order.
    Differentiation:
        Differentiable in both: once, in reverse mode, `torch.func` and vmap included; backend "reference" as
        often as wanted and in forward mode.
    Errors:
        ValueError naming the argument, what it got and what it needs, or every reason against a requested
        backend.
    """
    checks.require_floating("hidden", hidden)
    checks.require_floating("weight", weight)
    if hidden.dim() < 1 or weight.dim() != 1 or weight.shape[0] != hidden.shape[-1]:
        raise ValueError(
            f"hidden must be (..., D) and weight (D,), got {tuple(hidden.shape)} and {tuple(weight.shape)}"
        )
    checks.require_same("device", "hidden", hidden.device, "weight", weight.device)
    if _choose(hidden, weight, backend) == "reference" or not hidden.numel():
        return reference.rms_norm(hidden, weight, eps)
    return _fused(hidden, weight, eps)[0]
