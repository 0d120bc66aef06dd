"""Row kernels of the row-linear algorithm: fold a logit tile into the online softmax, finish the rows.

State of row n, fp32: max_N (the reference m) and sum_N (s = sum of exp(z - m) over the classes seen so
far *without the target*). A fold is the same machine code whether or not gradients are wanted:
`store_tile`, `acc_cols` and `kept_cols` are run-time values that switch stores off, and nothing that
differs between the modes is specialised on, so the nll cannot differ either. The launchers turn FMA
contraction off: roundings are those written here.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.linear_cross_entropy.tiles import LOWEST
from vrpo_kernels.triton_math import as_reference, exp, is_class, log_odds_of, scaled_exp, sum_lanes

_NEG_INF = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _rescale_row(ptr, num_cols, factor, BLOCK: tl.constexpr):
    """Multiply `num_cols` stored values from `ptr` on by one scalar, rounding to their dtype."""
    for start in range(0, num_cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        in_row = offs < num_cols
        value = tl.load(ptr + offs, mask=in_row, other=0.0).to(tl.float32)
        tl.store(ptr + offs, (value * factor).to(ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _raise_reference(old_max, candidate, raise_by):
    """(new m, factor for everything summed under the old m, whether anything was and m rose)."""
    raised = candidate > old_max + raise_by
    new_max = tl.where(raised, candidate, old_max)
    return new_max, exp(old_max - new_max, True), raised & (old_max > _LOWEST)


@triton.jit(do_not_specialize=["store_tile", "acc_ptr", "acc_cols", "stride_acc", "kept_cols"])
def _fold_kernel(
    z_ptr,
    target_ptr,
    tile_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    first_col,
    num_cols,
    stride_z,
    stride_tile,
    stride_acc,
    raise_by,
    store_tile,
    acc_cols,
    kept_cols,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns one row of one logit tile: reads z once, writes E = exp(z - m) once.

    Grid (rows,); the row is walked in blocks of BLOCK_V, few registers, so that many programs share an
    SM and keep the memory busy. m rises only when a block beats it by `raise_by` (in nats): E then stays
    below exp(raise_by), and the correction of what was written under the old m (earlier blocks of this
    tile, `acc_cols` of the accumulator, `kept_cols` of kept E before this tile) is rare after the first
    block.
    FLOP: about 6 per logit. Bytes: 4 read + size of E written, per logit.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row) - first_col
    z_row = z_ptr + row * stride_z
    tile_row = tile_ptr + row * stride_tile
    stored = tl.where(store_tile != 0, num_cols, 0)
    old_max = tl.load(max_ptr + row)
    max_n = old_max
    lane_sum = tl.zeros((BLOCK_V,), dtype=tl.float32)
    EXACT: tl.constexpr = tile_ptr.dtype.element_ty == tl.float32
    for start in range(0, num_cols, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_row + offs_v, mask=offs_v < num_cols, other=_NEG_INF)
        z = tl.where(offs_v == target, _NEG_INF, z)
        candidate = tl.max(z, axis=0)
        if not EXACT:
            candidate = as_reference(candidate)
        new_max, factor, rescale = _raise_reference(max_n, candidate, raise_by)
        e = exp(z - new_max, EXACT)
        lane_sum = lane_sum * factor + e
        if rescale:
            tl.debug_barrier()  # other threads wrote these
            _rescale_row(tile_row, tl.minimum(start, stored), factor, BLOCK_D)
            tl.debug_barrier()  # and may write them again, in the next correction
        tl.store(tile_row + offs_v, e.to(tile_ptr.dtype.element_ty), mask=offs_v < stored)
        max_n = new_max

    factor = exp(old_max - max_n, True)
    total = tl.load(sum_ptr + row) * factor + sum_lanes(lane_sum, EXACT)
    tl.debug_barrier()  # every warp has read the old maximum and sum
    tl.store(max_ptr + row, max_n)
    tl.store(sum_ptr + row, total)
    if (max_n > old_max) & (old_max > _LOWEST):
        _rescale_row(acc_ptr + row * stride_acc, acc_cols, factor, BLOCK_D)
        _rescale_row(tile_row - kept_cols, kept_cols, factor, BLOCK_D)


@triton.jit(do_not_specialize=["store_tile", "acc_ptr", "acc_cols", "stride_acc", "kept_cols"])
def _fold_blocks_kernel(
    block_max_ptr,
    block_sum_ptr,
    tile_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    num_blocks,
    num_cols,
    stride_block,
    stride_tile,
    stride_acc,
    raise_by,
    store_tile,
    acc_cols,
    kept_cols,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """As `_fold_kernel`, after the fused GEMM: merges the (max, sum) of a row's column blocks.

    Grid (rows,). The GEMM wrote block b of E under exp(z - used_b), used_b = its own reference where
    that beats the old m by `raise_by`, else the old m; only rows that raised are touched again.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.arange(0, BLOCKS)
    in_b = offs_b < num_blocks
    max_row = block_max_ptr + row * stride_block
    block_max = tl.load(max_row + offs_b, mask=in_b, other=_LOWEST)
    block_sum = tl.load(block_sum_ptr + row * stride_block + offs_b, mask=in_b, other=0.0)

    old_max = tl.load(max_ptr + row)
    tile_max = tl.max(block_max, axis=0)
    new_max, factor, rescale = _raise_reference(old_max, tile_max, raise_by)
    total = tl.load(sum_ptr + row) * factor + tl.sum(block_sum * tl.exp(block_max - new_max), axis=0)
    # Up to 32 blocks the reductions above need no barrier of their own: without this one a late warp
    # would read the maximum that another has stored already, and skip its part of the corrections.
    tl.debug_barrier()
    tl.store(max_ptr + row, new_max)
    tl.store(sum_ptr + row, total)

    tile_row = tile_ptr + row * stride_tile
    if (new_max > old_max) & (store_tile != 0):
        for block in range(0, num_blocks):
            seen = tl.load(max_row + block)
            used = tl.where(seen > old_max + raise_by, seen, old_max)
            start = block * BLOCK_V
            width = tl.minimum(num_cols - start, BLOCK_V)
            _rescale_row(tile_row + start, width, tl.exp(used - new_max), BLOCK_V)
    if rescale:
        _rescale_row(acc_ptr + row * stride_acc, acc_cols, factor, BLOCK_D)
        _rescale_row(tile_row - kept_cols, kept_cols, factor, BLOCK_D)


@triton.jit
def _finish_rows_kernel(statistics_ptr, nll_ptr, N, BLOCK_N: tl.constexpr):
    """Grid (ceil(N / BLOCK_N),): nll = softplus(d)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    target_logit = tl.load(statistics_ptr + offs_n, mask=in_n, other=0.0)
    max_n = tl.load(statistics_ptr + N + offs_n, mask=in_n, other=0.0)
    sum_n = tl.load(statistics_ptr + 2 * N + offs_n, mask=in_n, other=1.0)
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
    kept_ptr, target_ptr, sum_ptr, V, stride_kept, NORMALISE: tl.constexpr, BLOCK_V: tl.constexpr
):
    """Grid (rows,): kept E becomes s * (p - onehot) / q, by writing -s (or -1) at the target.

    NORMALISE (fp16, where s can exceed 65504): the row is divided by s as well.
    """
    row = tl.program_id(0).to(tl.int64)
    kept_row = kept_ptr + row * stride_kept
    total = tl.load(sum_ptr + row)
    target = tl.load(target_ptr + row)
    if NORMALISE:
        scale = tl.where(total > 0.0, tl.div_rn(1.0, total), 0.0)
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            e = tl.load(kept_row + offs_v, mask=offs_v < V, other=0.0).to(tl.float32) * scale
            e = tl.where(offs_v == target, -1.0, e)
            tl.store(kept_row + offs_v, e.to(kept_ptr.dtype.element_ty), mask=offs_v < V)
    else:
        tl.store(kept_row + target, (-total).to(kept_ptr.dtype.element_ty), mask=is_class(target, V))


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
    BLOCK_V: tl.constexpr,
):
    """Grid (rows, ceil(cols / BLOCK_V)), with the statistics known: exp(z - m) / s, and at the target -1.

    q times it is p - onehot. In fp32 the target's entry is 0, until `_set_targets_kernel` writes it.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = offs_v < num_cols
    target = tl.load(target_ptr + row) - first_col
    max_n = tl.load(max_ptr + row)
    sum_n = tl.load(sum_ptr + row)
    z = tl.load(z_ptr + row * stride_z + offs_v, mask=in_v, other=_NEG_INF)
    # m is a maximum up to the raise, but not of the target's column: that one could overflow.
    z = tl.where(offs_v == target, _NEG_INF, z)
    if tile_ptr.dtype.element_ty == tl.float32:
        e = scaled_exp(z - max_n, tl.where(sum_n > 0.0, 1.0 / sum_n.to(tl.float64), 0.0))
    else:
        e = tl.exp(z - max_n) * tl.where(sum_n > 0.0, tl.div_rn(1.0, sum_n), 0.0)
        e = tl.where(offs_v == target, -1.0, e)
    tl.store(tile_ptr + row * stride_tile + offs_v, e.to(tile_ptr.dtype.element_ty), mask=in_v)


@triton.jit
def _set_targets_kernel(
    tile_ptr, target_ptr, num_rows, first_col, num_cols, stride_tile, BLOCK_N: tl.constexpr
):
    """Grid (ceil(rows / BLOCK_N),): -1 at every target that lies in the tile."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < num_rows
    target = tl.load(target_ptr + offs_n, mask=in_n, other=-1) - first_col
    minus_one = tl.full((BLOCK_N,), -1.0, dtype=tile_ptr.dtype.element_ty)
    tl.store(tile_ptr + offs_n * stride_tile + target, minus_one, mask=in_n & is_class(target, num_cols))


def _power_of_two(width: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(width)))


def _warps(block: int) -> int:
    """Warps that leave each thread 16 fp32 values of a row: 64 registers, 32 warps on an SM."""
    return _power_of_two(block // 512, 1, 16)


def fold(
    z: Tensor,
    targets: Tensor,
    tile: Tensor,
    acc: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    *,
    first_col: int,
    block: int,
    raise_by: float,
    store_tile: bool,
    acc_cols: int,
    kept_cols: int,
) -> None:
    """Fold logits z [rows, cols] fp32, columns `first_col` on, into max_N, sum_N [rows] fp32.

    tile, acc: where E goes and what is corrected when a maximum rises; any tensors of the right
    dtype, alignment and stride when `store_tile` is false. block: columns of a step along the row, a power
    of two, the same for every tile of a call.
    """
    _fold_kernel[(z.shape[0],)](
        z,
        targets,
        tile,
        acc,
        max_N,
        sum_N,
        first_col,
        z.shape[1],
        z.stride(0),
        tile.stride(0),
        acc.stride(0),
        raise_by,
        int(store_tile),
        acc_cols,
        kept_cols,
        BLOCK_V=block,
        BLOCK_D=1024,
        num_warps=_warps(block),
        enable_fp_fusion=False,
    )


def fold_blocks(
    block_max: Tensor,
    block_sum: Tensor,
    tile: Tensor,
    acc: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    *,
    num_cols: int,
    block_cols: int,
    raise_by: float,
    store_tile: bool,
    acc_cols: int,
    kept_cols: int,
) -> None:
    """`fold` for the fused GEMM, from its (max, sum) per row and column block [rows, blocks] fp32."""
    _fold_blocks_kernel[(block_max.shape[0],)](
        block_max,
        block_sum,
        tile,
        acc,
        max_N,
        sum_N,
        triton.cdiv(num_cols, block_cols),
        num_cols,
        block_max.stride(0),
        tile.stride(0),
        acc.stride(0),
        raise_by,
        int(store_tile),
        acc_cols,
        kept_cols,
        BLOCK_V=block_cols,
        BLOCK_D=1024,
        BLOCKS=triton.next_power_of_2(block_max.shape[1]),
        num_warps=2,
        enable_fp_fusion=False,
    )


def finish_rows(statistics: Tensor, nll: Tensor) -> None:
    """nll [N] from statistics [3, N] = (z_y, m, s), all fp32."""
    num_rows = nll.shape[0]
    _finish_rows_kernel[(triton.cdiv(num_rows, 128),)](
        statistics, nll, num_rows, BLOCK_N=128, num_warps=4, enable_fp_fusion=False
    )


def finish_kept(kept: Tensor, targets: Tensor, sum_N: Tensor) -> None:
    """Kept E [rows, V] receives its target entries: -s; in fp16 -1, with the row divided by s."""
    normalise = kept.dtype is torch.float16
    _finish_kept_kernel[(kept.shape[0],)](
        kept,
        targets,
        sum_N,
        kept.shape[1],
        kept.stride(0),
        NORMALISE=normalise,
        BLOCK_V=4096,
        num_warps=8 if normalise else 1,
        enable_fp_fusion=False,
    )


def probabilities(
    z: Tensor,
    targets: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    tile: Tensor,
    *,
    first_col: int,
    block: int,
) -> None:
    """tile = exp(z - m) / s; -1, in fp32 0, at the target. z [rows, cols], max_N and sum_N [rows] fp32."""
    _probabilities_kernel[(z.shape[0], triton.cdiv(z.shape[1], block))](
        z,
        targets,
        max_N,
        sum_N,
        tile,
        first_col,
        z.shape[1],
        z.stride(0),
        tile.stride(0),
        BLOCK_V=block,
        num_warps=_warps(block),
        enable_fp_fusion=False,
    )


def set_targets(tile: Tensor, targets: Tensor, *, first_col: int) -> None:
    """tile[n, targets[n] - first_col] = -1 for the targets among its columns. tile [rows, cols]."""
    num_rows, num_cols = tile.shape
    _set_targets_kernel[(triton.cdiv(num_rows, 128),)](
        tile,
        targets,
        num_rows,
        first_col,
        num_cols,
        tile.stride(0),
        BLOCK_N=128,
        num_warps=4,
        enable_fp_fusion=False,
    )
