"""Interleaved timing and peak memory, on CPUs and CUDA devices."""

import ctypes
import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class Timing:
    """Milliseconds of each repeat; growth of memory during one call in MiB (None if not measurable).

    failure: why there are no (more) samples, "" if nothing failed.
    """

    samples: list[float] = field(default_factory=list)
    peak_mib: float | None = None
    failure: str = ""

    def quantile(self, share: float) -> float:
        """The sample at this share of the sorted samples, in ms."""
        ordered = sorted(self.samples)
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    def median_interval(self) -> tuple[float, float] | None:
        """Two samples between which the median lies with at least 95 %, whatever their distribution: ranks k
        and n + 1 - k with P(Binomial(n, 1/2) < k) <= 2.5 %. None with fewer than 6 samples.
        """
        count = len(self.samples)
        tails = [
            sum(math.comb(count, heads) for heads in range(left + 1)) / 2**count for left in range(count)
        ]
        outside = sum(tail <= 0.025 for tail in tails)
        if not outside:
            return None
        ordered = sorted(self.samples)
        return ordered[outside - 1], ordered[-outside]


def clock_name(device: str, threads: int) -> str:
    """What `interleaved` reads: with one CPU thread its CPU time, which other processes disturb less."""
    if device == "cuda":
        return "cuda events"
    return "cpu time" if threads == 1 else "wall"


def time_once(run: Callable[[], object], device: str, threads: int) -> float:
    """Milliseconds of one call, on the clock of `clock_name`."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    clock = time.process_time if threads == 1 else time.perf_counter
    start = clock()
    run()
    return 1e3 * (clock() - start)


def interleaved(
    runs: dict[str, Callable[[], object]],
    *,
    device: str,
    threads: int,
    repeats: int,
    deadline: float = math.inf,
    keep_going: bool = False,
    memory: bool = True,
) -> dict[str, Timing]:
    """Time all runs round after round, so that a busy minute of the machine hits all of them alike.

    The first call of each run compiles and warms up; it is not counted. At `deadline` (of time.monotonic())
    no further round begins; there is always one. keep_going: a run that raises is noted in its `failure` and
    left out from then on, instead of ending all of them. memory: False saves the call that measures peak_mib.
    """
    timings = {name: Timing() for name in runs}
    gc.collect()
    gc.freeze()  # else every collection below looks through the imported packages again, half a second each
    try:
        for name, run in runs.items():
            try:
                run()
                timings[name].peak_mib = peak_memory(run, device) if memory else None
            except Exception as failure:
                _note(timings[name], failure, keep_going)
            gc.collect()
            gc.freeze()  # what compiling left
        wait = _queue_filler(device)
        for count in range(repeats):
            if count and time.monotonic() > deadline:
                break
            _round(runs, timings, wait, device=device, threads=threads, keep_going=keep_going)
    finally:
        gc.unfreeze()
    return timings


def _round(
    runs: dict[str, Callable[[], object]],
    timings: dict[str, Timing],
    wait: Callable[[], object],
    *,
    device: str,
    threads: int,
    keep_going: bool,
) -> None:
    """One call of each run that has not failed."""
    gc.collect()
    for name, run in runs.items():
        if timings[name].failure:
            continue
        if device == "cpu":
            gc.collect()  # on a GPU the queue hides it, and it would take longer than the runs
        wait()
        try:
            timings[name].samples.append(time_once(run, device, threads))
        except Exception as failure:
            _note(timings[name], failure, keep_going)


def describe(failure: Exception) -> str:
    """One line of at most 200 characters: type and message."""
    return " ".join(f"{type(failure).__name__}: {failure}".split())[:200]


def _note(timing: Timing, failure: Exception, keep_going: bool) -> None:
    if not keep_going:
        raise failure
    timing.failure = describe(failure)


def _queue_filler(device: str) -> Callable[[], object]:
    """What comes before every timed call: on CUDA a cold L2 for everybody, and about 1.5 ms of work that lets
    the host queue the call's launches first, as it does in a training step.
    """
    if device != "cuda":
        return lambda: None
    flush = torch.empty(2**27, dtype=torch.int32, device="cuda")

    def fill() -> None:
        for _ in range(8):
            flush.zero_()

    return fill


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Growth of memory during one call above what was there before, outputs included, in MiB.

    CUDA: the allocator's own peak. CPU on Linux: the peak of the resident set, which sees all buffers.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # so that freed memory of earlier runs does not hide new allocations
    try:
        reset.write_text("5")
    except OSError:
        return None
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    """A field of /proc/self/status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no field {name}")
