"""Tile shapes of the Triton backend, and where they come from. No tensors, no Triton.

Measured on an H100 (D = 4096, V = 126464, bf16), benchmarks/results/gpu/h100-2026-11-26-first (revision
5e9a601), -27-tiles (2cbeb7f) and -27 (2d0ff9f). The rows of Ampere are computed: no A100 has spoken yet.
`make gpu` repeats the sweep.
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

FEW_ROWS = 512
"""Rows up to which the fused GEMM takes `Tiles.num_stages_few_rows`."""


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


# "fused" against "cublas" (-27/kernels.csv, ms at N = 4096): no gradient 6.08 against 7.09 and 4 MiB
# against 512, frozen head 12.1 against 13.1 and 332 MiB against 832, trained 18.6 against 19.4; recomputed
# and replay 26.0 and 25.0 against 27.1 and 26.3.
# Stages (-27-tiles and -27, tiles.csv, % of the bare product with 3 against 4; no gradient, frozen head): N
# = 16384 89.5 against 83.5, 90.4 against 89.6; 4096 88.6 against 87.0, 89.3 against 88.7; 2048 92.0 against
# 87.6, 91.3 against 89.8; 1024 94.9 against 93.5, 95.6 against 95.3; but 512 94.2 against 93.7, 93.3
# against 95.2. 4100 82.6 against 80.5, 84.0 against 82.8, and in -27 82.2 against 81.0, 83.2 against 85.9.
# Two stages of block_hidden 128: 74 to 82.
# Row blocks walked in groups of 8 or 16 instead of all 32 (-27-tiles): no difference in any mode.
# 4096 x 32768 (-27-tiles, frozen head, 3 stages, ms at N = 4096): 11.9; x 16384 12.2 with 198 MiB instead
# of 332, x 8192 12.7 with 131; cuBLAS form 12.5. That form the day before (-26-first): 13.3; chunks of 1024
# or 2048 rows 13.4 to 15.0; fold_cols 4096: 13.3, 1024 to 16384 13.5 to 13.8.
# Output block 128 x 256 x 64, 8 warps (-27-tiles, N = 4096): 11.9; 256 x 128 12.4. (-26-first) 13.3; 128 x
# 128 14.8 to 16.3; 64 x 256 14.7 to 14.9; block_hidden 32 14.2.
# Sweep of 8192 x 8192, that is 4096 x 16384 at N = 4096 (-27-tiles, fused, all row blocks): 17.5 ms and
# 1248 MiB; x 8192 17.6 and 1182, x 32768 17.9 and 1380. Chunks of 2048 rows (-26-first, cuBLAS form) 22.3
# to 25.4 against 19.6: dW wants all rows in one product.
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
