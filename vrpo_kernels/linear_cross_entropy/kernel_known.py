"""Row kernels for when m and s are known: the nll, the targets of kept tiles, the probabilities of the sweep.

The launchers turn FMA contraction off: roundings are those written here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.linear_cross_entropy.kernel_head import Head, before_cap, target_entry, warps_for
from vrpo_kernels.triton_math import cap, exp, is_class, log_odds_of, scaled_exp

_NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def _finish_rows_kernel(statistics_ptr, nll_ptr, N, softcap, HAS_CAP: tl.constexpr, BLOCK_N: tl.constexpr):
    """Grid (ceil(N / BLOCK_N),): nll = softplus(d)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    target_logit = tl.load(statistics_ptr + offs_n, mask=in_n, other=0.0)
    max_n = tl.load(statistics_ptr + N + offs_n, mask=in_n, other=0.0)
    sum_n = tl.load(statistics_ptr + 2 * N + offs_n, mask=in_n, other=1.0)
    if HAS_CAP:
        target_logit = cap(target_logit.to(tl.float64), softcap, True)[0].to(tl.float32)
    log_odds = log_odds_of(target_logit, max_n, sum_n)
    # softplus(d) = max(d, 0) + log1p(exp(-|d|)); log1p(x) = x log(1 + x) / ((1 + x) - 1) is right to
    # the last bits for every x in (0, 1], and Triton has no log1p that the interpreter can run.
    small = exp(-tl.abs(log_odds), True)
    one_plus = 1.0 + small
    gap = one_plus - 1.0
    log1p = tl.where(gap == 0.0, small, small * (tl.log(one_plus) / tl.where(gap == 0.0, 1.0, gap)))
    tl.store(nll_ptr + offs_n, tl.maximum(log_odds, 0.0) + log1p, mask=in_n)


@triton.jit
def _finish_kept_kernel(
    kept_ptr,
    target_ptr,
    sum_ptr,
    V,
    stride_kept,
    target_logit_ptr,
    softcap,
    HAS_CAP: tl.constexpr,
    NORMALISE: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (rows,): kept E becomes s * (p - onehot) * slope / q, by writing -s * slope at the target.

    NORMALISE (fp16, where s can exceed 65504): the row is divided by s as well.
    """
    row = tl.program_id(0).to(tl.int64)
    kept_row = kept_ptr + row * stride_kept
    total = tl.load(sum_ptr + row)
    target = tl.load(target_ptr + row)
    target_logit = tl.load(target_logit_ptr + row)
    TILE: tl.constexpr = kept_ptr.dtype.element_ty
    entry = target_entry(target_logit, softcap, HAS_CAP, TILE)
    if NORMALISE:
        scale = tl.where(total > 0.0, tl.div_rn(1.0, total), 0.0)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            e = tl.load(kept_row + offs_v, mask=offs_v < V, other=0.0).to(tl.float32) * scale
            e = tl.where(offs_v == target, entry, e)
            tl.store(kept_row + offs_v, e.to(kept_ptr.dtype.element_ty), mask=offs_v < V)
    else:
        entry = (total * entry).to(tl.float32)  # of which bf16 is rounded, as in `tile_factor`
        tl.store(kept_row + target, entry.to(TILE), mask=is_class(target, V))


@triton.jit
def _probabilities_kernel(
    z_ptr,
    target_ptr,
    max_ptr,
    sum_ptr,
    tile_ptr,
    first_col,
    num_cols,
    stride_z,
    stride_tile,
    bias_ptr,
    scale,
    softcap,
    target_logit_ptr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (rows, ceil(cols / BLOCK_V)), statistics known: exp(logit - m) / s * slope, -slope at the target.

    q times it is (p - onehot) * slope. In fp32 the target's entry is 0 until `_set_targets_kernel` writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = offs_v < num_cols
    target = tl.load(target_ptr + row) - first_col
    max_n = tl.load(max_ptr + row)
    sum_n = tl.load(sum_ptr + row)
    EXACT: tl.constexpr = tile_ptr.dtype.element_ty == tl.float32
    z = tl.load(z_ptr + row * stride_z + offs_v, mask=in_v, other=_NEG_INF)
    z = before_cap(z, bias_ptr, first_col + offs_v, in_v, scale, HAS_BIAS, SCALED)
    if HAS_CAP:
        z, slope = cap(z, softcap, EXACT)
    # m is a maximum up to the raise, but not of the target's column: that one could overflow.
    z = tl.where(offs_v == target, _NEG_INF, z)
    if EXACT:
        e = scaled_exp(z - max_n, tl.where(sum_n > 0.0, 1.0 / sum_n.to(tl.float64), 0.0))
    else:
        e = tl.exp(z - max_n) * tl.where(sum_n > 0.0, tl.div_rn(1.0, sum_n), 0.0)
    if HAS_CAP:
        e = e * slope
    if not EXACT:
        entry = target_entry(tl.load(target_logit_ptr + row), softcap, HAS_CAP, tile_ptr.dtype.element_ty)
        e = tl.where(offs_v == target, entry, e)
    tl.store(tile_ptr + row * stride_tile + offs_v, e.to(tile_ptr.dtype.element_ty), mask=in_v)


@triton.jit
def _set_targets_kernel(
    tile_ptr,
    target_ptr,
    num_rows,
    first_col,
    num_cols,
    stride_tile,
    target_logit_ptr,
    softcap,
    HAS_CAP: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (ceil(rows / BLOCK_N),): -slope (without a soft-cap -1) at every target that lies in the tile."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < num_rows
    target = tl.load(target_ptr + offs_n, mask=in_n, other=-1) - first_col
    TILE: tl.constexpr = tile_ptr.dtype.element_ty
    target_logit = tl.load(target_logit_ptr + offs_n, mask=in_n, other=0.0)
    entry = target_entry(target_logit, softcap, HAS_CAP, TILE) + tl.zeros((BLOCK_N,), dtype=tl.float32)
    at = tile_ptr + offs_n * stride_tile + target
    tl.store(at, entry.to(tl.float32).to(TILE), mask=in_n & is_class(target, num_cols))


def finish_rows(statistics: Tensor, nll: Tensor, softcap: float) -> None:
    """nll [N] from statistics [3, N] = (u_y, m, s), all fp32."""
    num_rows = nll.shape[0]
    _finish_rows_kernel[(triton.cdiv(num_rows, 128),)](
        statistics,
        nll,
        num_rows,
        softcap,
        HAS_CAP=softcap != 0.0,
        BLOCK_N=128,
        num_warps=4,
        enable_fp_fusion=False,
    )


def finish_kept(kept: Tensor, targets: Tensor, statistics: Tensor, softcap: float) -> None:
    """Kept E [rows, V] receives its target entries: -s * slope; in fp16 -slope, with the row divided by s."""
    normalise = kept.dtype is torch.float16
    _finish_kept_kernel[(kept.shape[0],)](
        kept,
        targets,
        statistics[2],
        kept.shape[1],
        kept.stride(0),
        statistics[0],
        softcap,
        HAS_CAP=softcap != 0.0,
        NORMALISE=normalise,
        BLOCK_V=4096,
        num_warps=8 if normalise else 1,
        enable_fp_fusion=False,
    )


def probabilities(
    z: Tensor,
    head: Head,
    targets: Tensor,
    statistics: Tensor,
    tile: Tensor,
    *,
    first_col: int,
    block: int,
) -> None:
    """tile = exp(logit - m) / s * slope; at the target -slope, in fp32 0. z [rows, cols] fp32: product."""
    _probabilities_kernel[(z.shape[0], triton.cdiv(z.shape[1], block))](
        z,
        targets,
        statistics[1],
        statistics[2],
        tile,
        first_col,
        z.shape[1],
        z.stride(0),
        tile.stride(0),
        head.bias_or_dummy,
        head.scale,
        head.softcap,
        statistics[0],
        **head.switches(),
        BLOCK_V=block,
        num_warps=warps_for(block),
        enable_fp_fusion=False,
    )


def set_targets(
    tile: Tensor, targets: Tensor, target_logits: Tensor, *, first_col: int, softcap: float
) -> None:
    """tile[n, targets[n] - first_col] = -slope for the targets among its columns. tile [rows, cols]."""
    num_rows, num_cols = tile.shape
    _set_targets_kernel[(triton.cdiv(num_rows, 128),)](
        tile,
        targets,
        num_rows,
        first_col,
        num_cols,
        tile.stride(0),
        target_logits,
        softcap,
        HAS_CAP=softcap != 0.0,
        BLOCK_N=128,
        num_warps=4,
        enable_fp_fusion=False,
    )
