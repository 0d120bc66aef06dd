"""The Triton backend of linear_cross_entropy: the row-linear algorithm over tiles. Contract: `op.py`.

    forward, per row chunk and vocabulary tile:   z = x @ W_t^T;  E = exp(z - m), target column 0, folded into
                                                  (m, s) online;  acc += E @ W_t
    after the sweep:                              nll = softplus(m + log s - z_y);  expected = acc / s
    dW from kept tiles:                           dW = (E, target entry -s)^T @ (dnll * q / s * x)
    sweep, statistics known:                      P = exp(z - m) / s, target entry -1;
                                                  dx = dnll * q * (P @ W);  dW_t = P_t^T @ (dnll * q * x)

All products have 16-bit factors and fp32 sums; dW is summed over all rows in fp32 and rounded once. No host
synchronisation, no data-dependent shapes, no atomics. Tile shapes never depend on which gradients are wanted.
"""

import contextlib
import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo_kernels.backend import on_device
from vrpo_kernels.linear_cross_entropy import kernel_fold, kernel_gemm, kernel_rows
from vrpo_kernels.linear_cross_entropy.tiles import GEMMS, LOWEST, RAISE_BY, Tiles, chunk_rows, tiles_for

_LANES = 64  # kept tiles are padded to whole 128-byte lines per row


def resolve_gemm(requested: str, dtype: torch.dtype, device: torch.device) -> str:
    """ "auto" -> the default of the device and dtype (`tiles.py`); other names are checked against GEMMS.

    While torch.compile traces, "auto" stays: the op settles it, because a device cannot be asked there.

    Errors:
        ValueError if the name is unknown, or "fused" is asked for in float32.
    """
    if requested == "auto":
        if torch.compiler.is_compiling():
            return "auto"
        return tiles_for(_device_facts(device)[0], dtype.itemsize).gemm
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


def _plain_only(bias, softcap, scale, want_metrics=False) -> None:
    if bias is not None or softcap or scale != 1.0 or want_metrics:
        raise ValueError("this backend does not compute bias, softcap, scale or metrics yet; use 'reference'")


@on_device
def target_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """(N,) fp32 logit of each row's target, the same bits as in `forward`; 0 if absent, NaN out of range."""
    _plain_only(bias, 0.0, scale)
    out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if out.numel():
        kernel_rows.target_logits(_rows(hidden), _rows(weight), targets.contiguous(), out)
    return out


def _rows(matrix: Tensor) -> Tensor:
    """The kernels step along rows with stride 1; any row stride will do."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


@on_device
def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    gemm: str,
    want_dhidden: bool,
    keep_tiles: bool,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    want_metrics: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(nll, statistics, expected, kept, no shifts, metrics); see `op._forward`. tiles: for the tile sweep."""
    _plain_only(bias, softcap, scale, want_metrics)
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
        kernel_rows.target_logits(hidden, weight, targets, statistics[0])
        statistics[1].fill_(LOWEST)
        statistics[2].zero_()
        _forward_tiles(hidden, weight, targets, statistics, expected, kept, tiles)
        kernel_fold.finish_rows(statistics, nll)
        if want_dhidden:
            kernel_rows.finish_expected(expected, statistics[2])
        if keep_tiles:
            kept[:, num_classes:].zero_()  # never read, but outputs of an op are to be deterministic
            kernel_fold.finish_kept(kept[:, :num_classes], targets, statistics[2])
    nothing = (hidden.new_empty((0, 0), dtype=torch.float32) for _ in range(2))
    return nll, statistics, expected, kept, *nothing


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
    num_rows, num_classes = hidden.shape[0], weight.shape[0]
    num_sms = _device_facts(hidden.device)[1]
    chunks = _spans(num_rows, chunk_rows(num_rows, tiles.rows, min(tiles.cols, num_classes), num_sms))
    cols = tiles.forward_cols(chunks[0][1], num_sms)
    workspace = _Workspace.make(hidden, weight, statistics, expected, kept, tiles, chunks[0][1], cols)
    first_cols = min(tiles.first_tile_cols(chunks[0][1], num_sms), cols, num_classes)
    rest = [(first_cols + left, first_cols + right) for left, right in _spans(num_classes - first_cols, cols)]
    spans = [(0, first_cols), *rest] if first_cols else rest
    for top, bottom in chunks:
        rows = slice(top, bottom)
        for first, last in spans:
            _forward_tile(
                hidden[rows],
                weight,
                targets[rows],
                statistics[:, rows],
                expected[rows] if expected.numel() else workspace.acc,
                kept[rows, first:last] if kept.numel() else workspace.tile[: bottom - top, : last - first],
                workspace,
                tiles,
                first=first,
                last=last,
                acc_cols=expected.shape[1],
                keep=bool(kept.numel()),
            )


@dataclass(frozen=True)
class _Workspace:
    """Tile-sized memory of a forward pass.

    A pass without gradients launches the same kernels with stores switched off: the dummies have the
    dtype, alignment and stride class of what they stand for, so that the same machine code is launched.

    Attributes:
        logits: (rows, width) fp32, or (0, 0) in the fused form.
        tile: (rows, width) in the input dtype, or (1, width) where E is kept or not wanted.
        blocks: (2, rows, column blocks) fp32 in the fused form, else empty.
        acc: (1, D) fp32, stands for the accumulator where there is none.
    """

    logits: Tensor
    tile: Tensor
    blocks: Tensor
    acc: Tensor

    @classmethod
    def make(cls, hidden, weight, statistics, expected, kept, tiles: Tiles, rows: int, cols: int):
        """For row chunks of up to `rows` rows and vocabulary tiles of up to `cols` classes."""
        width = _width(cols, weight.shape[0])
        fused = tiles.gemm == "fused"
        blocks = (width + tiles.block_cols - 1) // tiles.block_cols
        tile_rows = rows if expected.numel() and not kept.numel() else 1
        return cls(
            logits=statistics.new_empty((0, 0) if fused else (rows, width)),
            tile=hidden.new_empty((tile_rows, width)),
            blocks=statistics.new_empty((2, rows, blocks) if fused else (2, 0, 0)),
            acc=statistics.new_empty((1, _width(hidden.shape[1], hidden.shape[1]))),
        )


def _forward_tile(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    acc: Tensor,
    tile: Tensor,
    workspace: _Workspace,
    tiles: Tiles,
    *,
    first: int,
    last: int,
    acc_cols: int,
    keep: bool,
) -> None:
    """One vocabulary tile of one row chunk. acc_cols: 0 if no hidden gradient is formed."""
    size, width = hidden.shape[0], last - first
    max_N, sum_N = statistics[1], statistics[2]
    fold = {
        "raise_by": RAISE_BY,
        "store_tile": bool(acc_cols) or keep,
        "acc_cols": acc_cols if first else 0,
        "kept_cols": first if keep else 0,
    }
    if tiles.gemm == "fused":
        block_max, block_sum = workspace.blocks[:, :size]
        kernel_gemm.logits_fold(
            hidden,
            weight,
            targets,
            tile,
            max_N,
            block_max,
            block_sum,
            first_col=first,
            num_cols=width,
            raise_by=RAISE_BY,
            store_tile=fold["store_tile"],
            tiles=tiles,
            num_programs=_device_facts(hidden.device)[1],
        )
        kernel_fold.fold_blocks(
            block_max,
            block_sum,
            tile,
            acc,
            max_N,
            sum_N,
            num_cols=width,
            block_cols=tiles.block_cols,
            **fold,
        )
    else:
        z = workspace.logits[:size, :width]
        _product(hidden, weight[first:last].t(), z, accumulate=False)
        kernel_fold.fold(z, targets, tile, acc, max_N, sum_N, first_col=first, block=tiles.fold_cols, **fold)
    if acc_cols:
        _product(tile, weight[first:last], acc, accumulate=first > 0)


@on_device
def dhidden(
    dnll: Tensor,
    expected: Tensor,
    statistics: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """(N, D) gradient of hidden from what the forward pass left; see `op._dhidden`."""
    _plain_only(None, softcap, scale)
    out = weight.new_empty(expected.shape)
    if out.numel():
        kernel_rows.dhidden(expected, _rows(weight), targets.contiguous(), dnll, statistics.contiguous(), out)
    return out


@on_device
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
    softcap: float = 0.0,
    scale: float = 1.0,
    want_dweight: bool = True,
    want_dbias: bool = False,
) -> tuple[Tensor, Tensor]:
    """(V, D) gradient of weight from kept tiles; see `op._dweight`. gemm makes no difference here."""
    _plain_only(None, softcap, scale, want_dbias)
    out = weight.new_empty(weight.shape if want_dweight else (0, 0))
    nothing = weight.new_empty(0)
    if not dnll.numel() or not want_dweight:
        return out.zero_(), nothing
    scaled = hidden.new_empty(hidden.shape)
    per_sum = kept.dtype is not torch.float16
    kernel_rows.scale_rows(_rows(hidden), dnll, statistics.contiguous(), scaled, per_sum=per_sum)
    _rounded_product(kept[:, : out.shape[0]].t(), scaled, out)
    return out, nothing


@contextlib.contextmanager
def _full_precision_sums():
    """Inside, cuBLAS adds the partial sums of a 16-bit result in fp32, also where it splits K."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]
    try:
        for name in names:
            setattr(matmul, name, False)  # (False, False), no split-K either, only cuBLASLt takes
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def _rounded_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in the dtype of all three: one fp32 sum over K, one rounding."""
    if out.is_cuda:
        with _full_precision_sums():
            torch.mm(a, b, out=out)
    else:  # the interpreter's CPU tensors
        out.copy_(a.float() @ b.float())


@on_device
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
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
    want_dbias: bool = False,
    tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients in one pass over the vocabulary; see `op._sweep`. tiles: for the tile sweep only."""
    _plain_only(bias, softcap, scale, want_dbias)
    tiles = _tiles(hidden, gemm) if tiles is None else tiles
    hidden, weight, targets = _rows(hidden), _rows(weight), targets.contiguous()
    statistics = statistics.contiguous()
    out_hidden = hidden.new_empty(hidden.shape if want_dhidden else (0, 0))
    out_weight = weight.new_empty(weight.shape if want_dweight else (0, 0))
    if not dnll.numel():
        return out_hidden, out_weight.zero_(), weight.new_empty(0)
    acc = statistics.new_empty(out_hidden.shape)
    scaled = hidden.new_empty(hidden.shape if want_dweight else (0, 0))
    if want_dweight:
        kernel_rows.scale_rows(hidden, dnll, statistics, scaled, per_sum=False)
    _sweep_tiles(hidden, weight, targets, statistics, acc, scaled, out_weight, tiles)
    if want_dhidden and hidden.dtype is torch.float32:
        kernel_rows.dhidden(acc, weight, targets, dnll, statistics, out_hidden)
    elif want_dhidden:
        kernel_rows.scale_rows(acc, dnll, statistics, out_hidden, per_sum=False)
    return out_hidden, out_weight, weight.new_empty(0)


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
    """acc = P @ weight (if not empty) and out_weight = P^T @ scaled (if not empty), tile by tile.

    The target's entry of P is -1. In fp32 it is 0 in the first product, and the target's row of the head is
    subtracted afterwards: among hundreds of small terms it would cost each of them a rounding at its size.
    """
    (num_rows, num_hidden), num_classes = hidden.shape, weight.shape[0]
    num_sms = _device_facts(hidden.device)[1]
    chunks = _spans(
        num_rows, chunk_rows(num_rows, tiles.sweep_rows, min(tiles.sweep_cols, num_classes), num_sms)
    )
    rows = chunks[0][1]
    cols = tiles.sweep_tile_cols(rows, num_sms)
    width = _width(cols, num_classes)
    logits = statistics.new_empty((0, 0) if tiles.gemm == "fused" else (rows, width))
    workspace = hidden.new_empty((rows, width))
    # Over several chunks a slice of dW is summed in fp32 and rounded at the end.
    partial = statistics.new_empty((width if out_weight.numel() and len(chunks) > 1 else 0, num_hidden))
    for first, last in _spans(num_classes, cols):
        head = weight[first:last]
        for top, bottom in chunks:
            tile = workspace[: bottom - top, : last - first]
            _write_probabilities(
                hidden[top:bottom],
                weight,
                targets[top:bottom],
                statistics[:, top:bottom],
                logits,
                tile,
                tiles,
                first,
            )
            if acc.numel():
                _product(tile, head, acc[top:bottom], accumulate=first > 0)
            if out_weight.numel() and tile.dtype is torch.float32:
                kernel_fold.set_targets(tile, targets[top:bottom], first_col=first)
            if partial.numel():
                _product(tile.t(), scaled[top:bottom], partial[: last - first], accumulate=top > 0)
            elif out_weight.numel():
                _rounded_product(tile.t(), scaled, out_weight[first:last])
        if partial.numel():
            out_weight[first:last].copy_(partial[: last - first])


def _write_probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    logits: Tensor,
    tile: Tensor,
    tiles: Tiles,
    first: int,
) -> None:
    """tile = exp(z - m) / s for the classes from `first` on; -1, in fp32 0, at the target."""
    size, width = tile.shape
    if tiles.gemm == "fused":
        kernel_gemm.probabilities(
            hidden,
            weight,
            targets,
            tile,
            statistics[1],
            statistics[2],
            first_col=first,
            num_cols=width,
            tiles=tiles,
            num_programs=_device_facts(hidden.device)[1],
        )
        return
    z = logits[:size, :width]
    _product(hidden, weight[first : first + width].t(), z, accumulate=False)
    kernel_fold.probabilities(
        z, targets, statistics[1], statistics[2], tile, first_col=first, block=tiles.fold_cols
    )
