"""The stage `tiles` of `make gpu`: the sweep that `linear_cross_entropy/tiles.py` is corrected from.

    python3 -m benchmarks.gpu_tiles [--output DIR] [--until EPOCH] [--skip TASKS] [--warm I/N] [--tiny]

Times the backend's own functions over tile shapes for LLaDA's head at N = 4096, then the best few at N =
512 and 16384. Each row is judged against fp64 like those of the stage `kernels`; a shape that does not
compile or does not fit is a row that says so. Rows go to tiles.csv.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu_bench import TIMES, Bench, Task, parse
from benchmarks.gpu_kernels import LLADA, Units, product
from benchmarks.gpu_truth import ERRORS, Head, Heads, Size
from vrpo_kernels.linear_cross_entropy import kernel
from vrpo_kernels.linear_cross_entropy.tiles import Tiles, tiles_for

BLOCKS = ("block_rows", "block_cols", "block_hidden", "num_warps", "num_stages", "programs_per_sm")
FIELDS = (
    *("op", "provider", "mode", "dtype", "N", "D", "V", "case"),
    *("rows", "cols", "fold_cols", "streams"),
    *BLOCKS,
    *(*TIMES, "units", "unit_ms", "pct_of_gemm", "tflops"),
    *(*ERRORS, "note"),
)
UNITS = {"no gradient": 1, "frozen head": 2, "sweep": 3, "dW from kept": 1}

FUSED_SHAPES = (
    # as BLOCKS; two programs on an SM share its 227 KiB
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
    (128, 128, 64, 4, 3, 2),
    (128, 128, 64, 8, 3, 2),
    (256, 128, 64, 8, 3, 1),
    (256, 128, 64, 8, 4, 1),
    (128, 128, 64, 4, 4, 1),
    (128, 128, 64, 8, 4, 1),
    (64, 256, 64, 4, 2, 2),
    (64, 256, 64, 4, 4, 1),
    (128, 256, 32, 8, 6, 1),
)
STREAMED = (
    # streams, rows, cols; chunks are cut smaller than rows where there would be fewer than streams
    (2, 4096, 32768),
    (2, 1024, 8192),
    (2, 4096, 16384),
    (2, 1024, 32768),
    (2, 512, 8192),
    (4, 512, 8192),
    (4, 1024, 8192),
    (2, 4096, 8192),
    (2, 512, 16384),
    (3, 4096, 32768),
    (4, 4096, 32768),
)
FUSED_TILES = ((4096, 32768), (4096, 8192), (1024, 8192))


def _shaped(base: Tiles, shape: tuple[int, ...], rows: int, cols: int, streams: int = 1) -> Tiles:
    blocks = dict(zip(BLOCKS, shape, strict=True))
    return replace(base, gemm="fused", rows=rows, cols=cols, streams=streams, **blocks)


def cases(base: Tiles) -> list[tuple[str, Tiles]]:
    """(mode, tiles) in the order of what is learnt from them."""
    cublas = replace(base, gemm="cublas", streams=1)
    shapes = list(itertools.product((4096, 1024, 2048), (32768, 8192, 16384, 4096)))
    wide = replace(cublas, rows=4096, cols=32768)
    found = [("frozen head", replace(cublas, rows=rows, cols=cols)) for rows, cols in shapes]
    for streams, rows, cols in STREAMED:
        found.append(("frozen head", replace(cublas, rows=rows, cols=cols, streams=streams)))
    for shape in FUSED_SHAPES:
        found.append(("frozen head", _shaped(base, shape, *FUSED_TILES[0])))
    for streams, cols in ((1, 8192), (1, 16384), (1, 32768), (1, 4096), (2, 8192), (2, 16384), (3, 8192)):
        found.append(("sweep", replace(cublas, sweep_rows=4096, sweep_cols=cols, streams=streams)))
    for cols in (8192, 4096, 2048):
        found.append(("sweep", replace(cublas, sweep_rows=2048, sweep_cols=cols)))
    found.append(("dW from kept", cublas))
    found += [("frozen head", replace(wide, fold_cols=cols)) for cols in (1024, 2048, 8192, 16384)]
    found += [("no gradient", replace(cublas, rows=rows, cols=cols)) for rows, cols in shapes]
    found += [("no gradient", replace(wide, streams=streams)) for streams in (2, 3)]
    for shape in FUSED_SHAPES[:4]:
        found.append(("frozen head", _shaped(base, shape, *FUSED_TILES[0], streams=2)))
    for tile, shape in itertools.product(FUSED_TILES[1:], FUSED_SHAPES):
        found.append(("frozen head", _shaped(base, shape, *tile)))
    for tile, shape in itertools.product(FUSED_TILES[:2], FUSED_SHAPES[:4]):
        found.append(("no gradient", _shaped(base, shape, *tile)))
    return found


def _tiny_cases(base: Tiles) -> list[tuple[str, Tiles]]:
    cublas = replace(base, gemm="cublas", rows=128, cols=64, fold_cols=64)
    small = _shaped(replace(cublas, rows=128), (32, 32, 16, 4, 2, 1), 128, 64)
    return [
        ("frozen head", cublas),
        ("frozen head", replace(cublas, cols=128)),
        ("frozen head", small),
        ("sweep", replace(cublas, sweep_rows=128, sweep_cols=64)),
        ("dW from kept", cublas),
        ("no gradient", small),
    ]


class Runs:
    """Calls of the kernel module for one head; what a forward pass leaves is made once."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.arguments = (head.hidden, head.weight, head.targets)
        self._left: tuple | None = None

    def left(self) -> tuple:
        """(statistics, kept tiles, their shifts) of a forward pass with default tiles."""
        if self._left is None:
            options = {"gemm": "cublas", "want_dhidden": False, "keep_tiles": True}
            _nll, statistics, _expected, kept, shift = kernel.forward(*self.arguments, **options)
            self._left = statistics, kept, shift
        return self._left

    def forward(self, tiles: Tiles, want_dhidden: bool):
        """(nll, dhidden or None). dhidden is scaled as the backward pass does it."""
        options = {"gemm": tiles.gemm, "want_dhidden": want_dhidden, "keep_tiles": False, "tiles": tiles}
        nll, statistics, expected, *_ = kernel.forward(*self.arguments, **options)
        if not want_dhidden:
            return nll, None, None
        dhidden = kernel.dhidden(self.head.dnll, expected, statistics, self.head.weight, self.head.targets)
        return nll, dhidden, None

    def sweep(self, tiles: Tiles):
        """(None, dhidden, dweight) from known statistics."""
        statistics = self.left()[0]
        wanted = {"want_dhidden": True, "want_dweight": True, "gemm": tiles.gemm, "tiles": tiles}
        return None, *kernel.sweep(self.head.dnll, *self.arguments, statistics, **wanted)

    def dweight(self, tiles: Tiles):
        """(None, None, dweight) from kept tiles."""
        left = self.left()
        return None, None, kernel.dweight(self.head.dnll, *self.arguments, *left, gemm=tiles.gemm)

    def call(self, mode: str, tiles: Tiles):
        """(nll, dhidden, dweight) of one mode."""
        if mode == "sweep":
            return self.sweep(tiles)
        if mode == "dW from kept":
            return self.dweight(tiles)
        return self.forward(tiles, mode == "frozen head")


class Sweep:
    """The head in use with its runs; another size frees both."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.heads, self.units = bench, Heads(bench), Units(bench)
        self._runs: Runs | None = None

    def runs(self, size: Size) -> Runs:
        if self._runs is None or self._runs.head.size != size:
            self._runs = None
            self._runs = Runs(self.heads.get(size))
        return self._runs

    def row(self, size: Size, mode: str, tiles: Tiles) -> dict[str, object]:
        """Errors, then time of one shape."""
        runs = self.runs(size)
        errors = {} if self.bench.warm else runs.head.errors(*runs.call(mode, tiles))
        found = self.bench.measure(lambda: runs.call(mode, tiles), seconds=0.15)
        return {**found, **self.units.figures(runs.head, UNITS[mode], found), **errors}

    def columns(self, size: Size, mode: str, tiles: Tiles) -> dict[str, object]:
        """What is known of a row beforehand."""
        shape = {"N": size.rows, "D": size.hidden, "V": size.classes, "case": size.case}
        shape |= {"op": "linear_cross_entropy", "provider": f"vrpo {tiles.gemm}", "mode": mode}
        shape["dtype"] = self.bench.dtype_name
        if mode == "dW from kept":
            return shape
        sweep = mode == "sweep"
        shape["rows"] = tiles.sweep_rows if sweep else tiles.rows
        shape["cols"] = tiles.sweep_cols if sweep else tiles.cols
        shape["streams"] = tiles.streams
        if tiles.gemm == "fused":
            shape |= {name: getattr(tiles, name) for name in BLOCKS}
        else:
            shape["fold_cols"] = tiles.fold_cols
        return shape

    def task(self, size: Size, mode: str, tiles: Tiles) -> Task:
        columns = self.columns(size, mode, tiles)
        hidden = ("op", "dtype", "D", "V")
        shown = [str(columns[key]) for key in FIELDS if key in columns and key not in hidden]
        return Task(" ".join(shown), columns, lambda: self.row(size, mode, tiles))

    def direct_dweight(self, size: Size) -> list[dict]:
        """dW as bare products of random tiles: into 16 bits with sums in 16 or 32 bits, and into fp32."""
        head, rows = self.runs(size).head, []
        kept = torch.empty(size.rows, size.classes, dtype=self.bench.dtype, device=self.bench.device)
        kept.uniform_(0, 1)
        dtypes = (self.bench.dtype, torch.float32)
        outs = {dtype: torch.empty_like(head.weight, dtype=dtype) for dtype in dtypes}

        def sixteen() -> None:
            torch.mm(kept.t(), head.hidden, out=outs[self.bench.dtype])

        def both() -> None:
            product(kept.t(), head.hidden, outs[torch.float32])
            outs[self.bench.dtype].copy_(outs[torch.float32])

        for case, reduced, run in (
            ("torch.mm into 16 bits, partial sums in fp32", False, sixteen),
            ("torch.mm into 16 bits, PyTorch's default", None, sixteen),
            ("torch.mm into fp32", None, lambda: product(kept.t(), head.hidden, outs[torch.float32])),
            ("torch.mm into fp32, then a copy into 16 bits", None, both),
        ):
            before = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
            try:
                if reduced is not None:
                    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = reduced
                found = self.bench.measure(run, seconds=0.15)
            finally:
                torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = before
            rows.append({"provider": case, **found, **self.units.figures(head, 1, found)})
        return rows

    def best(self, count: int, size: Size, mode: str, provider: str) -> list[Tiles]:
        """The fastest correct shapes measured for a size so far in this process."""
        wanted = {"N": size.rows, "mode": mode, "provider": provider, "verdict": "ok"}
        good = [row for row in self.bench.rows if wanted.items() <= row.items()]
        good.sort(key=lambda row: float(row["ms_p50"]))
        base, found = base_tiles(self.bench), []
        for row in good[:count]:
            if mode == "sweep":
                values = {"sweep_rows": row["rows"], "sweep_cols": row["cols"], "streams": row["streams"]}
            else:
                names = ("rows", "cols", "fold_cols", "streams", *BLOCKS)
                values = {name: row[name] for name in names if name in row}
            found.append(replace(base, gemm=provider.removeprefix("vrpo "), **values))
        return found


def base_tiles(bench: Bench) -> Tiles:
    """The table's tiles for this device."""
    capability = torch.cuda.get_device_capability() if bench.device == "cuda" else (9, 0)
    return tiles_for(capability, bench.dtype.itemsize)


def tasks(bench: Bench) -> Iterator[Task]:
    """The work list, a generator: its end depends on what was measured before."""
    sweep, base = Sweep(bench), base_tiles(bench)
    main_size = Size(9, 16, 150) if bench.tiny else Size(4096, *LLADA)
    for mode, tiles in _tiny_cases(base) if bench.tiny else cases(base):
        yield sweep.task(main_size, mode, tiles)
        if mode == "dW from kept" and not bench.warm:
            columns = {"op": "dW", **sweep.columns(main_size, mode, tiles)}
            yield Task("bare products for dW", columns, lambda: sweep.direct_dweight(main_size))
    if bench.warm:
        return
    for rows in (5,) if bench.tiny else (512, 16384):
        size = replace(main_size, rows=rows)
        best = (("frozen head", "cublas", 4), ("frozen head", "fused", 3), ("sweep", "cublas", 3))
        for mode, gemm, count in best:
            for tiles in sweep.best(count, main_size, mode, f"vrpo {gemm}"):
                yield sweep.task(size, mode, tiles)


def main(arguments: list[str] | None = None) -> int:
    """0 unless a task failed for another reason than that its shape does not fit the device."""
    bench = parse(__doc__, "tiles.csv", FIELDS, arguments)
    bench.run(tasks(bench))
    notes = [row["note"] for row in bench.rows if row.get("note")]
    wrong = [note for note in notes if not note.startswith("OutOfResources")]
    red = sum(row.get("verdict") == "RED" for row in bench.rows)
    print(f"{len(bench.rows)} rows, {len(notes)} shapes did not run ({len(wrong)} unexpectedly), {red} RED")
    return 1 if wrong or red else 0


if __name__ == "__main__":
    sys.exit(main())
