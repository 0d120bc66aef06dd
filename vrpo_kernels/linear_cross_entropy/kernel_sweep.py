"""The sweep over the vocabulary with the statistics known. Contract: `op._sweep`."""

from torch import Tensor

from vrpo_kernels.linear_cross_entropy import kernel_bias, kernel_gemm, kernel_known
from vrpo_kernels.linear_cross_entropy.kernel_head import Head
from vrpo_kernels.linear_cross_entropy.products import (
    device_facts,
    padded_width,
    product,
    rounded_product,
    spans_of,
)
from vrpo_kernels.linear_cross_entropy.tiles import Tiles, chunk_rows


def sweep_tiles(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    statistics: Tensor,
    acc: Tensor,
    scaled: Tensor,
    out_weight: Tensor,
    factors: Tensor,
    sums: Tensor,
    tiles: Tiles,
) -> None:
    """acc = P @ weight, out_weight = P^T @ scaled, sums = P^T @ factors, where not empty, tile by tile.

    The target's entry of P is -slope. In fp32 it is 0 in the first product, and the target's row of the head
    is subtracted afterwards: among hundreds of small terms it would cost each of them a rounding at its size.
    """
    (num_rows, num_hidden), num_classes = hidden.shape, head.weight.shape[0]
    num_sms = device_facts(hidden.device)[1]
    chunks = spans_of(
        num_rows, chunk_rows(num_rows, tiles.sweep_rows, min(tiles.sweep_cols, num_classes), num_sms)
    )
    rows = chunks[0][1]
    cols = tiles.sweep_tile_cols(rows, num_sms)
    width = padded_width(cols, num_classes)
    logits = statistics.new_empty((0, 0) if tiles.gemm == "fused" else (rows, width))
    workspace = hidden.new_empty((rows, width))
    # Over several chunks a slice of dW is summed in fp32 and rounded at the end.
    partial = statistics.new_empty((width if out_weight.numel() and len(chunks) > 1 else 0, num_hidden))
    for first, last in spans_of(num_classes, cols):
        for top, bottom in chunks:
            tile = workspace[: bottom - top, : last - first]
            _write_probabilities(
                hidden[top:bottom],
                head,
                targets[top:bottom],
                statistics[:, top:bottom],
                logits,
                tile,
                tiles,
                first,
            )
            if acc.numel():
                product(tile, head.weight[first:last], acc[top:bottom], accumulate=first > 0)
            if tile.element_size() == 4 and (out_weight.numel() or sums.numel()):
                kernel_known.set_targets(
                    tile,
                    targets[top:bottom],
                    statistics[0, top:bottom],
                    first_col=first,
                    softcap=head.softcap,
                )
            if partial.numel():
                product(tile.t(), scaled[top:bottom], partial[: last - first], accumulate=top > 0)
            elif out_weight.numel():
                rounded_product(tile.t(), scaled, out_weight[first:last])
            if sums.numel():
                kernel_bias.column_sums(tile, factors[top:bottom], sums[first:last], accumulate=top > 0)
        if partial.numel():
            out_weight[first:last].copy_(partial[: last - first])


def _write_probabilities(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    statistics: Tensor,
    logits: Tensor,
    tile: Tensor,
    tiles: Tiles,
    first: int,
) -> None:
    """tile = exp(logit - m) / s * slope for the classes from `first` on; -slope, in fp32 0, at the target."""
    size, width = tile.shape
    if tiles.gemm == "fused":
        kernel_gemm.probabilities(
            hidden,
            head,
            targets,
            statistics,
            tile,
            first_col=first,
            num_cols=width,
            tiles=tiles,
            num_programs=device_facts(hidden.device)[1],
        )
        return
    z = logits[:size, :width]
    product(hidden, head.weight[first : first + width].t(), z, accumulate=False)
    kernel_known.probabilities(z, head, targets, statistics, tile, first_col=first, block=tiles.fold_cols)
