"""The Triton backend of linear_cross_entropy: the row-linear algorithm over tiles. Contract: `op.py`.

    forward, per row chunk and vocabulary tile:   z = x @ W_t^T;  E = exp(z - m), target column 0, folded into
                                                  (m, s) online;  acc += E @ W_t
    after the sweep:                              nll = softplus(m + log s - z_y);  expected = acc / s
    dW from kept tiles:                           dW_t = (E_t, target entry -s)^T @ (dnll * q / s * x)
    sweep, statistics known:                      P = exp(z - m) / s, target entry -1;
                                                  dx = dnll * q * (P @ W);  dW_t = P_t^T @ (dnll * q * x)

All products have 16-bit factors and fp32 sums; a slice of dW is summed over all rows in fp32 and rounded
once. No host synchronisation, no data-dependent shapes, no atomics. Tile shapes never depend on which
gradients are wanted.
"""

import functools

import torch
from torch import Tensor

from vrpo_kernels.linear_cross_entropy import kernel_fold, kernel_gemm
from vrpo_kernels.linear_cross_entropy.tiles import GEMMS, LOWEST, RAISE_BY, Tiles, tiles_for

_LANES = 64  # kept tiles are padded to whole 128-byte lines per row


def resolve_gemm(requested: str, dtype: torch.dtype) -> str:
    """ "auto" -> "cublas", the default argued in `tiles.py`; other names are checked against GEMMS.

    Errors:
        ValueError if the name is unknown, or "fused" is asked for in float32.
    """
    if requested == "auto":
        return "cublas"
    if requested not in GEMMS:
        raise ValueError(f"gemm must be one of {('auto', *GEMMS)} on the triton backend, got {requested!r}")
    if requested == "fused" and dtype is torch.float32:
        raise ValueError("gemm 'fused' needs bfloat16 or float16 inputs (tensor cores), got float32")
    return requested


def kept_shapes(num_rows: int, num_classes: int, gemm: str, input_dtype: torch.dtype):
    """((shape, dtype) of the kept tiles, (shape, dtype) of their shifts, which this backend has none of)."""
    padded = (num_classes + _LANES - 1) // _LANES * _LANES
    return ((num_rows, padded), input_dtype), ((0, 0), torch.float32)


@functools.cache
def _device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, number of SMs); the interpreter poses as a Hopper GPU with four."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def _tiles(hidden: Tensor, gemm: str) -> Tiles:
    return tiles_for(_device_facts(hidden.device)[0], hidden.element_size(), gemm)


def _spans(total: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def _row_chunks(total: int, size: int) -> list[tuple[int, int]]:
    """Row chunks of nearly equal size, so that the last one does not run a GEMM on a few rows."""
    chunks = (total + size - 1) // size
    even = (total + chunks - 1) // chunks if chunks else size
    return _spans(total, (even + 127) // 128 * 128)


def _width(size: int, limit: int) -> int:
    """Columns of a workspace: the tile, or what there is, in whole lines."""
    return (min(size, limit) + _LANES - 1) // _LANES * _LANES


def _product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out (fp32) = a @ b, or out += a @ b, summed in fp32. Output arguments keep autocast away."""
    if a.dtype is torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, torch.float32, out=out)
        else:
            torch.mm(a, b, torch.float32, out=out)
    else:  # the interpreter's CPU tensors: PyTorch has no 16-bit CPU product with an fp32 result
        _product(a.float(), b.float(), out, accumulate=accumulate)


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N,) fp32 logit of each row's target, the same bits as in `forward`; 0 for a negative target."""
    out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if out.numel():
        kernel_fold.target_logits(_rows(hidden), _rows(weight), targets.contiguous(), out)
    return out


def _rows(matrix: Tensor) -> Tensor:
    """The kernels step along rows with stride 1; any row stride will do."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    gemm: str,
    want_dhidden: bool,
    keep_tiles: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(nll, statistics, expected, kept, no shifts); see `op._forward`. tiles: for the tile sweep only."""
    tiles = _tiles(hidden, gemm) if tiles is None else tiles
    hidden, weight, targets = _rows(hidden), _rows(weight), targets.contiguous()
    (num_rows, num_hidden), num_classes = hidden.shape, weight.shape[0]
    nll = hidden.new_empty(num_rows, dtype=torch.float32)
    statistics = hidden.new_empty((3, num_rows), dtype=torch.float32)
    expected_shape = (num_rows, num_hidden) if want_dhidden else (0, 0)
    expected = hidden.new_empty(expected_shape, dtype=torch.float32)
    (kept_shape, _), _ = kept_shapes(num_rows, num_classes, gemm, hidden.dtype)
    kept = hidden.new_empty(kept_shape if keep_tiles else (0, 0))
    if num_rows:
        kernel_fold.target_logits(hidden, weight, targets, statistics[0])
        statistics[1].fill_(LOWEST)
        statistics[2].zero_()
        _forward_tiles(hidden, weight, targets, statistics, expected, kept, tiles)
        kernel_fold.finish_rows(statistics, nll)
        if want_dhidden:
            kernel_fold.finish_expected(expected, statistics[2])
        if keep_tiles:
            kept[:, num_classes:].zero_()  # never read, but outputs of an op are to be deterministic
            kernel_fold.finish_kept(kept[:, :num_classes], targets, statistics[2])
    return nll, statistics, expected, kept, hidden.new_empty((0, 0), dtype=torch.float32)


def _forward_tiles(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    expected: Tensor,
    kept: Tensor,
    tiles: Tiles,
) -> None:
    """Fold every tile into statistics[1:], expected (if not empty) and kept (if not empty)."""
    num_classes = weight.shape[0]
    chunks = _row_chunks(hidden.shape[0], tiles.rows)
    rows = chunks[0][1]
    cols = tiles.forward_cols(rows)
    width = _width(cols, num_classes)
    store_tile = bool(expected.numel() or kept.numel())
    # A pass without gradients launches the same kernels with stores switched off: the dummies have the
    # dtype, alignment and stride class of what they stand for, so that the same machine code is launched.
    tile_rows = rows if expected.numel() and not kept.numel() else 1
    workspace = hidden.new_empty((tile_rows, width))
    acc_dummy = statistics.new_empty((1, _width(hidden.shape[1], hidden.shape[1])))
    if tiles.gemm == "fused":
        blocks = (cols + tiles.block_cols - 1) // tiles.block_cols
        block_max, block_sum = statistics.new_empty((2, rows, blocks))
    else:
        logits = statistics.new_empty((rows, width))
    for top, bottom in chunks:
        size = bottom - top
        x, y = hidden[top:bottom], targets[top:bottom]
        max_N, sum_N = statistics[1, top:bottom], statistics[2, top:bottom]
        acc = expected[top:bottom] if expected.numel() else acc_dummy
        for first, last in _spans(num_classes, cols):
            if kept.numel():
                tile = kept[top:bottom, first:last]
            else:
                tile = workspace[: min(size, tile_rows), : last - first]
            fold = {
                "raise_by": RAISE_BY,
                "store_tile": store_tile,
                "acc_cols": expected.shape[1] if first else 0,
                "kept_cols": first if kept.numel() else 0,
            }
            if tiles.gemm == "fused":
                kernel_gemm.logits_fold(
                    x,
                    weight,
                    y,
                    tile,
                    max_N,
                    block_max[:size],
                    block_sum[:size],
                    first_col=first,
                    num_cols=last - first,
                    raise_by=RAISE_BY,
                    store_tile=store_tile,
                    tiles=tiles,
                    num_programs=_device_facts(hidden.device)[1],
                )
                kernel_fold.fold_blocks(
                    block_max[:size],
                    block_sum[:size],
                    tile,
                    acc,
                    max_N,
                    sum_N,
                    num_cols=last - first,
                    block_cols=tiles.block_cols,
                    **fold,
                )
            else:
                z = logits[:size, : last - first]
                _product(x, weight[first:last].t(), z, accumulate=False)
                block = _power_of_two(cols)
                kernel_fold.fold(z, y, tile, acc, max_N, sum_N, first_col=first, block=block, **fold)
            if expected.numel():
                _product(tile, weight[first:last], acc, accumulate=first > 0)


def _power_of_two(width: int) -> int:
    return 1 << (width - 1).bit_length()


def dhidden(dnll: Tensor, expected: Tensor, statistics: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N, D) gradient of hidden from what the forward pass left; see `op._dhidden`."""
    out = weight.new_empty(expected.shape)
    if out.numel():
        kernel_fold.dhidden(expected, _rows(weight), targets.contiguous(), dnll, statistics.contiguous(), out)
    return out


def dweight(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    kept: Tensor,
    kept_shift: Tensor,
    *,
    gemm: str,
    tiles: Tiles | None = None,
) -> Tensor:
    """(V, D) gradient of weight from kept tiles; see `op._dweight`. tiles: for the tile sweep only."""
    tiles = _tiles(hidden, gemm) if tiles is None else tiles
    out = weight.new_empty(weight.shape)
    if not dnll.numel():
        return out.zero_()
    scaled = hidden.new_empty(hidden.shape)
    per_sum = kept.dtype is not torch.float16
    kernel_fold.scale_rows(_rows(hidden), dnll, statistics.contiguous(), scaled, per_sum=per_sum)
    _write_slices(out, scaled, kept, tiles.slice_cols)
    return out


def _write_slices(out: Tensor, scaled: Tensor, kept: Tensor, slice_cols: int) -> None:
    """out[slice] = kept[:, slice]^T @ scaled: K = N, one fp32 sum over all rows, one rounding."""
    if out.dtype is torch.float32:
        _product(kept[:, : out.shape[0]].t(), scaled, out, accumulate=False)
        return
    # PyTorch lets cuBLAS add partial sums of a 16-bit result in 16 bits, hence the fp32 slice.
    partial = scaled.new_empty((min(slice_cols, out.shape[0]), out.shape[1]), dtype=torch.float32)
    for first, last in _spans(out.shape[0], slice_cols):
        part = partial[: last - first]
        _product(kept[:, first:last].t(), scaled, part, accumulate=False)
        out[first:last].copy_(part)


def sweep(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    *,
    gemm: str,
    want_dhidden: bool,
    want_dweight: bool,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Both gradients in one pass over the vocabulary; see `op._sweep`. tiles: for the tile sweep only."""
    tiles = _tiles(hidden, gemm) if tiles is None else tiles
    hidden, weight, targets = _rows(hidden), _rows(weight), targets.contiguous()
    statistics = statistics.contiguous()
    out_hidden = hidden.new_empty(hidden.shape if want_dhidden else (0, 0))
    out_weight = weight.new_empty(weight.shape if want_dweight else (0, 0))
    if not dnll.numel():
        return out_hidden, out_weight.zero_()
    acc = statistics.new_empty(out_hidden.shape)
    scaled = hidden.new_empty(hidden.shape if want_dweight else (0, 0))
    if want_dweight:
        kernel_fold.scale_rows(hidden, dnll, statistics, scaled, per_sum=False)
    _sweep_tiles(hidden, weight, targets, statistics, acc, scaled, out_weight, tiles)
    if want_dhidden:
        kernel_fold.scale_rows(acc, dnll, statistics, out_hidden, per_sum=False)
    return out_hidden, out_weight


def _sweep_tiles(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    acc: Tensor,
    scaled: Tensor,
    out_weight: Tensor,
    tiles: Tiles,
) -> None:
    """acc = P @ weight (if not empty) and out_weight = P^T @ scaled (if not empty), tile by tile."""
    num_classes = weight.shape[0]
    chunks = _row_chunks(hidden.shape[0], tiles.sweep_rows)
    rows = chunks[0][1]
    cols = tiles.sweep_tile_cols(rows)
    width = _width(cols, num_classes)
    logits = statistics.new_empty((rows, width))
    workspace = hidden.new_empty((rows, width))
    partial = statistics.new_empty((width if out_weight.numel() else 0, hidden.shape[1]))
    for first, last in _spans(num_classes, cols):
        head = weight[first:last]
        for top, bottom in chunks:
            z = logits[: bottom - top, : last - first]
            tile = workspace[: bottom - top, : last - first]
            _product(hidden[top:bottom], head.t(), z, accumulate=False)
            kernel_fold.probabilities(
                z,
                targets,
                statistics,
                tile,
                first_row=top,
                first_col=first,
                block=_power_of_two(cols),
            )
            if acc.numel():
                _product(tile, head, acc[top:bottom], accumulate=first > 0)
            if out_weight.numel():
                part = partial[: last - first]
                _product(tile.t(), scaled[top:bottom], part, accumulate=top > 0)
        if out_weight.numel():
            out_weight[first:last].copy_(partial[: last - first])
