"""Tile shapes of the Triton backend, and where they come from. No tensors, no Triton.

Measured on an H100 (D = 4096, V = 126464, bf16): benchmarks/results/gpu/h100-2026-11-26-first/tiles.csv
(revision 5e9a601) and h100-2026-11-26/kernels.csv (f5cbb90). The rows of Ampere are computed: no A100 has
spoken yet. `make gpu` repeats the sweep.
"""

import functools
from dataclasses import dataclass, replace

GEMMS = ("cublas", "fused")
"""How a logit tile becomes exponentials: cuBLAS into an fp32 tile that a second kernel reads, or one Triton
GEMM whose epilogue takes them on chip."""

LOWEST = -3.4028234663852886e38
"""The least fp32 number: the maximum of no logits at all (finite, so that differences stay defined)."""

RAISE_BY = 8.0
"""Nats by which a tile must beat the running maximum before everything is rescaled. exp(8) = 2981 is
safe in fp16 too, and a floating-point E loses nothing by being larger than 1."""

FEW_ROWS = 1024
"""Rows up to which a GPU is not held back by its power limit, and a deeper pipeline pays."""


@dataclass(frozen=True)
class Tiles:
    """Shapes of one call.

    Attributes:
        gemm: one of GEMMS.
        rows, cols: logit tile of the forward pass, for many rows.
        first_cols: columns of the first tile in the fused form. Its E is written under each block's own
            maximum and corrected afterwards, which later tiles hardly ever need.
        sweep_rows, sweep_cols: logit tile of the known-statistics sweep, where dW wants many rows.
        max_cols: columns that the tiles of a few rows may grow to, within the area of a full one.
        fold_cols: columns of a row that the fold takes in one step.
        block_rows, block_cols, block_hidden: CTA tile of the fused GEMM.
        slices: parts of a block's columns that the epilogue takes one after the other under a bias or a
            soft-cap: what it computes per logit of a whole block would not fit the registers.
        num_warps: of the fused GEMM.
        num_stages, num_stages_few_rows: of the fused GEMM, for more than FEW_ROWS rows and for fewer.
        descriptors: operands of the fused GEMM through TMA descriptors (Hopper) or pointers.
    """

    gemm: str
    rows: int
    cols: int
    first_cols: int
    sweep_rows: int
    sweep_cols: int
    max_cols: int
    fold_cols: int
    block_rows: int
    block_cols: int
    block_hidden: int
    slices: int
    num_warps: int
    num_stages: int
    num_stages_few_rows: int
    descriptors: bool

    def stages(self, chunk_rows: int) -> int:
        """Stages of the fused GEMM's pipeline for so many rows; they move no bit of a result."""
        return self.num_stages if chunk_rows > FEW_ROWS else self.num_stages_few_rows

    def forward_cols(self, chunk_rows: int, num_sms: int) -> int:
        """Columns of the forward pass's tiles for row chunks of this size."""
        return self._whole_waves(
            _fitted(self.rows, self.cols, self.max_cols, chunk_rows), chunk_rows, num_sms
        )

    def first_tile_cols(self, chunk_rows: int, num_sms: int) -> int:
        """Columns of the first tile, 0 if it is like the others."""
        if self.gemm != "fused":
            return 0
        return self._whole_waves(self.first_cols, chunk_rows, num_sms)

    def sweep_tile_cols(self, chunk_rows: int, num_sms: int) -> int:
        """Columns of the sweep's tiles for row chunks of this size."""
        return self._whole_waves(
            _fitted(self.sweep_rows, self.sweep_cols, self.max_cols, chunk_rows), chunk_rows, num_sms
        )

    def _whole_waves(self, cols: int, chunk_rows: int, num_sms: int) -> int:
        """cols in the fused form, moved to where its output blocks fill the SMs a whole number of times.

        4096 rows x 32768 columns are 4096 blocks, 31.03 waves of 132 SMs, and take as long as 32 waves;
        33792 columns are exactly 32.
        """
        if self.gemm != "fused":
            return cols
        row_blocks = -(-chunk_rows // self.block_rows)
        return _fullest(row_blocks, cols // self.block_cols, num_sms) * self.block_cols


@functools.cache
def _fullest(row_blocks: int, col_blocks: int, num_sms: int) -> int:
    """Column blocks, up to a quarter more or less than asked for, whose waves leave the fewest SMs idle."""

    def idle_share(count: int) -> float:
        waves = -(-row_blocks * count // num_sms)
        return 1 - row_blocks * count / (waves * num_sms)

    counts = range(max(1, -(-3 * col_blocks // 4)), 5 * col_blocks // 4 + 1)
    return min(counts, key=lambda count: (round(idle_share(count), 3), abs(count - col_blocks)))


def _fitted(rows: int, cols: int, max_cols: int, chunk_rows: int) -> int:
    """cols, halved or doubled to the widest tile of chunk_rows within the area rows * cols.

    Launching the three kernels of a tile costs the host some 100 us; a tile of 256 x 8192 keeps the GPU
    busy for less.
    """
    area = rows * cols
    while cols * chunk_rows > area and cols > _GEMM_COLS:
        cols //= 2
    while 2 * cols <= max_cols and 2 * cols * chunk_rows <= area:
        cols *= 2
    return cols


_GEMM_ROWS, _GEMM_COLS = 128, 256  # output block of one SM in the GEMMs of Hopper's cuBLAS


@functools.cache
def chunk_rows(total: int, most: int, num_cols: int, num_sms: int) -> int:
    """Rows of a chunk, a multiple of 128 and at most `most`, that leave the fewest SMs idle.

    A GEMM of rows x num_cols runs in ceil(blocks / SMs) waves of output blocks, and the last wave of each
    chunk is rarely full: 4100 rows cut into five chunks took 15% more waves than one row block beyond 4096
    has to. Of sizes that need equally many waves the largest is taken (the head is read less often).

    Args:
        total: rows in all, >= 1.
        most: largest chunk; less than 128 counts as 128.
        num_cols: columns of a tile.
        num_sms: streaming multiprocessors.
    """
    blocks = -(-total // _GEMM_ROWS)
    largest = max(1, min(most // _GEMM_ROWS, blocks))
    col_blocks = -(-num_cols // _GEMM_COLS)

    def waves(size: int) -> int:
        full, rest = divmod(blocks, size)
        return full * -(-size * col_blocks // num_sms) + -(-rest * col_blocks // num_sms)

    # Below half of the largest the head is read twice as often: never worth a wave.
    sizes = range(max(1, -(-largest // 2)), largest + 1)
    return _GEMM_ROWS * min(sizes, key=lambda size: (waves(size), -size))


# "fused" against "cublas" (kernels.csv, ms at N = 4096): no gradient 6.19 against 6.87 and 4 MiB against 512,
# frozen head 12.45 against 13.10 and 332 MiB against 832, trained 18.19 against 18.78; at N = 1024 1.43
# against 1.62, 2.82 against 3.02, 4.29 against 4.48; slower in 4 of 31 rows, by 1 to 5% without gradients at
# N = 4096 and 4100 and by 13% in the replay at N = 512.
# 4096 x 32768 (tiles.csv, frozen head, cublas): 13.3; x 16384 13.5, x 8192 14.9, x 4096 14.8; of 1024 rows
# 14.0 to 15.0, of 2048 13.9 to 14.9. fold_cols 4096: 13.3; 1024 to 16384 13.5 to 13.8.
# Output block 128 x 256 x 64, 8 warps, 4 stages (tiles.csv, fused): 13.6, 3 stages 13.3 and slower at other
# sizes; 256 x 128 13.8; 128 x 128 14.8 to 16.3; 64 x 256 14.7 to 14.9; block_hidden 32 14.2.
# Sweep of 8192 x 8192, that is 4096 x 16384 at N = 4096 (tiles.csv, sweep): 19.6; x 8192 20.4, x 4096 20.7,
# x 32768 19.9 with more memory; chunks of 2048 rows 22.3 to 25.4: dW wants all rows in one product.
_HOPPER = Tiles("fused", 4096, 32768, 8192, 8192, 8192, 131072, 4096, 128, 256, 64, 4, 8, 3, 4, True)

# Ampere (A100: 108 SMs, 40 MB L2): the same logit tile; CTA tile 128 x 128 because 128 x 256 in fp32
# accumulators leaves no registers for a cp.async pipeline; 4 stages of 16 KiB.
_AMPERE = replace(_HOPPER, gemm="cublas", block_cols=128, block_hidden=32, num_stages=4, descriptors=False)

# fp32: the sweep repeats the forward pass's GEMM shape, so that both see the same logits bit for bit; their
# last bits would show in an fp32 gradient of a peaked row (1e-5), though not in a 16-bit one. The CTA tile
# is small because exact fp32 has no tensor cores; only the interpreter tests use it.
_FP32 = Tiles("cublas", 1024, 8192, 8192, 1024, 8192, 32768, 4096, 64, 64, 16, 2, 8, 2, 2, False)


def tiles_for(capability: tuple[int, int], itemsize: int, gemm: str = "auto") -> Tiles:
    """Tiles for a compute capability and the size of the input dtype in bytes; a pure function.

    gemm: one of GEMMS, or "auto" for the form that is the default there.
    """
    half = _HOPPER if capability[0] >= 9 else _AMPERE
    tiles = _FP32 if itemsize == 4 else half
    return tiles if gemm == "auto" else replace(tiles, gemm=gemm)
