"""The stage `warm` of `make gpu`: compiles into the caches on disk what the timed stages will launch.

    python3 -m benchmarks.gpu_warm I/N [--tiny]        every N-th task of kernels, tiles, memory, from task I
    python3 -m benchmarks.gpu_warm rivals-N [--tiny]   torch.compile of plain PyTorch for N rows

Runs beside the tests, on processor cores that would be idle; nothing is timed and no row is written.
"""

import sys
import time

import torch

from benchmarks import gpu_kernels, gpu_memory, gpu_tiles
from benchmarks.cases import COLUMNS, Case, make_inputs
from benchmarks.gate import full_pass
from benchmarks.gpu_bench import parse
from benchmarks.gpu_kernels import LLADA
from benchmarks.providers import PROVIDERS

ROOM = 50 * 2**30  # bytes that have to be free before the rivals are compiled
STAGES = (
    ("kernels.csv", gpu_kernels),
    ("tiles.csv", gpu_tiles),
    ("memory.csv", gpu_memory),
)


def warm_rivals(num_rows: int, tiny: bool) -> None:
    """Compiles the rival that takes long to compile, for one size of the stage `rivals`."""
    # The large tests beside it go first.
    deadline = time.monotonic() + 30
    while not tiny and torch.cuda.mem_get_info()[0] < ROOM and time.monotonic() < deadline:
        time.sleep(1)
    case = Case(num_rows, *LLADA, torch.bfloat16, "cuda")
    if tiny:
        case = Case(20, 16, 300, torch.float32, "cpu")
    inputs = make_inputs(case)
    op = PROVIDERS["torch.compile"].make(case)
    for column in COLUMNS:
        start = time.monotonic()
        full_pass(op, inputs, column)
        print(f"torch.compile, {column}: {time.monotonic() - start:.1f} s", flush=True)


def main(arguments: list[str]) -> int:
    """1 if a task raised."""
    share, options = arguments[0], arguments[1:]
    if share.startswith("rivals-"):
        warm_rivals(int(share.removeprefix("rivals-")), "--tiny" in options)
        return 0
    failed = 0
    for file, stage in STAGES:
        bench = parse(__doc__, file, stage.FIELDS, ["--warm", share, *options])
        failed += bench.run(stage.tasks(bench))
        bench.clear()
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
