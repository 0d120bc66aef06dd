"""python -m benchmarks kernels: linear_cross_entropy against every rival, on one contract, in one run.

Forward plus backward with an arbitrary gradient per row, in units of the fastest bare GEMM of that dtype in
the same run, for a plain head and for heads with a bias or a soft-cap. Ours is checked by the tolerance
policy of `vrpo_kernels/testing.py` before it is timed; on a CPU it has no figure if it fails. Rivals are held
to the same policy and marked where they exceed it; so is ours on a GPU, whose tensor cores truncate as they
add. Providers that cannot run show why. Rows are appended to results/kernels.csv: on a GPU after every stage
of `providers.py`, all stages of a case before the next. units_p50 is median over median; units_p20, units_p80
are percentiles of the ratio round by round, each round with its own unit. peak_MiB is memory above the inputs
during one call. On a CPU: N=512 D=1024 V=32768, one thread and all, heads timed together, the note of ours
being what a head costs above the plain one round by round, with a 95 % interval; on CUDA LLaDA's head;
--model has heads of models.
"""

import argparse
import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks.cases import COLUMNS, Case, Inputs, make_inputs
from benchmarks.gate import Gate, full_pass
from benchmarks.gpu_reached import print_done, print_plan
from benchmarks.kernels_plan import Turn, labels, parse, turns
from benchmarks.providers import PROVIDERS, Op
from benchmarks.record import append, provenance
from benchmarks.timing import Timing, clock_name, describe, interleaved
from vrpo_kernels.linear_cross_entropy import plan_linear_cross_entropy

FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads", "clock", "load"),
    *("provider", "column", "head", "dtype", "N", "D", "V", "logits", "seed"),
    *("ms_min", "ms_p20", "ms_p50", "ms_p80", "reps"),
    *("units_min", "units_p20", "units_p50", "units_p80", "unit_ms_min", "peak_MiB"),
    *("nll_error", "policy_ratio", "note"),
)
ABOVE_PLAIN = " above the plain head"
NO_TIME, LOST = "not run: no time left", "the device was lost"


def bare_gemms(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The candidates for one unit: hidden @ weight^T in the case's dtype."""
    runs = {"torch.mm": lambda: torch.mm(inputs.hidden, inputs.weight.T)}
    if inputs.hidden.device.type == "cpu" and torch.backends.mkldnn.is_available():
        runs["oneDNN linear"] = lambda: torch.ops.mkldnn._linear_pointwise(
            inputs.hidden, inputs.weight, None, "none", [], ""
        )
    return runs


def other_gemms(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """For information: the same product with an fp32 result, as our tiles of logits are formed."""
    if inputs.hidden.device.type != "cuda" or inputs.hidden.dtype is torch.float32:
        return {}
    return {"torch.mm, fp32 result": lambda: torch.mm(inputs.hidden, inputs.weight.T, torch.float32)}


@dataclass
class Starts:
    """Seconds until a provider is ready to be timed.

    Attributes:
        compiled: what every provider compiles is in the caches on disk.
        taken: provider -> seconds it took last.
    """

    compiled: bool = False
    taken: dict[str, float] = field(default_factory=dict)

    def expected(self, name: str) -> float:
        """As long as it took at another size; with full caches, as long as the slowest of the others."""
        if name in self.taken:
            return self.taken[name]
        if self.compiled and self.taken:
            return max(self.taken.values())
        return PROVIDERS[name].start_seconds


class Bench:
    """One case with one or more heads: inputs, the rows found so far, what is timed together, interleaved."""

    def __init__(
        self,
        case: Case,
        heads: Sequence[str] = (),
        *,
        deadline: float = math.inf,
        starts: Starts | None = None,
    ) -> None:
        self.case, self.deadline, self.starts = case, deadline, starts or Starts()
        self.on_gpu = case.device == "cuda"
        self.lost = ""
        plain = make_inputs(case)
        self.inputs = {head: plain.with_head(head) for head in heads or (case.head,)}
        self.rows: list[dict] = []
        self._gate: tuple[str, Gate] | None = None
        self._runs: dict[str, Callable[[], object]] = {}

    def prepare(self, name: str, head: str) -> None:
        """Gates and warms up one provider. What a rival cannot do is a row that says why."""
        provider, inputs, case = PROVIDERS[name], self.inputs[head], replace(self.case, head=head)
        row = {"provider": name, "head": head, "column": "", "nll_error": "", "policy_ratio": "", "note": ""}
        row["note"] = provider.missing(case) or self.lost
        if not row["note"] and time.monotonic() + self.starts.expected(name) * self.on_gpu > self.deadline:
            row["note"] = NO_TIME
        if row["note"]:
            self.rows.append(row)
            return
        start, failed = time.monotonic(), ""
        try:
            if self.on_gpu:
                torch.cuda.reset_peak_memory_stats()
            op = provider.make(case)
            if provider.per_row and not self._passes(name, head, op, row):
                self.rows.append(row)
                return
            for column in COLUMNS:
                full_pass(op, inputs, column, per_row=provider.per_row)
        except Exception as failure:
            if name.startswith("vrpo") and not self.on_gpu:
                raise
            failed = f"fails: {describe(failure)}"[:200]
        if failed:  # only here, where the exception no longer holds the tensors of its frames
            self.rows.append(row | {"note": failed, "peak_MiB": self._recover()})
            return
        for column in COLUMNS:
            self._runs[_key(name, head, column)] = lambda column=column: full_pass(
                op, inputs, column, per_row=provider.per_row
            )
            self.rows.append(row | {"column": column})
        self.starts.taken[name] = time.monotonic() - start
        print(f"  ready: {name}, {head}, {self.starts.taken[name]:.1f} s", flush=True)

    def _passes(self, name: str, head: str, op: Op, row: dict) -> bool:
        """Fills in what the gate says; whether the provider may have a figure."""
        if self._gate is None or self._gate[0] != head:
            self._gate = None  # frees the other head's truth first
            self._gate = head, Gate(self.inputs[head])
        verdict = self._gate[1].judge(op)
        row |= {"nll_error": f"{verdict.nll_error:.2e}", "policy_ratio": f"{verdict.worst:.3g}"}
        row["note"] = verdict.note
        return self.on_gpu or not name.startswith("vrpo") or not verdict.note

    def _recover(self) -> str:
        """Frees what a failure left behind; returns the peak of the process in MiB. If the device no longer
        answers, nothing that follows can run.
        """
        if not self.on_gpu:
            return ""
        try:
            peak = f"{torch.cuda.max_memory_allocated() / 2**20:.0f}"
            torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
        except RuntimeError as failure:
            self.lost = f"not run: {LOST}, {describe(failure)}"[:200]
            return ""
        return peak

    def measure(self, *, threads: int, repeats: int) -> list[dict]:
        """Times everything that is ready, with the unit; returns all rows."""
        self._gate = None
        if self.on_gpu and (self.lost or not self._runs):
            return self._without_figures()
        operands = next(iter(self.inputs.values()))
        plain, others = bare_gemms(operands), other_gemms(operands)
        timings = interleaved(
            {**plain, **others, **self._runs},
            device=self.case.device,
            threads=threads,
            repeats=repeats,
            deadline=self.deadline,
            keep_going=self.on_gpu,
        )
        timed = [name for name in plain if timings[name].samples]
        if not timed:
            self._recover()
            return self._without_figures()
        best = min(timed, key=lambda name: timings[name].quantile(0.5))
        unit = timings[best]
        for row in self.rows:
            if row["column"]:
                row |= _figures(timings[_key(row["provider"], row["head"], row["column"])], unit)
                row["note"] = row["note"] or self._above_plain(row, timings, unit)
        for name in (*plain, *others):
            row = {"provider": f"bare {name}", "head": next(iter(self.inputs)), "column": "unit"}
            self.rows.append({**row, **_figures(timings[name], unit)})
        rate = 2 * self.case.num_rows * self.case.size * self.case.num_classes / unit.quantile(0) / 1e6
        print(f"  unit: {best}, {unit.quantile(0.5):.2f} ms, at best {rate:.0f} GFLOP/s", flush=True)
        return self.rows

    def _above_plain(self, row: dict, timings: dict[str, Timing], unit: Timing) -> str:
        """What a head of ours costs beyond the plain one of the same rounds, if that was timed."""
        one, plain = (
            timings.get(_key(row["provider"], head, row["column"])) for head in (row["head"], "plain")
        )
        if row["head"] == "plain" or plain is None or not row["provider"].startswith("vrpo"):
            return ""
        return above_plain(one, plain, unit)

    def _without_figures(self) -> list[dict]:
        """The rows with, in each, why it has no figure."""
        return [row | {"note": self.lost if row["column"] else row["note"]} for row in self.rows]


def _key(name: str, head: str, column: str) -> str:
    return f"{name}|{head}|{column}"


def bench(
    case: Case,
    heads: Sequence[str] = (),
    *,
    threads: int,
    repeats: int,
    wanted: list[str],
    deadline: float = math.inf,
    starts: Starts | None = None,
) -> list[dict]:
    """The wanted providers and all columns of one case and its heads, timed together: one CSV row each."""
    torch.compiler.reset()  # else many cases in one process end in torch.compile's limit, and in eager
    if case.device == "cpu":
        torch.set_num_threads(threads)
    run = Bench(case, heads, deadline=deadline, starts=starts)
    for head in run.inputs:
        for name in wanted:
            run.prepare(name, head)
    return run.measure(threads=threads, repeats=repeats)


def _figures(timing: Timing, unit: Timing) -> dict:
    if not timing.samples:
        return {"note": f"fails: {timing.failure}"[:200]}
    pairs = zip(timing.samples, unit.samples, strict=False)  # one that failed has fewer rounds
    ratios = Timing([sample / one for sample, one in pairs])
    return {
        "ms_min": f"{timing.quantile(0):.2f}",
        "ms_p20": f"{timing.quantile(0.2):.2f}",
        "ms_p50": f"{timing.quantile(0.5):.2f}",
        "ms_p80": f"{timing.quantile(0.8):.2f}",
        "reps": len(timing.samples),
        "units_min": f"{timing.quantile(0) / unit.quantile(0):.2f}",
        "units_p20": f"{ratios.quantile(0.2):.2f}",
        "units_p50": f"{timing.quantile(0.5) / unit.quantile(0.5):.2f}",
        "units_p80": f"{ratios.quantile(0.8):.2f}",
        "unit_ms_min": f"{unit.quantile(0):.2f}",
        "peak_MiB": "" if timing.peak_mib is None else f"{timing.peak_mib:.0f}",
    }


def print_table(rows: list[dict]) -> None:
    """units (median over median; best over best in brackets) and MiB per column; each head by itself."""
    print(f"  {'':26s}" + "".join(f"{column:>24s}" for column in COLUMNS) + "   nll error  policy")
    heads = list(dict.fromkeys(row["head"] for row in rows))
    for head in heads:
        if len(heads) > 1:
            print(f"  {head}:")
        _print_head([row for row in rows if row["head"] == head])
    for line in heads_against_plain(rows):
        print(f"  {line}")


def above_plain(one: Timing, plain: Timing, unit: Timing) -> str:
    """The median of (one - plain) / unit over the rounds; with six rounds or more its 95 % interval.

    Neighbours in time are compared, so that what a busy machine does to all of them cancels.
    """
    rounds = zip(one.samples, plain.samples, unit.samples, strict=False)
    more = Timing([(cost - without) / gemm for cost, without, gemm in rounds])
    if not more.samples:
        return ""
    interval = more.median_interval()
    spread = f" [{interval[0]:+.2f}, {interval[1]:+.2f}]" if interval else ""
    return f"{more.quantile(0.5):+.2f}{spread} units{ABOVE_PLAIN}"


def heads_against_plain(rows: list[dict]) -> list[str]:
    """A line for each provider of ours and head: what each column costs more than with the plain head."""
    lines: dict[str, list[str]] = {}
    for row in rows:
        if row.get("note", "").endswith(ABOVE_PLAIN):
            cell = f"{row['column']} {row['note'].removesuffix(ABOVE_PLAIN)}"
            lines.setdefault(f"{row['provider']}, {row['head']}", []).append(cell)
    return [f"{name}{ABOVE_PLAIN}: {', '.join(cells)}" for name, cells in lines.items()]


def _print_head(rows: list[dict]) -> None:
    for name in dict.fromkeys(row["provider"] for row in rows):
        own = {row["column"]: row for row in rows if row["provider"] == name}
        first = next(iter(own.values()))
        if "" in own or "unit" in own:
            detail = first.get("note") or f"{first['units_p50']} ({first['units_min']})"
            print(f"  {name:26s} {detail}")
            continue
        cells = "".join(f"{_cell(row):>24s}" for row in own.values())
        verdict = "" if first["note"].endswith(ABOVE_PLAIN) else first["note"]
        print(f"  {name:26s}{cells}   {first['nll_error']:>9s}  {first['policy_ratio']} {verdict}")


def _cell(row: dict) -> str:
    if "units_p50" not in row:
        return "fails"
    return f"{row['units_p50']} ({row['units_min']}) {row['peak_MiB']} MiB"


def main(arguments: list[str]) -> int:
    """Parse, run every turn, print and save one table each. 1 if the device was lost."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = parse(__doc__, arguments, device)
    deadline = time.monotonic() + min(options.seconds, options.until - time.time())
    starts = Starts(options.compiled)
    facts = provenance(device)
    if options.revision:
        facts |= {"git": options.revision, "dirty": ""}
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    planned = list(turns(options, device))
    names = labels(planned)
    print_plan(label for number in names for label in names[number])
    for number, turn in enumerate(planned):
        if time.monotonic() > deadline:
            print(f"out of time before {'; '.join(names[number])}")
            continue
        rows = _run_turn(turn, options, facts, deadline, starts)
        late = {row["provider"] for row in rows if row.get("note") == NO_TIME}
        for name, label in zip(turn.providers, names[number], strict=True):
            if name not in late:
                print_done(label)
        if any(LOST in row.get("note", "") for row in rows):
            print(LOST)
            return 1
    return 0


def _run_turn(
    turn: Turn, options: argparse.Namespace, facts: dict, deadline: float, starts: Starts
) -> list[dict]:
    case, threads = turn.case, turn.threads
    meta = [torch.empty(n, case.size, dtype=case.dtype, device=case.device) for n in (case.num_rows, 1)]
    plan = plan_linear_cross_entropy(meta[0], meta[1])
    load, clock = f"{_load():.1f}", clock_name(case.device, threads)
    print(
        f"\n{turn.dtype} N={case.num_rows} D={case.size} V={case.num_classes} {case.logits} logits, "
        f"{', '.join(turn.heads)}, {threads} threads, {clock}, machine load {load}, "
        f"ours: {plan.backend}/{plan.gemm}",
        flush=True,
    )
    rows = bench(
        case,
        turn.heads,
        threads=threads,
        repeats=options.repeats,
        wanted=turn.providers,
        deadline=deadline,
        starts=starts,
    )
    print_table(rows)
    common = {
        **facts, "threads": threads, "clock": clock, "load": load, "dtype": turn.dtype, "N": case.num_rows,
        "D": case.size, "V": case.num_classes, "logits": case.logits, "seed": case.seed,
    }  # fmt: skip
    append([{**common, **row} for row in rows], options.output, FIELDS)
    return rows


def _load() -> float:
    """Runnable processes over the last minute: how much of the machine others had."""
    path = Path("/proc/loadavg")
    return float(path.read_text().split()[0]) if path.exists() else float("nan")
