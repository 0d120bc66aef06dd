"""The Triton cross-entropy: one read of the selected rows forward, one read and one write backward.

Same contract as `cpu.py`. One program owns one row; sums are fp32 and their order depends on V alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.backend import on_device
from vrpo_kernels.triton_math import exp, scaled_exp, sum_lanes

_NEG_INF = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # the maximum of no logits at all


@triton.jit
def _other_logits(logits_row, offs_v, V, target):
    """Logits in fp32; -inf for the target's and past the end."""
    z = tl.load(logits_row + offs_v, mask=offs_v < V, other=_NEG_INF).to(tl.float32)
    return tl.where(offs_v == target, _NEG_INF, z)


@triton.jit
def _forward_kernel(
    logits_ptr,
    target_ptr,
    row_ptr,
    nll_ptr,
    statistics_ptr,
    N,
    M,
    V,
    stride_logits,
    HAS_ROWS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (N,): online (max, sum of exp) over the classes but the target; nll = softplus(log-odds).

    FLOP: about 6 per logit. Bytes: the selected rows once.
    """
    n = tl.program_id(0).to(tl.int64)
    row = n
    if HAS_ROWS:
        row = tl.load(row_ptr + n)
    target = tl.load(target_ptr + n)
    # A row or a target out of range makes NaN of its nll, never a wrong number; no such row is read.
    is_row = (row >= 0) & (row < M)
    is_class = is_row & (target >= 0) & (target < V)
    last = tl.where(is_row, V, 0)
    logits_row = logits_ptr + row * stride_logits
    # One running maximum per lane of the block: no reduction across threads until the end.
    lane_max = tl.full((BLOCK_V,), _LOWEST, dtype=tl.float32)
    lane_sum = tl.zeros((BLOCK_V,), dtype=tl.float32)
    EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
    for start in range(0, V, 2 * BLOCK_V):
        # Two logits a lane and step: three exponentials for both, not four.
        z0 = _other_logits(logits_row, start + tl.arange(0, BLOCK_V), last, target)
        z1 = _other_logits(logits_row, start + BLOCK_V + tl.arange(0, BLOCK_V), last, target)
        new_max = tl.maximum(lane_max, tl.maximum(z0, z1))
        lane_sum = lane_sum * exp(lane_max - new_max, EXACT)
        lane_sum += exp(z0 - new_max, EXACT) + exp(z1 - new_max, EXACT)
        lane_max = new_max
    max_n = tl.max(lane_max, axis=0)
    sum_n = sum_lanes(lane_sum * exp(lane_max - max_n, EXACT), EXACT)
    target_logit = tl.load(logits_row + target, mask=is_class, other=float("nan")).to(tl.float32)
    log_odds = (max_n - target_logit) + tl.log(sum_n)
    # softplus(d) = max(d, 0) + log1p(exp(-|d|)); log1p(x) = x log(1 + x) / ((1 + x) - 1) is right to
    # the last bits for every x in (0, 1], and Triton has no log1p that the interpreter can run.
    small = exp(-tl.abs(log_odds), True)
    one_plus = 1.0 + small
    gap = one_plus - 1.0
    log1p = tl.where(gap == 0.0, small, small * (tl.log(one_plus) / tl.where(gap == 0.0, 1.0, gap)))
    tl.store(nll_ptr + n, tl.maximum(log_odds, 0.0) + log1p)
    tl.store(statistics_ptr + n, max_n)
    tl.store(statistics_ptr + N + n, sum_n)


@triton.jit
def _backward_kernel(
    dnll_ptr,
    logits_ptr,
    target_ptr,
    owner_ptr,
    statistics_ptr,
    out_ptr,
    N,
    V,
    stride_dnll,
    stride_logits,
    stride_out,
    HAS_OWNER: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (M,): dlogits = dnll * (p - onehot) in rows that own an n, zeros (and no read) in the others.

    out may be the logits themselves. FLOP: about 4 per logit. Bytes: one read (selected), one write.
    """
    row = tl.program_id(0).to(tl.int64)
    n = row
    if HAS_OWNER:
        n = tl.load(owner_ptr + row)
    out_row = out_ptr + row * stride_out
    if n < 0:
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            zeros = tl.zeros((BLOCK_V,), dtype=out_ptr.dtype.element_ty)
            tl.store(out_row + offs_v, zeros, mask=offs_v < V)
    else:
        logits_row = logits_ptr + row * stride_logits
        target = tl.load(target_ptr + n)
        is_class = (target >= 0) & (target < V)
        target_logit = tl.load(logits_row + target, mask=is_class, other=float("nan")).to(tl.float32)
        # In place, another warp may overwrite the target's logit: all have read it from here on.
        tl.debug_barrier()
        max_n = tl.load(statistics_ptr + n)
        sum_n = tl.load(statistics_ptr + N + n)
        dnll = tl.load(dnll_ptr + n * stride_dnll)
        EXACT: tl.constexpr = logits_ptr.dtype.element_ty == tl.float32
        if EXACT:  # an error of the row's factor is one of all its entries
            target_logit, dnll = target_logit.to(tl.float64), dnll.to(tl.float64)
            max_d, sum_d = max_n.to(tl.float64), sum_n.to(tl.float64)
            log_odds = (max_d - target_logit) + tl.log(sum_d)
            small = tl.exp(-tl.abs(log_odds))
            wide = dnll * (tl.where(log_odds >= 0.0, 1.0, small) / (1.0 + small))
            scale = wide.to(tl.float32)
            per_sum = tl.where(sum_n > 0.0, wide / sum_d, 0.0)
        else:
            log_odds = (max_n - target_logit) + tl.log(sum_n)
            small = exp(-tl.abs(log_odds), True)
            scale = dnll * tl.div_rn(tl.where(log_odds >= 0.0, 1.0, small), 1.0 + small)
            per_sum = tl.where(sum_n > 0.0, tl.div_rn(scale, sum_n), 0.0)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            # Not exp(z) of the target's column: it is no part of the maximum and could overflow.
            z = _other_logits(logits_row, offs_v, V, target)
            if EXACT:  # noqa: SIM108 - only a statement leaves the other side out of the compilation
                others = scaled_exp(z - max_n, per_sum)
            else:
                others = per_sum * tl.exp(z - max_n)
            gradient = tl.where(offs_v == target, -scale, others)
            tl.store(out_row + offs_v, gradient.to(out_ptr.dtype.element_ty), mask=offs_v < V)


def _block(num_classes: int) -> int:
    return max(128, min(4096, triton.next_power_of_2(num_classes)))


def _warps(block: int) -> int:
    return max(1, min(8, block // 512))


@on_device
def forward(logits_MV: Tensor, target_N: Tensor, row_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """(nll_N, statistics (2, N)); see `cpu.forward`."""
    num_rows, num_classes = target_N.shape[0], logits_MV.shape[1]
    nll_N = logits_MV.new_empty(num_rows, dtype=torch.float32)
    statistics = logits_MV.new_empty((2, num_rows), dtype=torch.float32)
    if num_rows:
        block = _block(num_classes)
        _forward_kernel[(num_rows,)](
            logits_MV,
            target_N.contiguous(),
            None if row_N is None else row_N.contiguous(),
            nll_N,
            statistics,
            num_rows,
            logits_MV.shape[0],
            num_classes,
            logits_MV.stride(0),
            HAS_ROWS=row_N is not None,
            BLOCK_V=block,
            num_warps=_warps(block),
            enable_fp_fusion=False,
        )
    return nll_N, statistics


@on_device
def backward(
    dnll_N: Tensor,
    logits_MV: Tensor,
    target_N: Tensor,
    owner_M: Tensor | None,
    statistics: Tensor,
    out_MV: Tensor,
) -> None:
    """Writes dlogits into out_MV, which may be logits_MV; see `cpu.backward`."""
    num_rows, num_classes = logits_MV.shape
    if not num_rows:
        return
    block = _block(num_classes)
    _backward_kernel[(num_rows,)](
        dnll_N,
        logits_MV,
        target_N.contiguous(),
        owner_M,
        statistics,
        out_MV,
        target_N.shape[0],
        num_classes,
        dnll_N.stride(0),
        logits_MV.stride(0),
        out_MV.stride(0),
        HAS_OWNER=owner_M is not None,
        BLOCK_V=block,
        num_warps=_warps(block),
        enable_fp_fusion=False,
    )
