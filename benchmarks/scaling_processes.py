"""The axis of processes of `python -m benchmarks scaling`: one and two on a CPU, in turns, by the wall clock.

Two processes share the pairs of a step and add up their gradients under DDP (gloo), one thread each. In the
rounds of one process the other waits. The bare products too are timed in one process and in both at once: two
cores share their memory and their clock.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel

from benchmarks.bare_products import BareProducts
from benchmarks.memory_steps import peak_of_tensors
from benchmarks.scaling_steps import Point, Step, relative_error

PROCESSES = (1, 2)


def measure_processes(point: Point, rounds: int, seconds: float) -> dict[str, dict]:
    """What each number of PROCESSES took: {"1": {...}, "2": {...}}.

    ms: of each round. gflops: of the bare products. peak_MiB: of the first process, DDP's buckets included.
    gradient_error: of two processes, against one. Errors: ValueError if the pairs do not halve.
    """
    if point.pairs % PROCESSES[-1]:
        raise ValueError(f"pairs must be divisible by {PROCESSES[-1]}, the processes, got {point.pairs}")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_run, (folder, point, rounds, seconds), nprocs=PROCESSES[-1])
        return json.loads(Path(folder, "found.json").read_text())


def _run(rank: int, folder: str, point: Point, rounds: int, seconds: float) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES[-1])
    try:
        found = _measure(rank, point, rounds, time.monotonic() + seconds)
        if rank == 0:
            Path(folder, "found.json").write_text(json.dumps(found))
    finally:
        dist.destroy_process_group()


def _measure(rank: int, point: Point, rounds: int, deadline: float) -> dict[str, dict]:
    alone, both = (Step(point, "cpu", torch.float32) for _ in PROCESSES)
    share = point.pairs // PROCESSES[-1]
    both.pack = point.pack(point.batch().examples(rank * share, (rank + 1) * share))

    def wrap() -> None:
        both.training.model = DistributedDataParallel(both.training.model)
        both()

    found: dict[str, dict] = {str(processes): {"ms": []} for processes in PROCESSES}
    found["2"]["peak_MiB"] = peak_of_tensors(wrap, "cpu") / 2**20
    # DDP leaves the mean over the processes, where one process has the sum.
    got = [PROCESSES[-1] * parameter.grad for parameter in both.training.trained()]
    alone()
    want = [parameter.grad.clone() for parameter in alone.training.trained()]
    found["2"]["gradient_error"] = relative_error(got, want)
    alone.forget()
    found["1"]["peak_MiB"] = peak_of_tensors(alone, "cpu") / 2**20
    steps = dict(zip(PROCESSES, (alone, both), strict=True))
    bare = {
        processes: BareProducts(
            point.size, len(step.pack.tokens_T), len(step.pack.row_N), "cpu", torch.float32
        )
        for processes, step in steps.items()
    }
    best: dict[tuple[int, str], float] = {}
    for number in range(rounds):
        if number and _is_late(deadline):
            break
        for processes, step in steps.items():
            for name in ("layer", "head"):
                ms = _turn(getattr(bare[processes], name), takes_part=rank < processes)
                best[processes, name] = min(ms, best.get((processes, name), ms))
            found[str(processes)]["ms"].append(_turn(step, takes_part=rank < processes))
    if rank == 0:
        for processes in PROCESSES:
            gflops = bare[processes].gflops(best[processes, "layer"], best[processes, "head"])
            found[str(processes)]["gflops"] = gflops
    return found


def _turn(run: Callable[[], object], *, takes_part: bool) -> float:
    """Milliseconds of a call that all processes begin together; those that take no part wait for its end."""
    dist.barrier()
    start = time.perf_counter()
    if takes_part:
        run()
    ms = 1e3 * (time.perf_counter() - start)
    dist.barrier()
    return ms


def _is_late(deadline: float) -> bool:
    """Of the first process, for all: they make the same number of rounds."""
    late = torch.tensor([time.monotonic() > deadline])
    dist.broadcast(late, 0)
    return bool(late)
