"""Row kernels over the hidden size: the targets' logits, and the gradients of rows from their statistics.

Contracts as in `kernel_fold.py`; the launchers turn FMA contraction off: roundings are those written here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.linear_cross_entropy.kernel_head import (
    Head,
    before_cap,
    power_of_two,
    row_factor,
    tile_factor,
)
from vrpo_kernels.triton_math import is_class

_ABSENT = tl.constexpr(torch.iinfo(torch.int64).min)  # op.ABSENT


@triton.jit
def _target_logits_kernel(
    hidden_ptr,
    weight_ptr,
    target_ptr,
    out_ptr,
    V,
    D,
    stride_hidden,
    stride_weight,
    bias_ptr,
    scale,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows,): u_y = scale (hidden_n . weight_y + bias_y) in fp32; 0 if absent, NaN out of range."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    hidden_row = hidden_ptr + row * stride_hidden
    weight_row = weight_ptr + target * stride_weight
    width = tl.where(is_class(target, V), D, 0)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        in_d = offs_d < width
        hidden = tl.load(hidden_row + offs_d, mask=in_d, other=0.0).to(tl.float32)
        total += hidden * tl.load(weight_row + offs_d, mask=in_d, other=0.0).to(tl.float32)
    here = is_class(target, V)
    logit = before_cap(tl.sum(total, axis=0), bias_ptr, target, here, scale, HAS_BIAS, SCALED)
    # +inf is an overflow, which exp(m - inf) = 0 would hide behind nll = 0.
    known = (here | (target == _ABSENT)) & (logit != float("inf"))
    tl.store(out_ptr + row, tl.where(known, logit, float("nan")))


@triton.jit
def _finish_expected_kernel(acc_ptr, sum_ptr, D, stride_acc, BLOCK_D: tl.constexpr):
    """Grid (rows, ceil(D / BLOCK_D)), in place: acc = acc / s."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    total = tl.load(sum_ptr + row)
    acc_row = acc_ptr + row * stride_acc + offs_d
    acc = tl.load(acc_row, mask=in_d, other=0.0)
    tl.store(acc_row, tl.where(total > 0.0, tl.div_rn(acc, total), 0.0), mask=in_d)


@triton.jit
def _scale_rows_kernel(
    value_ptr,
    dnll_ptr,
    statistics_ptr,
    out_ptr,
    N,
    D,
    stride_value,
    stride_dnll,
    stride_out,
    softcap,
    scale,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PER_SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows, ceil(D / BLOCK_D)): out = value * factor of the row's tile, in fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    dnll = tl.load(dnll_ptr + row * stride_dnll)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    factor = tile_factor(statistics_ptr, dnll, row, N, softcap, scale, HAS_CAP, SCALED, PER_SUM, dtype, dtype)
    value = tl.load(value_ptr + row * stride_value + offs_d, mask=in_d, other=0.0).to(factor.dtype)
    out = (value * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * stride_out + offs_d, out, mask=in_d)


@triton.jit
def _dhidden_kernel(
    expected_ptr,
    weight_ptr,
    target_ptr,
    dnll_ptr,
    statistics_ptr,
    out_ptr,
    N,
    V,
    D,
    stride_expected,
    stride_weight,
    stride_dnll,
    stride_out,
    softcap,
    scale,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows, ceil(D / BLOCK_D)): out = dnll * q * scale * (expected - slope * weight[target]), rounded
    once.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    target = tl.load(target_ptr + row)
    dnll = tl.load(dnll_ptr + row * stride_dnll)
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    factor, slope, _ = row_factor(statistics_ptr, dnll, row, N, softcap, scale, HAS_CAP, SCALED, dtype)
    expected = tl.load(expected_ptr + row * stride_expected + offs_d, mask=in_d, other=0.0)
    head_row = weight_ptr + target * stride_weight + offs_d
    head = tl.load(head_row, mask=offs_d < tl.where(is_class(target, V), D, 0), other=0.0).to(tl.float32)
    head = head.to(factor.dtype)
    if HAS_CAP:
        head = head * slope
    out = factor * (expected.to(factor.dtype) - head)
    tl.store(out_ptr + row * stride_out + offs_d, out.to(out_ptr.dtype.element_ty), mask=in_d)


def _rows_by_hidden(tensor: Tensor) -> tuple[tuple[int, int], int]:
    """(grid, BLOCK_D) of the kernels that walk an [rows, D] tensor."""
    block = power_of_two(tensor.shape[1], 128, 1024)
    return (tensor.shape[0], triton.cdiv(tensor.shape[1], block)), block


def target_logits(hidden: Tensor, head: Head, targets: Tensor, out: Tensor) -> None:
    """out[n] = scale * (hidden[n] . weight[y] + bias[y]), y = targets[n], in fp32, in one fixed order.

    Before the soft-cap; 0 if absent, NaN out of range.
    """
    _target_logits_kernel[(hidden.shape[0],)](
        hidden,
        head.weight,
        targets,
        out,
        head.weight.shape[0],
        hidden.shape[1],
        hidden.stride(0),
        head.weight.stride(0),
        head.bias_or_dummy,
        head.scale,
        HAS_BIAS=head.bias is not None,
        SCALED=head.scaled,
        BLOCK_D=power_of_two(hidden.shape[1], 128, 1024),
        num_warps=4,
        enable_fp_fusion=False,
    )


def finish_expected(acc: Tensor, sum_N: Tensor) -> None:
    """acc = (E D) @ weight [rows, D] fp32 becomes `expected` of the contract, in place."""
    grid, block = _rows_by_hidden(acc)
    _finish_expected_kernel[grid](
        acc,
        sum_N,
        acc.shape[1],
        acc.stride(0),
        BLOCK_D=block,
        num_warps=4,
        enable_fp_fusion=False,
    )


def scale_rows(
    value: Tensor,
    dnll: Tensor,
    statistics: Tensor,
    out: Tensor,
    *,
    softcap: float = 0.0,
    scale: float = 1.0,
    per_sum: bool,
) -> None:
    """out[n] = value[n] * dnll[n] * q[n] * scale [/ s[n]] for [N, D] tensors, one rounding at the end.

    For what is multiplied with, or came from, tiles of out's dtype with the target's entry in them.
    """
    grid, block = _rows_by_hidden(value)
    _scale_rows_kernel[grid](
        value,
        dnll,
        statistics,
        out,
        value.shape[0],
        value.shape[1],
        value.stride(0),
        dnll.stride(0),
        out.stride(0),
        softcap,
        scale,
        HAS_CAP=softcap != 0.0,
        SCALED=scale != 1.0,
        PER_SUM=per_sum,
        BLOCK_D=block,
        num_warps=4,
        enable_fp_fusion=False,
    )


def dhidden(
    expected: Tensor,
    head: Head,
    targets: Tensor,
    dnll: Tensor,
    statistics: Tensor,
    out: Tensor,
) -> None:
    """out[n] = dnll[n] q[n] scale (expected[n] - slope[n] weight[targets[n]]), [N, D], one rounding."""
    grid, block = _rows_by_hidden(expected)
    _dhidden_kernel[grid](
        expected,
        head.weight,
        targets,
        dnll,
        statistics,
        out,
        expected.shape[0],
        head.weight.shape[0],
        expected.shape[1],
        expected.stride(0),
        head.weight.stride(0),
        dnll.stride(0),
        out.stride(0),
        head.softcap,
        head.scale,
        HAS_CAP=head.has_cap,
        SCALED=head.scaled,
        BLOCK_D=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
