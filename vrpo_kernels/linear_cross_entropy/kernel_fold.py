"""Row kernels of the row-linear algorithm: fold a logit tile into the online softmax, finish the rows.

State of row n, all fp32: max_N (the reference m), sum_N (s = sum of exp(z - m) over the classes seen so
far *without the target*), target_logit_N (z_y). A fold is the same machine code whether or not
gradients are wanted: `store_tile`, `acc_cols` and `kept_cols` are run-time values that switch
stores off, so the nll cannot differ between the modes. Launchers turn FMA contraction off for the same
reason.
"""

import triton
import triton.language as tl
from torch import Tensor

_NEG_INF = tl.constexpr(float("-inf"))


@triton.jit
def _rescale_row(ptr, num_cols, factor, BLOCK: tl.constexpr):
    """Multiply `num_cols` stored values from `ptr` on by one scalar, rounding to their dtype."""
    for start in range(0, num_cols, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        in_row = offs < num_cols
        value = tl.load(ptr + offs, mask=in_row, other=0.0).to(tl.float32)
        tl.store(ptr + offs, (value * factor).to(ptr.dtype.element_ty), mask=in_row)


@triton.jit
def _raise_reference(old_max, tile_max, raise_by):
    """(new m, finite stand-in for it, factor for everything summed under the old m, raised?)."""
    raised = tile_max > old_max + raise_by
    new_max = tl.where(raised, tile_max, old_max)
    reference = tl.where(new_max == _NEG_INF, 0.0, new_max)
    return new_max, reference, tl.exp(old_max - reference), raised & (old_max != _NEG_INF)


@triton.jit(do_not_specialize=["store_tile", "acc_cols", "kept_cols"])
def _fold_kernel(
    z_ptr,
    target_ptr,
    tile_ptr,
    acc_ptr,
    max_ptr,
    sum_ptr,
    target_logit_ptr,
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

    Grid (rows,). m rises only when the tile beats it by `raise_by` (in nats): E then stays below
    exp(raise_by), and the correction of what was written under the old m (`acc_cols` of the
    accumulator, `kept_cols` of kept E before this tile) is rare after the first tile.
    FLOP: about 6 per logit. Bytes: 4 read + size of E written, per logit.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    in_v = offs_v < num_cols
    target = tl.load(target_ptr + row) - first_col
    has_target = (target >= 0) & (target < num_cols)
    z_row = z_ptr + row * stride_z
    z = tl.load(z_row + offs_v, mask=in_v, other=_NEG_INF)
    z = tl.where(offs_v == target, _NEG_INF, z)
    target_logit = tl.load(z_row + target, mask=has_target, other=0.0)
    tl.store(target_logit_ptr + row, target_logit, mask=has_target)

    old_max = tl.load(max_ptr + row)
    new_max, reference, factor, rescale = _raise_reference(old_max, tl.max(z, axis=0), raise_by)
    e = tl.exp(z - reference)
    tl.store(max_ptr + row, new_max)
    tl.store(sum_ptr + row, tl.load(sum_ptr + row) * factor + tl.sum(e, axis=0))

    tile_row = tile_ptr + row * stride_tile
    tl.store(tile_row + offs_v, e.to(tile_ptr.dtype.element_ty), mask=in_v & (store_tile != 0))
    if rescale:
        _rescale_row(acc_ptr + row * stride_acc, acc_cols, factor, BLOCK_D)
        _rescale_row(tile_row - kept_cols, kept_cols, factor, BLOCK_D)


@triton.jit(do_not_specialize=["store_tile", "acc_cols", "kept_cols"])
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
    """As `_fold_kernel` after the fused GEMM: merges the (max, sum) of a row's column blocks.

    Grid (rows,). The GEMM wrote block b of E under exp(z - used_b), used_b = its own maximum where
    that beats the old m by `raise_by`, else the old m; only rows that raised are touched again.
    """
    row = tl.program_id(0).to(tl.int64)
    offs_b = tl.arange(0, BLOCKS)
    in_b = offs_b < num_blocks
    max_row = block_max_ptr + row * stride_block
    block_max = tl.load(max_row + offs_b, mask=in_b, other=_NEG_INF)
    block_sum = tl.load(block_sum_ptr + row * stride_block + offs_b, mask=in_b, other=0.0)

    old_max = tl.load(max_ptr + row)
    tile_max = tl.max(block_max, axis=0)
    new_max, reference, factor, rescale = _raise_reference(old_max, tile_max, raise_by)
    tile_sum = tl.sum(block_sum * tl.exp(block_max - reference), axis=0)
    tl.store(max_ptr + row, new_max)
    tl.store(sum_ptr + row, tl.load(sum_ptr + row) * factor + tile_sum)

    tile_row = tile_ptr + row * stride_tile
    if (tile_max > old_max + raise_by) & (store_tile != 0):
        for block in range(0, num_blocks):
            seen = tl.load(max_row + block)
            used = tl.where(seen > old_max + raise_by, seen, old_max)
            start = block * BLOCK_V
            width = tl.minimum(num_cols - start, BLOCK_V)
            _rescale_row(tile_row + start, width, tl.exp(used - reference), BLOCK_V)
    if rescale:
        _rescale_row(acc_ptr + row * stride_acc, acc_cols, factor, BLOCK_D)
        _rescale_row(tile_row - kept_cols, kept_cols, factor, BLOCK_D)


@triton.jit
def _finish_rows_kernel(
    max_ptr,
    sum_ptr,
    target_logit_ptr,
    nll_ptr,
    log_rest_ptr,
    log_odds_ptr,
    N,
    BLOCK_N: tl.constexpr,
):
    """Grid (ceil(N / BLOCK_N),): nll, log-sum-exp without the target, log-odds against the target."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    max_n = tl.load(max_ptr + offs_n, mask=in_n, other=0.0)
    sum_n = tl.load(sum_ptr + offs_n, mask=in_n, other=1.0)
    target_logit = tl.load(target_logit_ptr + offs_n, mask=in_n, other=0.0)
    log_rest = max_n + tl.log(sum_n)
    log_odds = log_rest - target_logit
    # softplus(d) = max(d, 0) + log1p(exp(-|d|)); log1p(x) = x log(1 + x) / ((1 + x) - 1) is exact to
    # the last bits for every x in (0, 1], and Triton has no log1p that the interpreter can run.
    small = tl.exp(-tl.abs(log_odds))
    one_plus = 1.0 + small
    gap = one_plus - 1.0
    log1p = tl.where(gap == 0.0, small, small * (tl.log(one_plus) / tl.where(gap == 0.0, 1.0, gap)))
    tl.store(nll_ptr + offs_n, tl.maximum(log_odds, 0.0) + log1p, mask=in_n)
    tl.store(log_rest_ptr + offs_n, log_rest, mask=in_n)
    tl.store(log_odds_ptr + offs_n, log_odds, mask=in_n)


@triton.jit
def _finish_hidden_kernel(
    acc_ptr,
    weight_ptr,
    target_ptr,
    sum_ptr,
    log_odds_ptr,
    D,
    stride_acc,
    stride_weight,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows, ceil(D / BLOCK_D)), in place: acc = acc * q / s - q * W[target], q = 1 - p_y."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    q = _sigmoid(tl.load(log_odds_ptr + row))
    total = tl.load(sum_ptr + row)
    per_sum = tl.where(total > 0.0, q / total, 0.0)
    acc_row = acc_ptr + row * stride_acc + offs_d
    target_row = weight_ptr + tl.load(target_ptr + row) * stride_weight + offs_d
    acc = tl.load(acc_row, mask=in_d, other=0.0)
    head = tl.load(target_row, mask=in_d, other=0.0).to(tl.float32)
    tl.store(acc_row, acc * per_sum - q * head, mask=in_d)


@triton.jit
def _sigmoid(value):
    """1 / (1 + exp(-d)) with full relative accuracy down to the smallest q."""
    small = tl.exp(-tl.abs(value))
    return tl.where(value >= 0.0, 1.0, small) / (1.0 + small)


@triton.jit
def _finish_kept_kernel(
    kept_ptr,
    target_ptr,
    sum_ptr,
    V,
    stride_kept,
    normalise: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (rows,): kept E becomes s * (p - onehot) / q, by writing -s (or -1) at the target.

    normalise (fp16, where s can exceed 65504): the row is divided by s as well.
    """
    row = tl.program_id(0).to(tl.int64)
    kept_row = kept_ptr + row * stride_kept
    total = tl.load(sum_ptr + row)
    if normalise:
        _rescale_row(kept_row, V, tl.where(total > 0.0, 1.0 / total, 0.0), BLOCK_V)
        total = 1.0
        # The row was written in vectors by many threads, the target entry belongs to one of them.
        tl.debug_barrier()
    tl.store(kept_row + tl.load(target_ptr + row), (-total).to(kept_ptr.dtype.element_ty))


@triton.jit
def _probabilities_kernel(
    z_ptr,
    target_ptr,
    log_rest_ptr,
    tile_ptr,
    first_col,
    num_cols,
    stride_z,
    stride_tile,
    BLOCK_V: tl.constexpr,
):
    """Grid (rows,): with the log-sum-exp known, E = exp(z - r), and -1 at the target."""
    row = tl.program_id(0).to(tl.int64)
    offs_v = tl.arange(0, BLOCK_V)
    in_v = offs_v < num_cols
    target = tl.load(target_ptr + row) - first_col
    z = tl.load(z_ptr + row * stride_z + offs_v, mask=in_v, other=_NEG_INF)
    e = tl.where(offs_v == target, -1.0, tl.exp(z - tl.load(log_rest_ptr + row)))
    tl.store(tile_ptr + row * stride_tile + offs_v, e.to(tile_ptr.dtype.element_ty), mask=in_v)


@triton.jit
def _scale_rows_kernel(
    value_ptr,
    gradient_ptr,
    log_odds_ptr,
    sum_ptr,
    out_ptr,
    D,
    stride_value,
    stride_out,
    HAS_ODDS: tl.constexpr,
    HAS_SUM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (rows, ceil(D / BLOCK_D)): out = value * g [* q] [/ s], in fp32, rounded once."""
    row = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_d = offs_d < D
    scale = tl.load(gradient_ptr + row).to(tl.float32)
    if HAS_ODDS:
        scale *= _sigmoid(tl.load(log_odds_ptr + row))
    if HAS_SUM:
        total = tl.load(sum_ptr + row)
        scale = tl.where(total > 0.0, scale / total, 0.0)
    value = tl.load(value_ptr + row * stride_value + offs_d, mask=in_d, other=0.0).to(tl.float32)
    tl.store(
        out_ptr + row * stride_out + offs_d,
        (value * scale).to(out_ptr.dtype.element_ty),
        mask=in_d,
    )


def _power_of_two(width: int, low: int, high: int) -> int:
    return max(low, min(high, triton.next_power_of_2(width)))


def _warps(block: int) -> int:
    """Warps that leave each thread about 32 fp32 values of a row."""
    return _power_of_two(block // 1024, 1, 16)


def fold(
    z: Tensor,
    targets: Tensor,
    tile: Tensor,
    acc: Tensor,
    state: tuple[Tensor, Tensor, Tensor],
    *,
    first_col: int,
    block: int,
    raise_by: float,
    store_tile: bool,
    kept_cols: int,
) -> None:
    """Fold logits z [rows, cols] fp32 into `state` = (max, sum, target_logit), each [rows] fp32.

    tile, acc: where E goes and what is corrected when a maximum rises; any tensors of the right
    dtype and stride when `store_tile` is false. block: power of two >= cols, the same for every tile.
    """
    _fold_kernel[(z.shape[0],)](
        z,
        targets,
        tile,
        acc,
        *state,
        first_col,
        z.shape[1],
        z.stride(0),
        tile.stride(0),
        acc.stride(0),
        raise_by,
        int(store_tile),
        acc.shape[1] if store_tile else 0,
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
    state: tuple[Tensor, Tensor, Tensor],
    *,
    num_blocks: int,
    num_cols: int,
    block_cols: int,
    raise_by: float,
    store_tile: bool,
    kept_cols: int,
) -> None:
    """`fold` for the fused GEMM, from its (max, sum) per row and column block [rows, blocks] fp32."""
    _fold_blocks_kernel[(block_max.shape[0],)](
        block_max,
        block_sum,
        tile,
        acc,
        state[0],
        state[1],
        num_blocks,
        num_cols,
        block_max.stride(0),
        tile.stride(0),
        acc.stride(0),
        raise_by,
        int(store_tile),
        acc.shape[1] if store_tile else 0,
        kept_cols,
        BLOCK_V=block_cols,
        BLOCK_D=1024,
        BLOCKS=triton.next_power_of_2(block_max.shape[1]),
        num_warps=2,
        enable_fp_fusion=False,
    )


def finish_rows(
    state: tuple[Tensor, Tensor, Tensor], nll: Tensor, log_rest: Tensor, log_odds: Tensor
) -> None:
    """From the folded state to nll, r = m + log s and d = r - z_y; all [rows] fp32."""
    num_rows = nll.shape[0]
    _finish_rows_kernel[(triton.cdiv(num_rows, 128),)](
        *state,
        nll,
        log_rest,
        log_odds,
        num_rows,
        BLOCK_N=128,
        num_warps=4,
        enable_fp_fusion=False,
    )


def finish_hidden(acc: Tensor, weight: Tensor, targets: Tensor, sum_N: Tensor, log_odds: Tensor) -> None:
    """acc = E @ W [rows, D] fp32 becomes the unscaled gradient (p - onehot) @ W, in place."""
    block = _power_of_two(acc.shape[1], 128, 1024)
    _finish_hidden_kernel[(acc.shape[0], triton.cdiv(acc.shape[1], block))](
        acc,
        weight,
        targets,
        sum_N,
        log_odds,
        acc.shape[1],
        acc.stride(0),
        weight.stride(0),
        BLOCK_D=block,
        num_warps=4,
    )


def finish_kept(kept: Tensor, targets: Tensor, sum_N: Tensor, *, normalise: bool) -> None:
    """Kept E [rows, V] receives its target entries: -s, or -1 with the row divided by s."""
    _finish_kept_kernel[(kept.shape[0],)](
        kept,
        targets,
        sum_N,
        kept.shape[1],
        kept.stride(0),
        normalise=normalise,
        BLOCK_V=4096 if normalise else 16,
        num_warps=8 if normalise else 1,
    )


def probabilities(
    z: Tensor, targets: Tensor, log_rest: Tensor, tile: Tensor, *, first_col: int, block: int
) -> None:
    """tile = exp(z - r) with -1 at the target: q * tile is p - onehot. z [rows, cols] fp32."""
    _probabilities_kernel[(z.shape[0],)](
        z,
        targets,
        log_rest,
        tile,
        first_col,
        z.shape[1],
        z.stride(0),
        tile.stride(0),
        BLOCK_V=block,
        num_warps=_warps(block),
    )


def scale_rows(
    value: Tensor,
    gradient: Tensor,
    out: Tensor,
    *,
    log_odds: Tensor | None = None,
    sum_N: Tensor | None = None,
) -> None:
    """out[n] = value[n] * gradient[n] [* sigmoid(log_odds[n])] [/ sum[n]], one rounding at the end."""
    block = _power_of_two(value.shape[1], 128, 1024)
    _scale_rows_kernel[(value.shape[0], triton.cdiv(value.shape[1], block))](
        value,
        gradient,
        log_odds,
        sum_N,
        out,
        value.shape[1],
        value.stride(0),
        out.stride(0),
        HAS_ODDS=log_odds is not None,
        HAS_SUM=sum_N is not None,
        BLOCK_D=block,
        num_warps=4,
    )
