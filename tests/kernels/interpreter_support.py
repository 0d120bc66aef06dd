"""What the files that run in Triton's interpreter share: tiny tiles, inputs, the op. No tests here."""

from dataclasses import replace

import pytest
import torch

from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import linear_cross_entropy
from vrpo_kernels.linear_cross_entropy.tiles import Tiles, tiles_for

# log(0) and 0 / 0 are computed where a vocabulary of one class has no other class, and then not used.
MARKS = [
    pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),  # squares of masked logits
]
KEEP, RECOMPUTE = 2**30, 0


def small_tiles(hidden, gemm) -> Tiles:
    """Tiles of 64 columns, CTA tiles of 32 x 32 x 16 in two slices, so that every loop turns."""
    return replace(
        tiles_for((9, 0), 2, gemm),
        rows=128,
        cols=64,
        sweep_rows=128,
        sweep_cols=64,
        max_cols=64,
        fold_cols=16,
        first_cols=32,
        block_rows=32,
        block_cols=32,
        block_hidden=16,
        slices=2,
    )


def make_inputs(N, V, D, dtype, scale=1.0):
    """(hidden, weight, targets, upstream): logits of standard deviation scale * sqrt(D)."""
    generator = torch.Generator().manual_seed(N + V + D)
    hidden = torch.randn(N, D, generator=generator).mul_(scale).to(dtype)
    weight = torch.randn(V, D, generator=generator).to(dtype)
    targets = torch.randint(V, (N,), generator=generator)
    return hidden, weight, targets, testing.wide_range_upstream(N, generator)


def make_op(gemm="cublas", kept_tile_bytes=KEEP):
    """linear_cross_entropy on the Triton backend."""

    def op(hidden, weight, targets, **head):
        return linear_cross_entropy(
            hidden, weight, targets, backend="triton", gemm=gemm, kept_tile_bytes=kept_tile_bytes, **head
        )

    return op
