"""Row kernels over the hidden size: the targets' logits, and the gradients of rows from their statistics.

Contracts as in `kernel_fold.py`; the launchers turn FMA contraction off: roundings are those written here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.triton_math import exp, is_class, log_odds_of

_ABSENT = tl.constexpr(torch.iinfo(torch.int64).min)  # op.ABSENT


@triton.jit
def _row_factor(statistics_ptr, dnll, row, N, PER_SUM: tl.constexpr, dtype: tl.constexpr):
    """dnll * q [/ s] of one row of statistics [3, N] = (z_y, m, s), q = 1 - p_y, in fp32, or in fp64.

    dtype: of the result it enters; for float32 it is fp64, because an error of a row's factor is one of all
    its entries. PER_SUM: that is kept E, whose target entry is -s rounded to dtype. Dividing
    by that very number makes the entry's share exactly -1, and costs the others one rounding more.
    """
    target_logit = tl.load(statistics_ptr + row)
    max_n = tl.load(statistics_ptr + N + row)
    sum_n = tl.load(statistics_ptr + 2 * N + row)
    divisor = sum_n.to(dtype).to(tl.float32)
    if dtype == tl.float32:
        target_logit, max_n, sum_n = target_logit.to(tl.float64), max_n.to(tl.float64), sum_n.to(tl.float64)
        divisor = sum_n
        dnll = dnll.to(tl.float64)
    log_odds = log_odds_of(target_logit, max_n, sum_n)
    if dtype == tl.float32:
        small = tl.exp(-tl.abs(log_odds))
        factor = dnll * (tl.where(log_odds >= 0.0, 1.0, small) / (1.0 + small))
    else:
        small = exp(-tl.abs(log_odds), True)
        factor = dnll * tl.div_rn(tl.where(log_odds >= 0.0, 1.0, small), 1.0 + small)
    if PER_SUM:
        factor = tl.where(divisor > 0.0, factor / divisor, 0.0)
    return factor


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
    BLOCK_D: tl.constexpr,
):
    """Grid (rows,): z_y = hidden_n . weight_y in fp32; 0 for an absent target, NaN for one out of range."""
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
    known = is_class(target, V) | (target == _ABSENT)
    tl.store(out_ptr + row, tl.where(known, tl.sum(total, axis=0), float("nan")))


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
    PER_SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows, ceil(D / BLOCK_D)): out = value * dnll * q [/ s], in fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    dnll = tl.load(dnll_ptr + row * stride_dnll)
    factor = _row_factor(statistics_ptr, dnll, row, N, PER_SUM, out_ptr.dtype.element_ty)
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
    BLOCK_D: tl.constexpr,
):
    """Grid (rows, ceil(D / BLOCK_D)): out = dnll * q * (expected - weight[target]), rounded once."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    target = tl.load(target_ptr + row)
    dnll = tl.load(dnll_ptr + row * stride_dnll)
    factor = _row_factor(statistics_ptr, dnll, row, N, False, out_ptr.dtype.element_ty)
    expected = tl.load(expected_ptr + row * stride_expected + offs_d, mask=in_d, other=0.0)
    head_row = weight_ptr + target * stride_weight + offs_d
    head = tl.load(head_row, mask=offs_d < tl.where(is_class(target, V), D, 0), other=0.0).to(tl.float32)
    out = factor * (expected.to(factor.dtype) - head.to(factor.dtype))
    tl.store(out_ptr + row * stride_out + offs_d, out.to(out_ptr.dtype.element_ty), mask=in_d)


def _power_of_two(width: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(width)))


def _rows_by_hidden(tensor: Tensor) -> tuple[tuple[int, int], int]:
    """(grid, BLOCK_D) of the kernels that walk an [rows, D] tensor."""
    block = _power_of_two(tensor.shape[1], 128, 1024)
    return (tensor.shape[0], triton.cdiv(tensor.shape[1], block)), block


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor, out: Tensor) -> None:
    """out[n] = hidden[n] . weight[targets[n]] in fp32, in one fixed order; 0 if absent, NaN out of range."""
    _target_logits_kernel[(hidden.shape[0],)](
        hidden,
        weight,
        targets,
        out,
        weight.shape[0],
        hidden.shape[1],
        hidden.stride(0),
        weight.stride(0),
        BLOCK_D=_power_of_two(hidden.shape[1], 128, 1024),
        num_warps=4,
        enable_fp_fusion=False,
    )


def finish_expected(acc: Tensor, sum_N: Tensor) -> None:
    """acc = E @ weight [rows, D] fp32 becomes the mean head row among the other classes, in place."""
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


def scale_rows(value: Tensor, dnll: Tensor, statistics: Tensor, out: Tensor, *, per_sum: bool) -> None:
    """out[n] = value[n] * dnll[n] * q[n] [/ s[n]] for [N, D] tensors, one rounding at the end."""
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
        PER_SUM=per_sum,
        BLOCK_D=block,
        num_warps=4,
        enable_fp_fusion=False,
    )


def dhidden(
    expected: Tensor,
    weight: Tensor,
    targets: Tensor,
    dnll: Tensor,
    statistics: Tensor,
    out: Tensor,
) -> None:
    """out[n] = dnll[n] * q[n] * (expected[n] - weight[targets[n]]), [N, D], one rounding at the end."""
    grid, block = _rows_by_hidden(expected)
    _dhidden_kernel[grid](
        expected,
        weight,
        targets,
        dnll,
        statistics,
        out,
        expected.shape[0],
        weight.shape[0],
        expected.shape[1],
        expected.stride(0),
        weight.stride(0),
        dnll.stride(0),
        out.stride(0),
        BLOCK_D=block,
        num_warps=4,
        enable_fp_fusion=False,
    )
