"""Row kernels of the row-linear algorithm: fold a logit tile into the online softmax.

State of row n, fp32: max_N (the reference m) and sum_N (s = sum of exp(z - m) over the classes seen so
far *without the target*). A fold is the same machine code whether or not gradients are wanted:
`store_tile`, `acc_cols` and `kept_cols` are run-time values that switch stores off, and nothing that
differs between the modes is specialised on, so the nll cannot differ either. The launchers turn FMA
contraction off: roundings are those written here.
"""

import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.linear_cross_entropy.kernel_head import Head, before_cap, warps_for
from vrpo_kernels.linear_cross_entropy.tiles import LOWEST
from vrpo_kernels.triton_math import as_reference, cap, exp, sum_lanes

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


@triton.jit
def _moved(moment, sum_n, old_max, new_max, factor):
    """sum of e (logit - m) under the new m, from it and s under the old; at LOWEST nothing was seen."""
    return (moment + tl.where(old_max > _LOWEST, old_max - new_max, 0.0) * sum_n) * factor


@triton.jit
def _moment(e, gap):
    """e (logit - m), and 0 where e is, also at logit = -inf."""
    return e * tl.where(e > 0.0, gap, 0.0)


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
    bias_ptr,
    scale,
    softcap,
    top_ptr,
    moment_ptr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    METRICS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program owns one row of one logit tile: reads z once, writes E = exp(logit - m) once.

    Grid (rows,); the row is walked in blocks of BLOCK_V, few registers, so that many programs share an
    SM and keep the memory busy. m rises only when a block beats it by `raise_by` (in nats): E then stays
    below exp(raise_by), and the correction of what was written under the old m (earlier blocks of this
    tile, `acc_cols` of the accumulator, `kept_cols` of kept E before this tile) is rare after the first
    block. With a soft-cap E is multiplied by the cap's slope where it is written, not where it is summed.
    METRICS: keeps the largest logit, and sum of E (logit - m), which moves with m (`_moved`).
    FLOP: about 6 per logit, 20 with a soft-cap. Bytes: 4 read + size of E written, per logit.
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
    if METRICS:
        top = tl.load(top_ptr + row)
        lane_moment = tl.zeros((BLOCK_V,), dtype=tl.float32)
    for start in range(0, num_cols, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        z = tl.load(z_row + offs_v, mask=offs_v < num_cols, other=_NEG_INF)
        z = before_cap(z, bias_ptr, first_col + offs_v, offs_v < num_cols, scale, HAS_BIAS, SCALED)
        if HAS_CAP:
            z, slope = cap(z, softcap, EXACT)
            z = tl.where(offs_v < num_cols, z, _NEG_INF)  # capped, a logit that is none is -softcap
        z = tl.where(offs_v == target, _NEG_INF, z)
        candidate = tl.max(z, axis=0)
        if METRICS:
            top = tl.maximum(top, candidate)
        if not EXACT:
            candidate = as_reference(candidate)
        new_max, factor, rescale = _raise_reference(max_n, candidate, raise_by)
        e = exp(z - new_max, EXACT)
        if METRICS:
            lane_moment = _moved(lane_moment, lane_sum, max_n, new_max, factor) + _moment(e, z - new_max)
        lane_sum = lane_sum * factor + e
        if HAS_CAP:
            e = e * slope
        if rescale:
            tl.debug_barrier()  # other threads wrote these
            _rescale_row(tile_row, tl.minimum(start, stored), factor, BLOCK_D)
            tl.debug_barrier()  # and may write them again, in the next correction
        tl.store(tile_row + offs_v, e.to(tile_ptr.dtype.element_ty), mask=offs_v < stored)
        max_n = new_max

    factor = exp(old_max - max_n, True)
    old_sum = tl.load(sum_ptr + row)
    total = old_sum * factor + sum_lanes(lane_sum, EXACT)
    if METRICS:
        moment = _moved(tl.load(moment_ptr + row), old_sum, old_max, max_n, factor)
        moment += sum_lanes(lane_moment, EXACT)
    tl.debug_barrier()  # every warp has read the old maximum and sum
    tl.store(max_ptr + row, max_n)
    tl.store(sum_ptr + row, total)
    if METRICS:
        tl.store(top_ptr + row, top)
        tl.store(moment_ptr + row, moment)
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
    top_ptr,
    moment_ptr,
    block_top_ptr,
    block_moment_ptr,
    METRICS: tl.constexpr,
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
    old_sum = tl.load(sum_ptr + row)
    total = old_sum * factor + tl.sum(block_sum * tl.exp(block_max - new_max), axis=0)
    if METRICS:
        block_row = row * stride_block + offs_b
        top = tl.max(tl.load(block_top_ptr + block_row, mask=in_b, other=_LOWEST), axis=0)
        top = tl.maximum(tl.load(top_ptr + row), top)
        block_moment = tl.load(block_moment_ptr + block_row, mask=in_b, other=0.0)
        factor_b = tl.exp(block_max - new_max)
        moment = tl.sum(_moved(block_moment, block_sum, block_max, new_max, factor_b), axis=0)
        moment += _moved(tl.load(moment_ptr + row), old_sum, old_max, new_max, factor)
    # Up to 32 blocks the reductions above need no barrier of their own: without this one a late warp
    # would read the maximum that another has stored already, and skip its part of the corrections.
    tl.debug_barrier()
    tl.store(max_ptr + row, new_max)
    tl.store(sum_ptr + row, total)
    if METRICS:
        tl.store(top_ptr + row, top)
        tl.store(moment_ptr + row, moment)

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


def _metric_rows(metrics: Tensor, dummy: Tensor) -> tuple[Tensor, Tensor]:
    """The two rows of metrics [2, rows], or of (0, rows) the dummy, which is then not touched."""
    return (metrics[0], metrics[1]) if len(metrics) else (dummy, dummy)


def fold(
    z: Tensor,
    head: Head,
    targets: Tensor,
    tile: Tensor,
    acc: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    metrics: Tensor,
    *,
    first_col: int,
    raise_by: float,
    store_tile: bool,
    acc_cols: int,
    kept_cols: int,
    block: int,
) -> None:
    """Fold the product z [rows, cols] fp32 of one tile into max_N, sum_N [rows] and metrics [2, rows], fp32.

    If `store_tile`, writes E into tile [rows, cols] (input dtype). Where m rises, `acc_cols` columns of acc
    [rows, D] fp32 and `kept_cols` columns left of the tile are corrected. block: columns of one step.
    metrics: (0, rows) if not wanted.
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
        head.bias_or_dummy,
        head.scale,
        head.softcap,
        *_metric_rows(metrics, sum_N),
        **head.switches(),
        METRICS=bool(len(metrics)),
        BLOCK_V=block,
        BLOCK_D=1024,
        num_warps=warps_for(block),
        enable_fp_fusion=False,
    )


def fold_blocks(
    blocks: Tensor,
    tile: Tensor,
    acc: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    metrics: Tensor,
    *,
    num_cols: int,
    block_cols: int,
    raise_by: float,
    store_tile: bool,
    acc_cols: int,
    kept_cols: int,
) -> None:
    """`fold` for the fused GEMM, from what it left per row and column block, as `kernel_gemm.logits_fold`."""
    _fold_blocks_kernel[(blocks.shape[1],)](
        blocks[0],
        blocks[1],
        tile,
        acc,
        max_N,
        sum_N,
        triton.cdiv(num_cols, block_cols),
        num_cols,
        blocks.stride(1),
        tile.stride(0),
        acc.stride(0),
        raise_by,
        int(store_tile),
        acc_cols,
        kept_cols,
        *_metric_rows(metrics, sum_N),
        *_metric_rows(blocks[2:], sum_N),
        METRICS=bool(len(metrics)),
        BLOCK_V=block_cols,
        BLOCK_D=1024,
        BLOCKS=triton.next_power_of_2(blocks.shape[2]),
        num_warps=2,
        enable_fp_fusion=False,
    )
