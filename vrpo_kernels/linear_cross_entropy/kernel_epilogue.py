"""The fused GEMM's epilogue: what one block of logits leaves while it is on chip.

Forward, per row and column block (reference, sum of exp) without the target, and, if wanted, E under the
reference that `kernel_fold._fold_blocks_kernel` expects. In the sweep, where the statistics are known, the
probabilities. What belongs together comes as a tuple:

    span: (num_rows, first_col, num_cols), the rows and classes of the tile.
    tile: (tile_ptr, stride_tile), where E or the probabilities go.
    rows: pointers to targets and m; a block's reference and sum (or s of the rows, if they are known); its
        largest logit (or u_y of the rows) and moment.
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
def _store_slice(e, offs_n, offs_v, span, tile):
    """Writes one slice into the tile, in its dtype."""
    num_rows, _, num_cols = span
    tile_ptr, stride_tile = tile
    out = tile_ptr + offs_n[:, None] * stride_tile + offs_v[None, :]
    inside = (offs_n < num_rows)[:, None] & (offs_v[None, :] < num_cols)
    tl.store(out, e.to(tile_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _fold_block(
    z,
    offs_n,
    block,
    span,
    tile,
    rows,
    switches,
    softcap,
    HAS_CAP: tl.constexpr,
    METRICS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Epilogue of one [BLOCK_N, BLOCK_V] block of u: statistics; E, times the slope, if `store_tile`.

    In SLICES of its columns, one after the other: see `Tiles.slices`.
    """
    num_rows, first_col, num_cols = span
    target_ptr, max_ptr, block_max_ptr, block_sum_ptr, block_top_ptr, block_moment_ptr = rows
    stride_block, raise_by, store_tile = switches
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
            old_max = tl.load(max_ptr + offs_n, mask=in_n, other=0.0)
            # What `kernel_fold._fold_blocks_kernel` expects E to be under.
            used = tl.where(block_max > old_max + raise_by, block_max, old_max)
            # Two factors: exp(z - used) in one step would be a second exponential per logit.
            e = e * tl.exp(block_max - used)[:, None]
            if HAS_CAP:
                e = e * slope
            _store_slice(e, offs_n, block * BLOCK_V + i * WIDTH + tl.arange(0, WIDTH), span, tile)


@triton.jit
def _known_block(
    z,
    offs_n,
    block,
    span,
    tile,
    rows,
    softcap,
    HAS_CAP: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Epilogue of one block with the statistics known: exp(logit - m) / s * slope; -slope at the target."""
    num_rows, first_col, num_cols = span
    target_ptr, max_ptr, _, sum_ptr, target_logit_ptr, _ = rows
    in_n = offs_n < num_rows
    target = tl.load(target_ptr + offs_n, mask=in_n, other=-1) - first_col
    if SLICES > 1:
        target = tl.where(is_class(target, num_cols), target, -1).to(tl.int32)
    max_n = tl.load(max_ptr + offs_n, mask=in_n, other=float("inf"))  # rows past the end become 0
    sum_n = tl.load(sum_ptr + offs_n, mask=in_n, other=1.0)
    log_sum = tl.where(sum_n > 0.0, max_n + tl.log(sum_n), 0.0)  # s = 0 where there is no other class
    if HAS_CAP:
        target_logit = tl.load(target_logit_ptr + offs_n, mask=in_n, other=0.0)
        entry = target_entry(target_logit, softcap, True, tile[0].dtype.element_ty)
    WIDTH: tl.constexpr = BLOCK_V // SLICES
    parts = _slices(z, SLICES, BLOCK_N, BLOCK_V)
    for i in tl.static_range(SLICES):
        offs_v = block * BLOCK_V + i * WIDTH + tl.arange(0, WIDTH)
        at_target = offs_v[None, :] == target[:, None]
        if HAS_CAP:
            logit, slope = cap(parts[i], softcap, False)
            e = tl.where(at_target, entry[:, None], tl.exp(logit - log_sum[:, None]) * slope)
        else:
            e = tl.where(at_target, -1.0, tl.exp(parts[i] - log_sum[:, None]))
        _store_slice(e, offs_n, offs_v, span, tile)


@triton.jit
def finish_block(
    z,
    row_block,
    block,
    span,
    tile,
    rows,
    switches,
    softcap,
    HAS_CAP: tl.constexpr,
    METRICS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Epilogue of one block: of the sweep if KNOWN, where the statistics are there, else of the fold.

    switches: (stride_block, raise_by, store_tile), of the fold.
    """
    offs_n = (row_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if KNOWN:
        _known_block(z, offs_n, block, span, tile, rows, softcap, HAS_CAP, SLICES, BLOCK_N, BLOCK_V)
    else:
        _fold_block(
            z, offs_n, block, span, tile, rows, switches, softcap, HAS_CAP, METRICS, SLICES, BLOCK_N, BLOCK_V
        )
