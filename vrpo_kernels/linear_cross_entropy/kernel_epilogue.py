"""The fused GEMM's epilogue: what one block of logits leaves while it is on chip.

Forward, per row and column block (reference, sum of exp) without the target, and, if wanted, E under the
reference that `kernel_fold._fold_blocks_kernel` expects. In the sweep, where the statistics are known, the
probabilities.
"""

import triton
import triton.language as tl

from vrpo_kernels.linear_cross_entropy.kernel_head import target_entry
from vrpo_kernels.linear_cross_entropy.tiles import LOWEST
from vrpo_kernels.triton_math import as_reference, cap, is_class

_NEG_INF = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _halves(z, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Left and right half of z's columns; in the accumulator's layout no value moves."""
    return tl.split(tl.permute(tl.reshape(z, (BLOCK_N, 2, BLOCK_V // 2)), (0, 2, 1)))


@triton.jit
def _slices(z, SLICES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """z's columns in so many equal parts, from left to right."""
    if SLICES == 1:
        parts = (z,)
    else:
        left, right = _halves(z, BLOCK_N, BLOCK_V)
        parts = _slices(left, SLICES // 2, BLOCK_N, BLOCK_V // 2)
        parts = parts + _slices(right, SLICES // 2, BLOCK_N, BLOCK_V // 2)
    return parts


@triton.jit
def _exponentials(z, block_max, softcap, HAS_CAP: tl.constexpr):
    """(e, logit, slope) of a slice of u; the slope only under a soft-cap."""
    slope = z
    if HAS_CAP:
        none = z == _LOWEST
        z, slope = cap(z, softcap, False)
        z = tl.where(none, _NEG_INF, z)
    return tl.exp(z - block_max[:, None]), z, slope


@triton.jit
def _store_slice(
    e,
    slope,
    tile_ptr,
    max_ptr,
    block_max,
    offs_n,
    in_n,
    start,
    num_cols,
    stride_tile,
    raise_by,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Writes E from column `start` on, under the reference that `kernel_fold._fold_blocks_kernel` expects."""
    offs_v = start + tl.arange(0, WIDTH)
    old_max = tl.load(max_ptr + offs_n, mask=in_n, other=0.0)
    used = tl.where(block_max > old_max + raise_by, block_max, old_max)
    # Two factors: exp(z - used) in one step would be a second exponential per logit.
    e = e * tl.exp(block_max - used)[:, None]
    if HAS_CAP:
        e = e * slope
    out = tile_ptr + offs_n[:, None] * stride_tile + offs_v[None, :]
    tl.store(out, e.to(tile_ptr.dtype.element_ty), mask=in_n[:, None] & (offs_v[None, :] < num_cols))


@triton.jit
def _fold_block(
    z,
    target_ptr,
    tile_ptr,
    max_ptr,
    block_max_ptr,
    block_sum_ptr,
    offs_n,
    block,
    num_rows,
    first_col,
    num_cols,
    stride_tile,
    stride_block,
    raise_by,
    store_tile,
    softcap,
    block_top_ptr,
    block_moment_ptr,
    HAS_CAP: tl.constexpr,
    METRICS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Epilogue of one [BLOCK_N, BLOCK_V] block of u: statistics; E, times the slope, if `store_tile`.

    In SLICES of its columns, one after the other: see `Tiles.slices`.
    """
    in_n = offs_n < num_rows
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + offs_n, mask=in_n, other=-1) - first_col
    if SLICES > 1:
        target = tl.where(is_class(target, num_cols), target, -1).to(tl.int32)
    use = (offs_v[None, :] < num_cols) & (offs_v[None, :] != target[:, None])
    # A bias may make -inf of u, whose capped logit is -softcap: what is no logit at all needs another mark.
    z = tl.where(use, z, _LOWEST if HAS_CAP else _NEG_INF)
    top = tl.maximum(tl.max(z, axis=1), _LOWEST)
    if HAS_CAP:
        # The cap is monotone. Of no logits at all it makes -softcap, which is above no other maximum.
        top, _ = cap(top, softcap, False)
    block_max = as_reference(top)
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    parts = _slices(z, SLICES, BLOCK_N, BLOCK_V)
    for i in tl.static_range(SLICES):
        e, logit, slope = _exponentials(parts[i], block_max, softcap, HAS_CAP)
        if i == 0:
            statistics = offs_n * stride_block + block
            tl.store(block_max_ptr + statistics, block_max, mask=in_n)
            total = tl.sum(e, axis=1)
        else:
            total += tl.sum(e, axis=1)
        if METRICS:
            part = tl.sum(e * tl.where(e > 0.0, logit - block_max[:, None], 0.0), axis=1)
            if i == 0:
                moment = part
            else:
                moment += part
        if i == SLICES - 1:
            tl.store(block_sum_ptr + statistics, total, mask=in_n)
            if METRICS:
                tl.store(block_top_ptr + statistics, top, mask=in_n)
                tl.store(block_moment_ptr + statistics, moment, mask=in_n)
        if store_tile != 0:
            _store_slice(
                e, slope, tile_ptr, max_ptr, block_max, offs_n, in_n, block * BLOCK_V + i * WIDTH, num_cols,
                stride_tile, raise_by, HAS_CAP, WIDTH,
            )  # fmt: skip


@triton.jit
def _known_slice(
    z,
    target,
    entry,
    log_sum,
    tile_ptr,
    offs_n,
    in_n,
    start,
    num_cols,
    stride_tile,
    softcap,
    HAS_CAP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """exp(logit - log_sum) * slope, and the entry at the target, for the columns from `start` on."""
    offs_v = start + tl.arange(0, WIDTH)
    at_target = offs_v[None, :] == target[:, None]
    if HAS_CAP:
        z, slope = cap(z, softcap, False)
        e = tl.where(at_target, entry[:, None], tl.exp(z - log_sum[:, None]) * slope)
    else:
        e = tl.where(at_target, -1.0, tl.exp(z - log_sum[:, None]))
    out = tile_ptr + offs_n[:, None] * stride_tile + offs_v[None, :]
    tl.store(out, e.to(tile_ptr.dtype.element_ty), mask=in_n[:, None] & (offs_v[None, :] < num_cols))


@triton.jit
def _known_block(
    z,
    target_ptr,
    tile_ptr,
    max_ptr,
    sum_ptr,
    offs_n,
    block,
    num_rows,
    first_col,
    num_cols,
    stride_tile,
    softcap,
    target_logit_ptr,
    HAS_CAP: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Epilogue of one block with the statistics known: exp(logit - m) / s * slope; -slope at the target."""
    in_n = offs_n < num_rows
    target = tl.load(target_ptr + offs_n, mask=in_n, other=-1) - first_col
    if SLICES > 1:
        target = tl.where(is_class(target, num_cols), target, -1).to(tl.int32)
    max_n = tl.load(max_ptr + offs_n, mask=in_n, other=float("inf"))  # rows past the end become 0
    sum_n = tl.load(sum_ptr + offs_n, mask=in_n, other=1.0)
    log_sum = tl.where(sum_n > 0.0, max_n + tl.log(sum_n), 0.0)  # s = 0 where there is no other class
    entry = log_sum
    if HAS_CAP:
        target_logit = tl.load(target_logit_ptr + offs_n, mask=in_n, other=0.0)
        entry = target_entry(target_logit, softcap, True, tile_ptr.dtype.element_ty)
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    parts = _slices(z, SLICES, BLOCK_N, BLOCK_V)
    for i in tl.static_range(SLICES):
        _known_slice(
            parts[i], target, entry, log_sum, tile_ptr, offs_n, in_n, block * BLOCK_V + i * WIDTH, num_cols,
            stride_tile, softcap, HAS_CAP, WIDTH,
        )  # fmt: skip


@triton.jit
def finish_block(
    z,
    target_ptr,
    tile_ptr,
    max_ptr,
    block_max_ptr,
    block_sum_ptr,
    row_block,
    block,
    num_rows,
    first_col,
    num_cols,
    stride_tile,
    stride_block,
    raise_by,
    store_tile,
    softcap,
    first_extra_ptr,
    second_extra_ptr,
    HAS_CAP: tl.constexpr,
    METRICS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Epilogue of one block: of the sweep if KNOWN (m in max_ptr, s in block_sum_ptr), else of the fold.

    The extra pointers: u_y of the rows if KNOWN, else where METRICS leave a block's maximum and moment.
    """
    offs_n = (row_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if KNOWN:
        _known_block(
            z,
            target_ptr,
            tile_ptr,
            max_ptr,
            block_sum_ptr,
            offs_n,
            block,
            num_rows,
            first_col,
            num_cols,
            stride_tile,
            softcap,
            first_extra_ptr,
            HAS_CAP,
            SLICES,
            BLOCK_N,
            BLOCK_V,
        )
    else:
        _fold_block(
            z,
            target_ptr,
            tile_ptr,
            max_ptr,
            block_max_ptr,
            block_sum_ptr,
            offs_n,
            block,
            num_rows,
            first_col,
            num_cols,
            stride_tile,
            stride_block,
            raise_by,
            store_tile,
            softcap,
            first_extra_ptr,
            second_extra_ptr,
            HAS_CAP,
            METRICS,
            SLICES,
            BLOCK_N,
            BLOCK_V,
        )
