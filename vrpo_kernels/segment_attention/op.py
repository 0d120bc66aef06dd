"""segment_attention: checks, backend choice, registration with torch.library."""

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.backend import reasons_against_float32
from vrpo_kernels.segment_attention import reference


def reasons_against(device: str, dtype: torch.dtype) -> list[str]:
    """Every reason why the C++ backend cannot run on this device type and dtype; empty if it can."""
    return reasons_against_float32("segment_attention_forward", device=device, dtype=dtype)


def _choose(query: Tensor, requested: str) -> str:
    if requested not in ("auto", "cpu", "reference"):
        raise ValueError(
            f"segment_attention: backend must be 'auto', 'cpu' or 'reference', got {requested!r}; on a GPU "
            "take torch.nn.attention.varlen or flash-attn"
        )
    if requested == "reference":
        return requested
    reasons = reasons_against(query.device.type, query.dtype)
    if reasons and requested == "cpu":
        raise ValueError(
            "segment_attention: backend 'cpu' cannot run because " + "; and because ".join(reasons)
        )
    return "reference" if reasons else "cpu"


def _with_unit_stride(heads: Tensor) -> Tensor:
    return heads if heads.stride(-1) == 1 else heads.contiguous()


@torch.library.custom_op("vrpo_kernels::segment_attention_forward", mutates_args=())
def _forward(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, cu_seqlens_S1: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out_THd, softmax_2HT); see `cpu.forward`."""
    from vrpo_kernels.segment_attention import cpu

    heads = map(_with_unit_stride, (query_THd, key_THd, value_THd))
    return cpu.forward(*heads, cu_seqlens_S1, scale)


@_forward.register_fake
def _(query_THd, key_THd, value_THd, cu_seqlens_S1, scale):
    num_tokens, num_heads, _ = query_THd.shape
    out_THd = torch.empty(query_THd.shape, dtype=query_THd.dtype, device=query_THd.device)
    return out_THd, query_THd.new_empty(2, num_heads, num_tokens)


@torch.library.custom_op("vrpo_kernels::segment_attention_backward", mutates_args=())
def _backward(
    dout_THd: Tensor,
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    softmax_2HT: Tensor,
    cu_seqlens_S1: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery_THd, dkey_THd, dvalue_THd); see `cpu.backward`."""
    from vrpo_kernels.segment_attention import cpu

    heads = map(_with_unit_stride, (dout_THd, query_THd, key_THd, value_THd))
    return cpu.backward(*heads, softmax_2HT, cu_seqlens_S1, scale)


@_backward.register_fake
def _(dout_THd, query_THd, key_THd, value_THd, softmax_2HT, cu_seqlens_S1, scale):
    return tuple(
        torch.empty(heads.shape, dtype=heads.dtype, device=heads.device)
        for heads in (query_THd, key_THd, value_THd)
    )


def _setup_context(ctx, inputs, output):
    query_THd, key_THd, value_THd, cu_seqlens_S1, ctx.scale = inputs
    _out_THd, softmax_2HT = output
    ctx.mark_non_differentiable(softmax_2HT)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query_THd, key_THd, value_THd, softmax_2HT, cu_seqlens_S1)


def _autograd_backward(ctx, saved, dout_THd, _dsoftmax_2HT):
    if dout_THd is None:
        return (None,) * 5
    return *_backward(dout_THd, *saved, ctx.scale), None, None


_fused = autograd.register(
    _forward,
    "segment_attention",
    autograd.once_differentiable("segment_attention", _autograd_backward),
    _setup_context,
)
autograd.register_loop(_backward)


def segment_attention(
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    cu_seqlens_S1: Tensor,
    *,
    scale: float,
    backend: str = "auto",
) -> Tensor:
    """Bidirectional attention inside the segments of a pack; nothing crosses a boundary.

        out_t = sum over the tokens u of t's segment of softmax_u(scale * q_t . k_u) v_u      in every head

    For packs of many short segments on a CPU, where a call of scaled_dot_product_attention per segment costs
    more than what it computes. The scores of at most 64 queries exist at a time, in each thread.

    Args:
        query_THd: (T, heads, d) float32 (other floating dtypes: reference only); any strides.
        key_THd, value_THd: (T, key heads, d), same dtype and device; key heads divide heads, and head h
            reads key head h // (heads / key heads).
        cu_seqlens_S1: (S + 1,) int32, from 0 to T, never descending: segment s is cu[s] : cu[s + 1].
        scale: factor on q k^T, usually d ** -0.5.
        backend: "auto" (cpu for float32 on the CPU, else reference), "cpu" or "reference".
    Returns:
        (T, heads, d), contiguous, in the dtype of the inputs.
    Numerics:
        fp32 sums in the order of the keys. Bitwise the same with and without gradients, from run to run,
        for any number of threads, and in any pack: an output depends on its own segment only.
    Differentiation:
        Differentiable in query, key and value: once, in reverse mode, `torch.func` and vmap included; backend
        "reference" as often as wanted and in forward mode.
    Errors:
        ValueError naming the argument, what it got and what it needs, or every reason against a requested
        backend.
    """
    for name, heads in (("query_THd", query_THd), ("key_THd", key_THd), ("value_THd", value_THd)):
        checks.require_dim(name, heads, "T", "heads", "d")
        checks.require_floating(name, heads)
        checks.require_same("dtype", "query_THd", query_THd.dtype, name, heads.dtype)
        checks.require_same("device", "query_THd", query_THd.device, name, heads.device)
    checks.require_same("shape", "key_THd", tuple(key_THd.shape), "value_THd", tuple(value_THd.shape))
    of_query, of_key = ((heads.shape[0], heads.shape[2]) for heads in (query_THd, key_THd))
    checks.require_same("(T, d)", "query_THd", of_query, "key_THd", of_key)
    num_heads, key_heads = query_THd.shape[1], key_THd.shape[1]
    if not key_heads or num_heads % key_heads:
        raise ValueError(f"key heads must divide heads, got {key_heads} and {num_heads}")
    checks.require_dim("cu_seqlens_S1", cu_seqlens_S1, "S + 1")
    if cu_seqlens_S1.dtype != torch.int32:
        raise ValueError(f"cu_seqlens_S1 must be int32, got {cu_seqlens_S1.dtype}")
    checks.require_same("device", "query_THd", query_THd.device, "cu_seqlens_S1", cu_seqlens_S1.device)
    if _choose(query_THd, backend) == "reference":
        _require_boundaries(cu_seqlens_S1, query_THd.shape[0])
        return reference.segment_attention(query_THd, key_THd, value_THd, cu_seqlens_S1, scale)
    return _fused(query_THd, key_THd, value_THd, cu_seqlens_S1, scale)[0]


def _require_boundaries(cu_seqlens_S1: Tensor, num_tokens: int) -> None:
    """As the C++ op does it. Reads values."""
    boundaries = cu_seqlens_S1.tolist()
    ends = boundaries[:1] + boundaries[-1:]
    if ends != [0, num_tokens] or boundaries != sorted(boundaries):
        raise ValueError(
            f"cu_seqlens_S1 must start at 0, never descend and end at {num_tokens}, the number of tokens"
        )
