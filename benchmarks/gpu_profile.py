"""Where the time of one call goes: milliseconds and launches per kernel, and how long the device was idle."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu_bench import Bench

SHOWN = 16


def kernels_of(bench: Bench, run: Callable[[], object]) -> list[tuple[str, float, float]]:
    """(name, start, end) of everything one call of `run` did on the device, in microseconds.

    In a rehearsal on a CPU: of every operator, nested ones included.
    """
    cuda = bench.device == "cuda"
    activity = ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU
    run()
    bench.synchronize()
    with torch.profiler.profile(activities=[activity]) as recorded:
        run()
        bench.synchronize()
    device = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    events = (event for event in recorded.events() if event.device_type == device)
    return [(event.name, event.time_range.start, event.time_range.end) for event in events]


def summary(found: list[tuple[str, float, float]]) -> list[str]:
    """Lines: the span, the share of it in which nothing ran, then kernels by total time."""
    if not found:
        return ["  the profiler saw nothing on the device (no CUPTI?)"]
    spent, count = defaultdict(float), defaultdict(int)
    for name, start, end in found:
        spent[name] += end - start
        count[name] += 1
    first, last = min(start for _, start, _ in found), max(end for _, _, end in found)
    busy, reached = 0.0, first
    for _, start, end in sorted(found, key=lambda event: event[1]):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = max(last - first, 1e-9)
    idle = 100 * (1 - busy / span)
    lines = [f"  from first to last {span / 1e3:.3f} ms, idle {idle:.1f} %, {len(found)} launches"]
    order = sorted(spent, key=spent.get, reverse=True)
    for name in order[:SHOWN]:
        lines.append(f"  {spent[name] / 1e3:9.3f} ms {count[name]:5d} x  {name[:140]}")
    rest = sum(spent[name] for name in order[SHOWN:])
    if len(order) > SHOWN:
        lines.append(f"  {rest / 1e3:9.3f} ms        {len(order) - SHOWN} others")
    return lines


def profile(bench: Bench, title: str, run: Callable[[], object], path: Path) -> None:
    """Appends the summary of one call to a text file, and prints it."""
    lines = [f"{title} ({bench.facts['device']}, {bench.facts['git']}, {bench.facts['date']})"]
    lines += summary(kernels_of(bench, run))
    text = "\n".join(lines) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(text + "\n")
    print(text, flush=True)
