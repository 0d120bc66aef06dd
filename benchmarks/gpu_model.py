"""A model of what `linear_cross_entropy` costs on a GPU: waves of output blocks, and bytes.

Each launch of the Triton backend is written down with the tiles in force (`linear_cross_entropy/tiles.py`),
in the order of `kernel_forward.py` and `kernel_sweep.py` (a test holds its products to theirs), for a plain
head, and costed by one of two rules:

    matrix product   max(waves * time of one block, bytes / bandwidth)
                     waves = ceil(blocks / SMs), time of one block = 2 * rows * cols * K / (rate / SMs)
    other kernels    bytes / bandwidth

plus LAUNCH_US each. cuBLAS may choose among block shapes and split K; the fused Triton product has the block
of its tiles, runs its main loop at cuBLAS's rate, and does not overlap its epilogue with the next block. The
bare product that percentages refer to is costed by the same rule. What was measured and what is assumed
stands in the constants below, nowhere else. Left out: clocks that move with power (an H100 gives 587 to 805
TFLOP/s within one session, depending on the values multiplied), short K, hosts that do not launch ahead.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from vrpo_kernels.linear_cross_entropy.tiles import Tiles, chunk_rows, tiles_for

HALF, FULL = 2, 4  # bytes of an operand and of an fp32 number


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        tflops: rate of a bare bf16 product whose waves are full.
        bandwidth: of memory, TB/s.
        cublas_blocks: output blocks (rows, columns) that cuBLAS chooses from.
        source: where tflops and bandwidth come from.
    """

    name: str
    capability: tuple[int, int]
    num_sms: int
    tflops: float
    bandwidth: float
    cublas_blocks: tuple[tuple[int, int], ...]
    source: str


_HOPPER_BLOCKS = (
    (128, 256),
    (256, 128),
    (128, 320),
    (320, 128),
)  # nvjet kernels in profile.txt, either way round
_AMPERE_BLOCKS = ((128, 256), (256, 128), (128, 128))

DEVICES = {
    "A100": Device(
        "A100", (8, 0), 108, 265.0, 1.83, _AMPERE_BLOCKS,
        "assumed (SXM, 80 GB): 85 % of the data sheet's 312 TFLOP/s, and the H100's share (90 %) of its "
        "2.04 TB/s",
    ),
    "H100": Device(
        "H100", (9, 0), 132, 786.0, 3.0, _HOPPER_BLOCKS,
        "measured: 784.8 TFLOP/s at N = 4096 in 119.76 waves that last 120 (results/gpu/h100-2026-11-26/"
        "kernels.csv, bare GEMM into 16 bits), 3.00 TB/s of a copy (h100-2026-11-26-first/memory.csv)",
    ),
    "H200": Device(
        "H200", (9, 0), 132, 786.0, 4.3, _HOPPER_BLOCKS,
        "assumed: the H100's rate (the same chip; published cuBLAS rates are 770 to 800 TFLOP/s), and the "
        "H100's share (90 %) of the data sheet's 4.8 TB/s",
    ),
}  # fmt: skip

FP32_OUTPUT = 1.055
"""A cuBLAS product into fp32 against one into 16 bits, N = 1024: 1.4137 against 1.3408 ms
(h100-2026-11-26/kernels.csv)."""
EPILOGUE_PS = 64.0
"""Picoseconds per logit and SM after the last matmul of a fused block, 2.1 us for 128 x 256: no gradient at
N = 1024, 1.4338 ms (same file), less what this model gives for the rest. Ampere: assumed to be the same."""
MANY_ROWS, POWER_SLOWDOWN = 1024, 1.06
"""A fused product of more rows takes longer than its share: no gradient at N = 4096 against four times
N = 1024, 6.19 against 5.74 ms (same file), 6.08 against 5.79 (h100-2026-11-27). The order of its blocks is
not why (-27-tiles); the clock falls at the power limit, to 1.31 to 1.43 of 1.98 GHz without pause."""
LAUNCH_US = 2.0
"""From the end of a kernel to the start of the next, launched ahead: assumed."""
LEAST_SPLIT = 2048
"""Least K of a part when cuBLAS splits K: assumed."""

MODES = {
    "no gradient": 1,
    "frozen head": 2,
    "trained, tiles kept": 3,
    "trained, recomputed": 4,
    "replay, both passes": 4,
}
"""Mode -> matmul units, named as in kernels.csv."""


@dataclass(frozen=True)
class Head:
    """rows (N), hidden (D), classes (V)."""

    rows: int
    hidden: int
    classes: int


@dataclass(frozen=True)
class Launch:
    """One kernel: what it is, and its milliseconds without the gap before it."""

    kernel: str
    ms: float


class Model:
    """The launches of one head on one device in one GEMM form.

    Args:
        gemm: "cublas", "fused" or "auto" for the device's default.
        tiles: those in force if None.
    """

    def __init__(self, device: Device, head: Head, gemm: str = "auto", tiles: Tiles | None = None) -> None:
        self.device, self.head = device, head
        self.tiles = tiles_for(device.capability, HALF, gemm) if tiles is None else tiles

    def unit_ms(self) -> float:
        """hidden @ weight^T by cuBLAS into 16 bits."""
        head = self.head
        return self._product(head.rows, head.classes, head.hidden, out_bytes=HALF) + LAUNCH_US / 1e3

    def launches(self, mode: str) -> list[Launch]:
        """Every kernel of forward and backward, in order."""
        if mode == "no gradient":
            return list(self._forward(want_dhidden=False, store=False))
        if mode == "frozen head":
            return [*self._forward(want_dhidden=True, store=True), self._rows("dhidden", 4 + 2 + 2)]
        if mode == "trained, tiles kept":
            forward = self._forward(want_dhidden=True, store=True)
            kept = self._bytes("finish kept", 3 * FULL * self.head.rows)
            return [*forward, kept, *self._backward_from_kept_tiles()]
        if mode == "trained, recomputed":
            return [*self._forward(want_dhidden=False, store=False), *self._sweep()]
        if mode == "replay, both passes":
            again = self._rows("target logits", 2 + 2)  # for the drift
            return [*self._forward(want_dhidden=False, store=False), again, *self._sweep()]
        raise ValueError(f"mode must be one of {tuple(MODES)}, got {mode!r}")

    def ms(self, mode: str) -> float:
        """Forward and backward."""
        return sum(launch.ms + LAUNCH_US / 1e3 for launch in self.launches(mode))

    def percent(self, mode: str) -> float:
        """Share of the bare product's rate: units * unit / time, in percent."""
        return 100 * MODES[mode] * self.unit_ms() / self.ms(mode)

    def _forward(self, *, want_dhidden: bool, store: bool) -> Iterator[Launch]:
        """As `kernel.forward` and `kernel_forward.forward_tiles`."""
        head, tiles, num_sms = self.head, self.tiles, self.device.num_sms
        rows = chunk_rows(head.rows, tiles.rows, min(tiles.cols, head.classes), num_sms)
        chunks = _spans(head.rows, rows)
        largest = min(rows, head.rows)
        cols = tiles.forward_cols(largest, num_sms)
        first = min(tiles.first_tile_cols(largest, num_sms), cols, head.classes)
        widths = ([first] if first else []) + _spans(head.classes - first, cols)
        yield self._rows("target logits", 2 + 2)
        for size in chunks:
            for index, width in enumerate(widths):
                corrected = store and bool(first) and not index
                yield from self._exponentials("fold", size, width, store=store, corrected=corrected)
                if want_dhidden:
                    yield self._gradient_product("E @ W", size, head.hidden, width)
        yield self._bytes("finish rows", 4 * FULL * head.rows)
        if want_dhidden:
            yield self._rows("finish expected", 4 + 4)

    def _backward_from_kept_tiles(self) -> Iterator[Launch]:
        """As `kernel.dhidden` and `kernel.dweight`."""
        head = self.head
        yield self._rows("dhidden", 4 + 2 + 2)
        yield self._rows("scale rows", 2 + 2)
        yield self._gradient_product("E^T @ X", head.classes, head.hidden, head.rows, out_bytes=HALF)

    def _sweep(self) -> Iterator[Launch]:
        """As `kernel.sweep` and `kernel_sweep.sweep_tiles` for both gradients."""
        head, tiles, num_sms = self.head, self.tiles, self.device.num_sms
        rows = chunk_rows(head.rows, tiles.sweep_rows, min(tiles.sweep_cols, head.classes), num_sms)
        chunks = _spans(head.rows, rows)
        cols = tiles.sweep_tile_cols(min(rows, head.rows), num_sms)
        yield self._rows("scale rows", 2 + 2)
        for width in _spans(head.classes, cols):
            for size in chunks:
                yield from self._exponentials("probabilities", size, width, store=True)
                yield self._gradient_product("P @ W", size, head.hidden, width)
                out_bytes = HALF if len(chunks) == 1 else 2 * FULL
                yield self._gradient_product("P^T @ X", width, head.hidden, size, out_bytes=out_bytes)
            if len(chunks) > 1:
                yield self._bytes("round dW", (FULL + HALF) * width * head.hidden)
        yield self._rows("scale rows", 4 + 2)

    def _exponentials(
        self, kernel: str, rows: int, cols: int, *, store: bool, corrected: bool = False
    ) -> Iterator[Launch]:
        """Logits of a tile and what becomes of them, in one launch (fused) or two."""
        if self.tiles.gemm == "cublas":
            product = FP32_OUTPUT * self._product(rows, cols, self.head.hidden, out_bytes=FULL)
            yield Launch("logits", product)
            yield self._bytes(kernel, (FULL + HALF * store) * rows * cols)
            return
        yield Launch(f"logits and {kernel}", self._fused(rows, cols, store=store))
        if kernel == "fold":
            blocks = -(-cols // self.tiles.block_cols)
            yield self._bytes("fold blocks", 2 * FULL * rows * blocks + 2 * HALF * rows * cols * corrected)

    def _fused(self, rows: int, cols: int, *, store: bool) -> float:
        """Milliseconds of the Triton product: one program per SM takes block after block."""
        tiles, device = self.tiles, self.device
        row_blocks = -(-rows // tiles.block_rows)
        waves = -(-row_blocks * -(-cols // tiles.block_cols) // device.num_sms)
        elements = tiles.block_rows * tiles.block_cols
        block = 2 * elements * self.head.hidden / (1e9 * device.tflops / device.num_sms)
        block += 1e-9 * EPILOGUE_PS * elements
        if store:
            block += HALF * elements * device.num_sms / (1e9 * device.bandwidth)
        slow = POWER_SLOWDOWN if rows > MANY_ROWS else 1.0
        moved = HALF * self.head.hidden * (rows + cols) + HALF * rows * cols * store
        return max(slow * waves * block, moved / (1e9 * device.bandwidth))

    def _gradient_product(
        self, name: str, rows: int, cols: int, inner: int, out_bytes: int = 2 * FULL
    ) -> Launch:
        """A second product, by cuBLAS; an fp32 accumulator is read and written."""
        return Launch(name, self._product(rows, cols, inner, out_bytes=out_bytes))

    def _product(self, rows: int, cols: int, inner: int, *, out_bytes: int) -> float:
        """Milliseconds of a cuBLAS product with its best block shape and split of K."""
        device, best = self.device, float("inf")
        for block_rows, block_cols in device.cublas_blocks:
            blocks = -(-rows // block_rows) * -(-cols // block_cols)
            one = 2 * block_rows * block_cols * inner / (1e9 * device.tflops / device.num_sms)
            for parts in range(1, max(1, min(16, inner // LEAST_SPLIT)) + 1):
                moved = HALF * inner * (rows + cols) + out_bytes * rows * cols
                moved += 2 * FULL * rows * cols * (parts - 1)
                waves = -(-blocks * parts // device.num_sms)
                best = min(best, max(waves * one / parts, moved / (1e9 * device.bandwidth)))
        return best

    def _rows(self, kernel: str, bytes_per_number: int) -> Launch:
        """A kernel over (N, D)."""
        return self._bytes(kernel, bytes_per_number * self.head.rows * self.head.hidden)

    def _bytes(self, kernel: str, count: int) -> Launch:
        return Launch(kernel, count / (1e9 * self.device.bandwidth))


def _spans(total: int, size: int) -> list[int]:
    """Lengths of the pieces of `total`, the last one what is left."""
    return [min(size, total - start) for start in range(0, total, size)]
