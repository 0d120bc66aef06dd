"""The forward pass over row chunks and vocabulary tiles. Contract: `op._forward`."""

from dataclasses import dataclass

from torch import Tensor

from vrpo_kernels.linear_cross_entropy import kernel_fold, kernel_gemm
from vrpo_kernels.linear_cross_entropy.kernel_head import Head
from vrpo_kernels.linear_cross_entropy.products import device_facts, padded_width, product, spans_of
from vrpo_kernels.linear_cross_entropy.tiles import RAISE_BY, Tiles, chunk_rows


def forward_tiles(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    statistics: Tensor,
    expected: Tensor,
    kept: Tensor,
    metrics: Tensor,
    tiles: Tiles,
) -> None:
    """Fold every tile into statistics[1:], and into expected, kept and metrics where they are not empty."""
    num_rows, num_classes = hidden.shape[0], head.weight.shape[0]
    num_sms = device_facts(hidden.device)[1]
    chunks = spans_of(num_rows, chunk_rows(num_rows, tiles.rows, min(tiles.cols, num_classes), num_sms))
    cols = tiles.forward_cols(chunks[0][1], num_sms)
    workspace = _Workspace.make(hidden, head, statistics, expected, kept, metrics, tiles, chunks[0][1], cols)
    first_cols = min(tiles.first_tile_cols(chunks[0][1], num_sms), cols, num_classes)
    rest = [
        (first_cols + left, first_cols + right) for left, right in spans_of(num_classes - first_cols, cols)
    ]
    spans = [(0, first_cols), *rest] if first_cols else rest
    for top, bottom in chunks:
        rows = slice(top, bottom)
        for first, last in spans:
            _forward_tile(
                hidden[rows],
                head,
                targets[rows],
                statistics[:, rows],
                expected[rows] if expected.numel() else workspace.acc,
                kept[rows, first:last] if kept.numel() else workspace.tile[: bottom - top, : last - first],
                metrics[:, rows],
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
        blocks: (2, or with metrics 4, rows, column blocks) fp32 in the fused form, else empty.
        acc: (1, D) fp32, stands for the accumulator where there is none.
    """

    logits: Tensor
    tile: Tensor
    blocks: Tensor
    acc: Tensor

    @classmethod
    def make(
        cls,
        hidden: Tensor,
        head: Head,
        statistics: Tensor,
        expected: Tensor,
        kept: Tensor,
        metrics: Tensor,
        tiles: Tiles,
        rows: int,
        cols: int,
    ):
        """For row chunks of up to `rows` rows and vocabulary tiles of up to `cols` classes."""
        width = padded_width(cols, head.weight.shape[0])
        fused = tiles.gemm == "fused"
        blocks = (width + tiles.block_cols - 1) // tiles.block_cols
        tile_rows = rows if expected.numel() and not kept.numel() else 1
        return cls(
            logits=statistics.new_empty((0, 0) if fused else (rows, width)),
            tile=hidden.new_empty((tile_rows, width)),
            blocks=statistics.new_empty((2 + len(metrics), rows, blocks) if fused else (2, 0, 0)),
            acc=statistics.new_empty((1, padded_width(hidden.shape[1], hidden.shape[1]))),
        )


def _forward_tile(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    statistics: Tensor,
    acc: Tensor,
    tile: Tensor,
    metrics: Tensor,
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
        blocks = workspace.blocks[:, :size]
        kernel_gemm.logits_fold(
            hidden,
            head,
            targets,
            tile,
            max_N,
            blocks,
            first_col=first,
            num_cols=width,
            raise_by=RAISE_BY,
            store_tile=fold["store_tile"],
            tiles=tiles,
            num_programs=device_facts(hidden.device)[1],
        )
        kernel_fold.fold_blocks(
            blocks, tile, acc, max_N, sum_N, metrics, num_cols=width, block_cols=tiles.block_cols, **fold
        )
    else:
        z = workspace.logits[:size, :width]
        product(hidden, head.weight[first:last].t(), z, accumulate=False)
        kernel_fold.fold(
            z, head, targets, tile, acc, max_N, sum_N, metrics, first_col=first, block=tiles.fold_cols, **fold
        )
    if acc_cols:
        product(tile, head.weight[first:last], acc, accumulate=first > 0)
