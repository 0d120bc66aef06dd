"""rotary: checks, backend choice, registration with torch.library."""

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.backend import availability, choose, reasons_against, reasons_against_float32
from vrpo_kernels.rotary import reference


def _choose(query: Tensor, requested: str) -> str:
    device, dtype = query.device.type, query.dtype
    if requested in ("auto", "cpu") and device == "cpu":
        reasons = reasons_against_float32("rotary", device=device, dtype=dtype)
        if reasons and requested == "cpu":
            raise ValueError("rotary: backend 'cpu' cannot run because " + "; and because ".join(reasons))
        return "reference" if reasons else "cpu"
    if requested == "auto":  # the formula has the same bits, and costs time but no memory that lasts
        reasons = reasons_against("triton", device=device, dtype=dtype, available=availability())
        return "reference" if reasons else "triton"
    return choose("rotary", device=device, dtype=dtype, requested=requested)


def _by_formula(
    query_BHLd: Tensor, key_BHLd: Tensor, cos_BLh: Tensor, sin_BLh: Tensor
) -> tuple[Tensor, Tensor]:
    query, key = (reference.rotary(heads, cos_BLh, sin_BLh) for heads in (query_BHLd, key_BHLd))
    return tuple(heads.transpose(1, 2).contiguous().transpose(1, 2) for heads in (query, key))


@torch.library.custom_op("vrpo_kernels::rotary", mutates_args=())
def _rotary(
    query_BHLd: Tensor, key_BHLd: Tensor, cos_BLh: Tensor, sin_BLh: Tensor, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """(query, key) turned, or turned back; fresh memory laid out as (B, L, heads, d)."""
    name = _choose(query_BHLd, backend)
    if name == "triton":
        from vrpo_kernels.rotary import kernel

        return kernel.rotary(query_BHLd, key_BHLd, cos_BLh, sin_BLh, inverse)
    if name == "cpu":
        return torch.ops.vrpo.rotary(query_BHLd, key_BHLd, cos_BLh, sin_BLh, inverse)
    return _by_formula(query_BHLd, key_BHLd, cos_BLh, -sin_BLh if inverse else sin_BLh)


@_rotary.register_fake
def _(query_BHLd, key_BHLd, cos_BLh, sin_BLh, inverse, backend):
    return tuple(
        heads.new_empty([heads.shape[i] for i in (0, 2, 1, 3)]).transpose(1, 2)
        for heads in (query_BHLd, key_BHLd)
    )


def _setup_context(ctx, inputs, output):
    _query, _key, cos_BLh, sin_BLh, ctx.inverse, ctx.backend = inputs
    ctx.save_for_backward(cos_BLh, sin_BLh)


def _autograd_backward(ctx, dquery_BHLd, dkey_BHLd):
    """A rotation is orthogonal: its transpose turns back."""
    turned = _rotary(dquery_BHLd, dkey_BHLd, *ctx.saved_tensors, not ctx.inverse, ctx.backend)
    return *turned, None, None, None, None


_rotary.register_autograd(_autograd_backward, setup_context=_setup_context)


def rotary(
    query_BHLd: Tensor, key_BHLd: Tensor, cos_BLh: Tensor, sin_BLh: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Queries and keys turned by the angles of their positions (RoPE, the two halves of a head paired).

        out_i = x_i cos_i - x_{i+h} sin_i,   out_{i+h} = x_{i+h} cos_i + x_i sin_i,   i < h = d / 2

    Args:
        query_BHLd: (B, heads, L, d) float32, bfloat16 or float16 (float64: reference only), d even; any
            strides. Views (B, L, heads, d).transpose(1, 2) of a projection with contiguous heads are read
            where they lie.
        key_BHLd: (B, key heads, L, d), same dtype and device.
        cos_BLh, sin_BLh: (B, L, d / 2) float32, constants: they get no gradient.
        backend: "auto" (triton on CUDA where it can run, cpu for float32 on the CPU, else reference),
            "triton", "cpu" or "reference".
    Returns:
        (query, key), shapes and dtypes as given, as transposed views of contiguous (B, L, heads, d).
    Numerics:
        Products and sum in float32 (three roundings), then rounded to the dtype once; backward likewise.
        Bitwise the same with and without gradients, from run to run and across backends.
    Differentiation: in query and key, as often as wanted, in every mode and under every `torch.func`
        transform.
    Errors:
        ValueError naming the argument, what it got and what it needs, or every reason against a requested
        backend; and for cos_BLh or sin_BLh that require a gradient.
    Source: arXiv 2104.09864, section 3.2.2; pairing and precision as modeling_llada.py of
        GSAI-ML/LLaDA-8B-Instruct (rope_full_precision).
    """
    for name, heads in (("query_BHLd", query_BHLd), ("key_BHLd", key_BHLd)):
        checks.require_plain(name, heads)
        checks.require_floating(name, heads)
        if heads.dim() != 4 or heads.shape[-1] % 2:
            raise ValueError(f"{name} must be (B, heads, L, d) with d even, got shape {tuple(heads.shape)}")
    checks.require_same("dtype", "query_BHLd", query_BHLd.dtype, "key_BHLd", key_BHLd.dtype)
    batch, _, length, size = query_BHLd.shape
    of_key = (key_BHLd.shape[0], *key_BHLd.shape[2:])
    checks.require_same("(B, L, d)", "query_BHLd", (batch, length, size), "key_BHLd", of_key)
    wide = torch.promote_types(query_BHLd.dtype, torch.float32)
    for name, part in (("cos_BLh", cos_BLh), ("sin_BLh", sin_BLh)):
        checks.require_plain(name, part)
        if part.shape != (batch, length, size // 2) or part.dtype not in (torch.float32, wide):
            raise ValueError(
                f"{name} must be (B, L, d / 2) = {(batch, length, size // 2)} float32, got "
                f"{tuple(part.shape)} {part.dtype}"
            )
    for name, tensor in (("key_BHLd", key_BHLd), ("cos_BLh", cos_BLh), ("sin_BLh", sin_BLh)):
        checks.require_same("device", name, tensor.device, "query_BHLd", query_BHLd.device)
    if autograd.is_transformed():  # torch.func takes plain PyTorch; the bits are the same
        if not torch.compiler.is_compiling():  # which cannot trace the question whether Triton interprets
            _choose(query_BHLd, backend)
        return _by_formula(query_BHLd, key_BHLd, cos_BLh, sin_BLh)
    autograd.require_constant("rotary", "cos_BLh", cos_BLh)
    autograd.require_constant("rotary", "sin_BLh", sin_BLh)
    return _rotary(query_BHLd, key_BHLd, cos_BLh, sin_BLh, False, backend)
