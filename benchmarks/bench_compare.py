"""python -m benchmarks compare --base REV: is this checkout slower than another revision?

Both revisions' kernels run in two processes that take turns, benchmark by benchmark and round by round, so
that a busy minute of the machine hits both alike; with one CPU thread CPU time is taken. The benchmarks are
those of benchmarks/micro in this checkout, for both. Printed per benchmark: the best milliseconds of both,
the ratio of these (head / base), and the 10th and 90th percentile of the ratio round by round. Exit status 1
if a benchmark is slower than --threshold with its whole spread (the ratio of the bests and the 10th
percentile both beyond), or if this checkout's results are wrong; 2 if a revision cannot be built. What the
base lacks is "not in base".
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import DTYPES
from benchmarks.compare_build import BuildError, build_extension, copy_revision, copy_working_tree
from benchmarks.compare_child import HARNESS, Side
from benchmarks.micro.micro import SIZES, Micro
from benchmarks.micro.registry import MICROS

TURN_MS = 20.0
"""A turn repeats a call until it takes about this long."""


@dataclass(frozen=True)
class Ratio:
    """head / base of one benchmark.

    Attributes:
        head_ms, base_ms: the best rounds.
        low, high: 10th and 90th percentile of the ratio round by round.
    """

    head_ms: float
    base_ms: float
    low: float
    high: float

    @classmethod
    def of(cls, head: list[float], base: list[float]) -> "Ratio":
        """From the milliseconds of each round."""
        ratios = sorted(one / other for one, other in zip(head, base, strict=True))
        last = len(ratios) - 1
        return cls(min(head), min(base), ratios[round(0.1 * last)], ratios[round(0.9 * last)])

    @property
    def best(self) -> float:
        """Best over best."""
        return self.head_ms / self.base_ms

    def slower(self, threshold: float) -> bool:
        """Whether the whole spread lies beyond the threshold."""
        return min(self.best, self.low) > threshold


@dataclass(frozen=True)
class Finding:
    """What one benchmark gave: a ratio, or a note why there is none."""

    micro: Micro
    dtype: str
    ratio: Ratio | None = None
    note: str = ""
    failed: bool = False

    def line(self, threshold: float) -> str:
        """One line of the table."""
        name = f"{self.micro.name}, {self.dtype}" if self.micro.floating else self.micro.name
        if self.ratio is None:
            return f"  {name:62s} {self.note}"
        found = self.ratio
        mark = "  SLOWER" if found.slower(threshold) else ""
        spread = f"{found.best:6.3f}  {found.low:.3f} .. {found.high:.3f}"
        return f"  {name:62s} {found.base_ms:10.3f} {found.head_ms:10.3f}  {spread}{mark}"


def compare(micro: Micro, dtype: str, head: Side, base: Side, rounds: int) -> Finding:
    """Prepares one benchmark on both sides and lets them take turns."""
    for side in (head, base):
        answer = side.ask(do="prepare", name=micro.name, dtype=dtype)
        if "wrong" in answer:
            return Finding(micro, dtype, note=f"wrong in {side.name}: {answer['wrong']}", failed=side is head)
        if "missing" in answer:
            return Finding(micro, dtype, note=f"not in {side.name}: {answer['missing']}", failed=side is head)
    first = max(side.ask(do="time", calls=1)["ms"] for side in (head, base))
    calls = max(1, min(10_000, round(TURN_MS / max(first, 1e-3))))
    samples: dict[str, list[float]] = {"head": [], "base": []}
    for number in range(rounds):
        for side in (head, base) if number % 2 else (base, head):
            samples[side.name].append(side.ask(do="time", calls=calls)["ms"])
    return Finding(micro, dtype, Ratio.of(samples["head"], samples["base"]))


def select(ops: list[str] | None, modes: list[str] | None) -> list[Micro]:
    """The benchmarks of these ops, and of these modes if any are named."""
    return [micro for micro in MICROS if (not ops or micro.op in ops) and (not modes or micro.mode in modes)]


def main(arguments: list[str]) -> int:
    """0 if nothing is slower, 1 if something is or is wrong, 2 if a revision cannot be built."""
    options = _parse(arguments)
    micros = select(options.ops, options.modes)
    try:
        roots = _roots(options, micros)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"head: {options.head or 'the working tree'} ({roots['head'].name}), base: {options.base}")
    settings = {"device": options.device, "sizes": options.sizes, "threads": options.threads}
    sides: list[Side] = []
    findings = []
    try:
        for name, root in roots.items():
            sides.append(Side(name, root, **settings))
        print(f"  {'':62s} {'base ms':>10s} {'head ms':>10s}   ratio  10 % .. 90 % of the rounds")
        for micro in micros:
            for dtype in options.dtypes if micro.floating else options.dtypes[:1]:
                findings.append(compare(micro, dtype, *sides, options.rounds))
                print(findings[-1].line(options.threshold), flush=True)
    finally:
        for side in sides:
            side.close()
    return _verdict(findings, options.threshold)


def _roots(options: argparse.Namespace, micros: list[Micro]) -> dict[str, Path]:
    """Folders of both sides, compiled if a benchmark needs it."""
    place, cache = options.repository, options.cache
    head = copy_revision(place, options.head, cache) if options.head else copy_working_tree(place, cache)
    roots = {"head": head, "base": copy_revision(place, options.base, cache)}
    if options.device == "cpu" and any(micro.needs_extension for micro in micros):
        for root in roots.values():
            build_extension(root, cache)
    return roots


def _verdict(findings: list[Finding], threshold: float) -> int:
    found = [one.ratio for one in findings if one.ratio]
    slower = [ratio for ratio in found if ratio.slower(threshold)]
    failed = [one for one in findings if one.failed]
    if found:
        middle = statistics.geometric_mean(ratio.best for ratio in found)
        print(f"\n{len(found)} compared, geometric mean {middle:.3f}; {len(slower)} slower than {threshold}")
    for one in failed:
        print(f"{one.micro.name}: {one.note}")
    return int(bool(slower or failed or not found))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--base", required=True, metavar="REV", help="git revision to compare with")
    parser.add_argument("--head", metavar="REV", help="git revision instead of the working tree")
    parser.add_argument("--repository", type=Path, default=HARNESS, help="checkout (this one)")
    parser.add_argument(
        "--cache", type=Path, default=HARNESS / "runs" / "compare", help="of copies and builds"
    )
    parser.add_argument("--ops", nargs="+", choices=sorted({micro.op for micro in MICROS}))
    parser.add_argument("--modes", nargs="+", choices=sorted({micro.mode for micro in MICROS}))
    parser.add_argument("--threshold", type=float, default=1.10)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=("cpu", "cuda"), default=device)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sizes", choices=list(SIZES), help="those of the device")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), help="fp32 and bf16; bf16 on CUDA")
    options = parser.parse_args(arguments)
    if options.rounds < 3:
        parser.error(f"--rounds must be at least 3, got {options.rounds}")
    if options.threshold < 1:
        parser.error(f"--threshold must be at least 1, got {options.threshold}")
    if not select(options.ops, options.modes):
        parser.error("no benchmark has one of these --ops and one of these --modes")
    options.sizes = options.sizes or options.device
    options.dtypes = options.dtypes or (["bf16"] if options.device == "cuda" else ["fp32", "bf16"])
    return options
