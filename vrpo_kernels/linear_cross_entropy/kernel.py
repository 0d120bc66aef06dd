"""The Triton backend of linear_cross_entropy: the row-linear algorithm over tiles. Contract: `op.py`.

    forward, per row chunk and vocabulary tile:   u = scale (x @ W_t^T + b_t);  z, D = cap(u), its slope
                                                  E = exp(z - m), target column 0, folded into (m, s) online
                                                  acc += (E D) @ W_t
    after the sweep:                              nll = softplus(m + log s - z_y);  expected = acc / s
    dW from kept tiles:                           G = (E D, target entry -s D_y);  f = dnll * q * scale / s
                                                  dW = G^T @ (f x);  db = G^T @ f
    sweep, statistics known:                      P = exp(z - m) / s * D, target entry -D_y;
                                                  f = dnll * q * scale;  dx = f (P @ W);
                                                  dW_t = P_t^T @ (f x);  db_t = P_t^T @ f

All products have 16-bit factors and fp32 sums; dW is summed over all rows in fp32 and rounded once. No host
synchronisation, no data-dependent shapes, no atomics. Tile shapes never depend on which gradients are wanted.
"""

import torch
from torch import Tensor

from vrpo_kernels.backend import on_device
from vrpo_kernels.linear_cross_entropy import kernel_bias, kernel_known, kernel_rows, kernel_shards
from vrpo_kernels.linear_cross_entropy.kernel_forward import forward_tiles
from vrpo_kernels.linear_cross_entropy.kernel_head import Head
from vrpo_kernels.linear_cross_entropy.kernel_sweep import sweep_tiles
from vrpo_kernels.linear_cross_entropy.products import LANES, device_facts, rounded_product, unit_rows
from vrpo_kernels.linear_cross_entropy.tiles import GEMMS, LOWEST, Tiles, tiles_for


def resolve_gemm(requested: str, dtype: torch.dtype, device: torch.device) -> str:
    """ "auto" -> the default of the device and dtype (`tiles.py`); other names are checked against GEMMS.

    While torch.compile traces, "auto" stays: the op settles it, because a device cannot be asked there.

    Errors:
        ValueError if the name is unknown, or "fused" is asked for in float32.
    """
    if requested == "auto":
        if torch.compiler.is_compiling():
            return "auto"
        return tiles_for(device_facts(device)[0], dtype.itemsize).gemm
    if requested not in GEMMS:
        raise ValueError(f"gemm must be one of {('auto', *GEMMS)} on the triton backend, got {requested!r}")
    if requested == "fused" and dtype is torch.float32:
        raise ValueError("gemm 'fused' needs bfloat16 or float16 inputs (tensor cores), got float32")
    return requested


def kept_shapes(num_rows: int, num_classes: int, gemm: str, input_dtype: torch.dtype):
    """((shape, dtype) of the kept tiles, (shape, dtype) of their shifts, which this backend has none of)."""
    padded = (num_classes + LANES - 1) // LANES * LANES
    return ((num_rows, padded), input_dtype), ((0, 0), torch.float32)


def _tiles(hidden: Tensor, gemm: str) -> Tiles:
    return tiles_for(device_facts(hidden.device)[0], hidden.element_size(), gemm)


def _head(weight: Tensor, bias: Tensor | None, softcap: float, scale: float) -> Head:
    return Head(unit_rows(weight), None if bias is None else bias.contiguous(), softcap, scale)


@on_device
def target_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """(N,) fp32 logit of each row's target before the soft-cap, the same bits as in `forward`.

    0 if absent, NaN out of range.
    """
    out = hidden.new_empty(hidden.shape[0], dtype=torch.float32)
    if out.numel():
        head = _head(weight, bias, 0.0, scale)
        kernel_rows.target_logits(unit_rows(hidden), head, targets.contiguous(), out)
    return out


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
    tiles = _tiles(hidden, gemm) if tiles is None else tiles
    hidden, targets = unit_rows(hidden), targets.contiguous()
    head = _head(weight, bias, softcap, scale)
    (num_rows, num_hidden), num_classes = hidden.shape, weight.shape[0]
    (kept_shape, _), _ = kept_shapes(num_rows, num_classes, gemm, hidden.dtype)
    kept = hidden.new_empty(kept_shape if keep_tiles else (0, 0))
    nll = hidden.new_empty(num_rows, dtype=torch.float32)
    statistics, expected, metrics, no_shifts = (
        nll.new_empty(shape)
        for shape in (
            (3, num_rows),
            (num_rows, num_hidden) if want_dhidden else (0, 0),
            (2, num_rows) if want_metrics else (0, 0),
            (0, 0),
        )
    )
    if num_rows:
        kernel_rows.target_logits(hidden, head, targets, statistics[0])
        for state in (statistics[1:], metrics):
            state[:1].fill_(LOWEST)
            state[1:].zero_()
        forward_tiles(hidden, head, targets, statistics, expected, kept, metrics, tiles)
        kernel_known.finish_rows(statistics, nll, softcap)
        if want_dhidden:
            kernel_rows.finish_expected(expected, statistics[2])
        if keep_tiles:
            kept[:, num_classes:].zero_()  # never read, but outputs of an op are to be deterministic
            kernel_known.finish_kept(kept[:, :num_classes], targets, statistics, softcap)
    return nll, statistics, expected, kept, no_shifts, metrics


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
    out = weight.new_empty(expected.shape)
    if out.numel():
        head = _head(weight, None, softcap, scale)
        kernel_rows.dhidden(expected, head, targets.contiguous(), dnll, statistics.contiguous(), out)
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
    """Gradients of weight and bias from kept tiles; see `op._dweight`. gemm makes no difference here."""
    out_weight, out_bias = _head_gradients(weight, want_dweight, want_dbias)
    if not dnll.numel():
        return out_weight.zero_(), out_bias.zero_()
    statistics = statistics.contiguous()
    settings = {"softcap": softcap, "scale": scale, "per_sum": kept.dtype is not torch.float16}
    tile = kept[:, : weight.shape[0]]
    if want_dweight:
        scaled = hidden.new_empty(hidden.shape)
        kernel_rows.scale_rows(unit_rows(hidden), dnll, statistics, scaled, **settings)
        rounded_product(tile.t(), scaled, out_weight)
    if want_dbias:
        factors = kernel_bias.tile_factors(dnll, statistics, kept.dtype, **settings)
        sums = factors.new_empty(out_bias.shape)
        kernel_bias.column_sums(tile, factors, sums, accumulate=False)
        out_bias.copy_(sums)
    return out_weight, out_bias


@on_device
def rebase_kept(
    kept: Tensor, targets: Tensor, local: Tensor, joined: Tensor, num_classes: int, softcap: float
) -> Tensor:
    """Kept tiles of a shard come under the softmax of the whole head, in place; see `op._rebase_kept`."""
    if not len(kept):
        return joined.clone()
    tile = kept[:, :num_classes]
    return kernel_shards.rebase_kept(tile, targets.contiguous(), local, joined.contiguous(), softcap)


def _head_gradients(weight: Tensor, want_dweight: bool, want_dbias: bool) -> tuple[Tensor, Tensor]:
    """Where the gradients of weight and bias go; empty where not wanted."""
    out_weight = weight.new_empty(weight.shape if want_dweight else (0, 0))
    return out_weight, weight.new_empty(weight.shape[0] if want_dbias else 0)


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
    tiles = _tiles(hidden, gemm) if tiles is None else tiles
    hidden, targets, statistics = unit_rows(hidden), targets.contiguous(), statistics.contiguous()
    head = _head(weight, bias, softcap, scale)
    out_hidden = hidden.new_empty(hidden.shape if want_dhidden else (0, 0))
    out_weight, out_bias = _head_gradients(weight, want_dweight, want_dbias)
    if not dnll.numel():
        return out_hidden, out_weight.zero_(), out_bias.zero_()
    settings = {"softcap": softcap, "scale": scale, "per_sum": False}
    acc = statistics.new_empty(out_hidden.shape)
    scaled = hidden.new_empty(hidden.shape if want_dweight else (0, 0))
    if want_dweight:
        kernel_rows.scale_rows(hidden, dnll, statistics, scaled, **settings)
    factors = statistics.new_empty(0)
    if want_dbias:
        factors = kernel_bias.tile_factors(dnll, statistics, hidden.dtype, **settings)
    sums = factors.new_empty(out_bias.shape)
    sweep_tiles(hidden, head, targets, statistics, acc, scaled, out_weight, factors, sums, tiles)
    out_bias.copy_(sums)
    if want_dhidden and hidden.dtype is torch.float32:
        kernel_rows.dhidden(acc, head, targets, dnll, statistics, out_hidden)
    elif want_dhidden:
        kernel_rows.scale_rows(acc, dnll, statistics, out_hidden, **settings)
    return out_hidden, out_weight, out_bias
