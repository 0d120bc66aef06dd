"""Tile shapes of the Triton backend, and the arithmetic they are argued from. No tensors, no Triton.

NO GPU HAS SPOKEN YET: every row below is computed (H200: 132 SMs, 50 MB L2, 785 TF/s, 4.3 TB/s;
D = 4096, V = 126464, bf16), none is measured. `make gpu` sweeps them and writes the evidence.
"""

from dataclasses import dataclass, replace

GEMMS = ("cublas", "fused")
"""How the forward pass forms a logit tile: cuBLAS into an fp32 tile that a second kernel folds, or one
Triton GEMM whose epilogue folds it on chip."""

LOWEST = -3.4028234663852886e38
"""The least fp32 number: the maximum of no logits at all (finite, so that differences stay defined)."""

RAISE_BY = 8.0
"""Nats by which a tile must beat the running maximum before everything is rescaled. exp(8) = 2981 is
safe in fp16 too, and a floating-point E loses nothing by being larger than 1."""


@dataclass(frozen=True)
class Tiles:
    """Shapes of one call.

    Attributes:
        gemm: one of GEMMS.
        rows, cols: logit tile of the forward pass, for many rows.
        sweep_rows, sweep_cols: logit tile of the known-statistics sweep, where dW wants many rows.
        max_cols: columns that the tiles of a few rows may grow to, within the area of a full one.
        slice_cols: vocabulary slice of dW from kept tiles, held in fp32 before it is rounded once.
        block_rows, block_cols, block_hidden: CTA tile of the fused GEMM.
        num_warps, num_stages: of the fused GEMM.
        descriptors: operands of the fused GEMM through TMA descriptors (Hopper) or pointers.
    """

    gemm: str
    rows: int
    cols: int
    sweep_rows: int
    sweep_cols: int
    max_cols: int
    slice_cols: int
    block_rows: int
    block_cols: int
    block_hidden: int
    num_warps: int
    num_stages: int
    descriptors: bool

    def forward_cols(self, chunk_rows: int) -> int:
        """Columns of the forward pass's tiles for row chunks of this size."""
        return _widened(self.rows, self.cols, self.max_cols, chunk_rows)

    def sweep_tile_cols(self, chunk_rows: int) -> int:
        """Columns of the sweep's tiles for row chunks of this size."""
        return _widened(self.sweep_rows, self.sweep_cols, self.max_cols, chunk_rows)


def _widened(rows: int, cols: int, max_cols: int, chunk_rows: int) -> int:
    """cols, doubled while a tile of chunk_rows stays within the area rows * cols.

    Launching the three kernels of a tile costs the host some 60 us; a tile of 256 x 8192 keeps the GPU
    busy for less.
    """
    while 2 * cols <= max_cols and 2 * cols * chunk_rows <= rows * cols:
        cols *= 2
    return cols


# Logit tile 1024 x 8192: fp32 z is 32 MiB and stays in L2 between GEMM and fold; cuBLAS 128 x 256
# CTAs make 256 of them for z (1.94 waves, 97% full) and 128 for E @ W (0.97). Per tile 87 us of GEMM
# each and about 10 us of fold through L2: 6% of 2 units. Larger row chunks read W less often (0.24 ms
# per chunk, hidden behind the GEMM) but send z through HBM (9%).
# Sweep tile 4096 x 4096: three GEMMs of 175 us; z, E and the fp32 accumulators cost about 14%.
# Default "cublas": Triton's best K = 4096 GEMM reaches 95-97% of cuBLAS (kernels.md, section 13), and its
# epilogue is not overlapped (about 5%), against the 6% of the separate fold. Nearly a tie, decided for
# the form with the fewest unknowns.
_HOPPER = Tiles("cublas", 1024, 8192, 4096, 4096, 32768, 4096, 128, 256, 64, 8, 4, True)

# Ampere (A100: 108 SMs, 40 MB L2): the same logit tile; CTA tile 128 x 128 because 128 x 256 in fp32
# accumulators leaves no registers for a cp.async pipeline; 4 stages of 16 KiB.
_AMPERE = replace(_HOPPER, block_cols=128, block_hidden=32, num_stages=4, descriptors=False)

# fp32: the sweep repeats the forward pass's GEMM shape, so that both see the same logits bit for bit; their
# last bits would show in an fp32 gradient of a peaked row (1e-5), though not in a 16-bit one. The CTA tile
# is small because exact fp32 has no tensor cores; only the interpreter tests use it.
_FP32 = Tiles("cublas", 1024, 8192, 1024, 8192, 32768, 4096, 64, 64, 16, 8, 2, False)


def tiles_for(capability: tuple[int, int], itemsize: int, gemm: str = "cublas") -> Tiles:
    """Tiles for a compute capability and the size of the input dtype in bytes; a pure function."""
    half = _HOPPER if capability[0] >= 9 else _AMPERE
    return replace(_FP32 if itemsize == 4 else half, gemm=gemm)
