"""The stage `tiles` of `make gpu`: the sweep that `linear_cross_entropy/tiles.py` is corrected from.

    python3 -m benchmarks.gpu_tiles [--output DIR] [--until EPOCH] [--skip TASKS] [--warm I/N] [--tiny]

Times the backend's own functions over tile shapes for LLaDA's head at N from 512 to 16384, each beside
the bare GEMM of the same moment. Each row is judged against fp64 like those of the stage `kernels`; a
shape that does not compile or does not fit is a row that says so. Rows go to tiles.csv.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.gpu_bench import BESIDE, TIMES, Bench, Task, parse
from benchmarks.gpu_kernels import LLADA, Problems
from benchmarks.gpu_truth import ERRORS, Head, Size
from vrpo_kernels.linear_cross_entropy import kernel
from vrpo_kernels.linear_cross_entropy.tiles import Tiles, tiles_for

BLOCKS = ("block_rows", "block_cols", "block_hidden", "num_warps", "num_stages")
FIELDS = (
    *("op", "provider", "mode", "dtype", "N", "D", "V", "case"),
    *("rows", "cols", "first_cols", "fold_cols"),
    *BLOCKS,
    *(*TIMES, *BESIDE, "tflops"),
    *(*ERRORS, "note"),
)
ROWS = (4096, 16384, 512, 4100, 1024, 2048)  # of the last three only what the stages do
UNITS = {"no gradient": 1, "frozen head": 2, "sweep": 3}


def _fused(base: Tiles, stages: int, cols: int = 32768, **changes: int) -> Tiles:
    changes |= {"num_stages": stages, "num_stages_few_rows": stages}
    return replace(base, gemm="fused", rows=4096, cols=cols, first_cols=8192, **changes)


def cases(base: Tiles, num_rows: int) -> list[tuple[str, Tiles]]:
    """(mode, tiles) for so many rows, in the order of what is learnt from them."""
    modes = ("frozen head", "no gradient")
    found = [(mode, _fused(base, stages)) for stages in (3, 4) for mode in modes]
    if num_rows not in ROWS[:3]:
        return found
    # Narrower tiles of E take less memory.
    found += [("frozen head", _fused(base, 3, cols)) for cols in (16384, 8192)]
    for cols in (8192, 16384, 32768):
        sweep = {"sweep_rows": 4096, "sweep_cols": cols}
        found += [("sweep", replace(_fused(base, stages), **sweep)) for stages in (3, 4)]
        found.append(("sweep", replace(base, gemm="cublas", **sweep)))
    found.append(("frozen head", _fused(base, 3, block_rows=256, block_cols=128)))
    found.append(("frozen head", _fused(base, 2, block_hidden=128)))
    found.append(("frozen head", replace(base, gemm="cublas", rows=4096, cols=32768)))
    return found


def _tiny_cases(base: Tiles) -> list[tuple[str, Tiles]]:
    shapes = {"rows": 128, "cols": 64, "fold_cols": 64, "sweep_rows": 128, "sweep_cols": 64, "first_cols": 32}
    cublas = replace(base, gemm="cublas", **shapes)
    small = {"block_rows": 32, "block_cols": 32, "block_hidden": 16, "num_warps": 4, "num_stages": 2}
    fused = replace(cublas, gemm="fused", **small)
    return [
        ("frozen head", cublas),
        ("frozen head", fused),
        ("no gradient", fused),
        ("sweep", cublas),
        ("sweep", fused),
    ]


class Runs:
    """Calls of the kernel module for one head; the statistics of its forward pass are made once."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self.arguments = (head.hidden, head.weight, head.targets)
        self._statistics: torch.Tensor | None = None

    def forward(self, tiles: Tiles, want_dhidden: bool):
        """(nll, dhidden or None, None). dhidden is scaled as the backward pass does it."""
        options = {"gemm": tiles.gemm, "want_dhidden": want_dhidden, "keep_tiles": False, "tiles": tiles}
        nll, statistics, expected, *_ = kernel.forward(*self.arguments, **options)
        if not want_dhidden:
            return nll, None, None
        dhidden = kernel.dhidden(self.head.dnll, expected, statistics, self.head.weight, self.head.targets)
        return nll, dhidden, None

    def sweep(self, tiles: Tiles):
        """(None, dhidden, dweight) from known statistics."""
        if self._statistics is None:
            options = {"gemm": "cublas", "want_dhidden": False, "keep_tiles": False}
            self._statistics = kernel.forward(*self.arguments, **options)[1]
        wanted = {"want_dhidden": True, "want_dweight": True, "gemm": tiles.gemm, "tiles": tiles}
        dhidden, dweight, _ = kernel.sweep(self.head.dnll, *self.arguments, self._statistics, **wanted)
        return None, dhidden, dweight

    def call(self, mode: str, tiles: Tiles):
        """(nll, dhidden, dweight) of one mode."""
        return self.sweep(tiles) if mode == "sweep" else self.forward(tiles, mode == "frozen head")


class Sweep:
    """The head in use with its unit and its runs; another size frees them."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.problems = bench, Problems(bench)
        self._runs: Runs | None = None

    def row(self, size: Size, mode: str, tiles: Tiles) -> dict[str, object]:
        """Errors, then time of one shape."""
        if self._runs is not None and self._runs.head.size != size:
            self._runs = None
        head, unit = self.problems.get(size)
        self._runs = runs = self._runs or Runs(head)
        errors = {} if self.bench.warm else head.errors(*runs.call(mode, tiles))
        return {**unit.measure(lambda: runs.call(mode, tiles), UNITS[mode], seconds=0.25), **errors}

    def columns(self, size: Size, mode: str, tiles: Tiles) -> dict[str, object]:
        """What is known of a row beforehand."""
        shape = {"N": size.rows, "D": size.hidden, "V": size.classes, "case": size.case}
        shape |= {"op": "linear_cross_entropy", "provider": f"vrpo {tiles.gemm}", "mode": mode}
        shape["dtype"] = self.bench.dtype_name
        sweep = mode == "sweep"
        shape["rows"] = tiles.sweep_rows if sweep else tiles.rows
        shape["cols"] = tiles.sweep_cols if sweep else tiles.cols
        if tiles.gemm == "fused":
            shape |= {name: getattr(tiles, name) for name in BLOCKS}
            shape |= {} if sweep else {"first_cols": tiles.first_cols}
        else:
            shape |= {} if sweep else {"fold_cols": tiles.fold_cols}
        return shape

    def task(self, size: Size, mode: str, tiles: Tiles) -> Task:
        """One shape as a task."""
        columns = self.columns(size, mode, tiles)
        hidden = ("op", "dtype", "D", "V")
        shown = [str(columns[key]) for key in FIELDS if key in columns and key not in hidden]
        return Task(" ".join(shown), columns, lambda: self.row(size, mode, tiles))


def base_tiles(bench: Bench) -> Tiles:
    """The table's tiles for this device."""
    capability = torch.cuda.get_device_capability() if bench.device == "cuda" else (9, 0)
    return tiles_for(capability, bench.dtype.itemsize)


def tasks(bench: Bench) -> Iterator[Task]:
    """The work list; what is compiled does not depend on the number of rows."""
    sweep, base = Sweep(bench), base_tiles(bench)
    if bench.tiny:
        for mode, tiles in _tiny_cases(base):
            yield sweep.task(Size(9, 16, 150), mode, tiles)
        return
    for rows in ROWS[:1] if bench.warm else ROWS:
        for mode, tiles in cases(base, rows):
            yield sweep.task(Size(rows, *LLADA), mode, tiles)


def main(arguments: list[str] | None = None) -> int:
    """0 unless a task failed for another reason than that its shape does not fit the device."""
    bench = parse(__doc__, "tiles.csv", FIELDS, arguments)
    bench.run(tasks(bench), tasks(bench))
    notes = [row["note"] for row in bench.rows if row.get("note")]
    wrong = [note for note in notes if not note.startswith("OutOfResources")]
    red = sum(row.get("verdict") == "RED" for row in bench.rows)
    print(f"{len(bench.rows)} rows, {len(notes)} shapes did not run ({len(wrong)} unexpectedly), {red} RED")
    return 1 if wrong or red else 0


if __name__ == "__main__":
    sys.exit(main())
