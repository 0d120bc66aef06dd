"""python -m benchmarks kernels: linear_cross_entropy against every rival, on one contract, in one run.

Forward plus backward with an arbitrary gradient per row, in units of the fastest bare GEMM of that dtype in
the same run. Ours is checked by the tolerance policy of `vrpo_kernels/testing.py` before it is timed, and has
no figure if it fails; rivals are held to the same policy and marked where they exceed it. Providers that
cannot run show why. Rows are appended to results/kernels.csv. On a CPU: N=512 D=1024 V=32768, one thread and
all; on CUDA LLaDA's head.
"""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.cases import COLUMNS, DTYPES, Case, Inputs, make_inputs
from benchmarks.providers import PROVIDERS, Op
from benchmarks.record import RESULTS, append, provenance
from benchmarks.timing import Timing, clock_name, interleaved
from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import plan_linear_cross_entropy, reference

FILE = RESULTS / "kernels.csv"
GATE_ROWS = 256
FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads", "clock", "load"),
    *("provider", "column", "dtype", "N", "D", "V", "logits", "seed"),
    *("ms_min", "ms_p20", "ms_p50", "ms_p80", "reps", "units_min", "units_p50", "unit_ms_min", "peak_MiB"),
    *("nll_error", "policy_ratio", "note"),
)


def bare_gemms(inputs: Inputs) -> dict[str, Callable[[], object]]:
    """The candidates for one unit: hidden @ weight^T in the case's dtype."""
    runs = {"torch.mm": lambda: torch.mm(inputs.hidden, inputs.weight.T)}
    if inputs.hidden.device.type == "cpu" and torch.backends.mkldnn.is_available():
        runs["oneDNN linear"] = lambda: torch.ops.mkldnn._linear_pointwise(
            inputs.hidden, inputs.weight, None, "none", [], ""
        )
    return runs


def full_pass(op: Op, inputs: Inputs, column: str, *, per_row: bool = True):
    """One call of op with the column's gradients; returns (nll, dhidden, dweight)."""
    need_hidden, need_weight = COLUMNS[column]
    hidden = inputs.hidden.detach().requires_grad_(need_hidden)
    weight = inputs.weight.detach().requires_grad_(need_weight)
    with torch.set_grad_enabled(need_hidden or need_weight):
        nll = op(hidden, weight, inputs.targets)
    if need_hidden or need_weight:
        nll.backward(inputs.upstream.to(nll.dtype) if per_row else None)
    return nll.detach(), hidden.grad, weight.grad


def gate(op: Op, inputs: Inputs) -> tuple[float, float]:
    """(largest nll error in nats, worst ratio of the tolerance policy) on the first rows of the problem."""
    part = inputs.first(GATE_ROWS)
    nll, dhidden, dweight = full_pass(op, part, "trained head")
    truth = reference.linear_cross_entropy(part.hidden.double(), part.weight.double(), part.targets)
    error = (nll.double() - truth).abs().max().item()
    ratios = testing.linear_cross_entropy_ratios(
        nll.float(), dhidden, dweight, part.hidden, part.weight, part.targets, part.upstream
    )
    return error, max(ratios.values())


def bench(case: Case, *, threads: int, repeats: int, wanted: list[str]) -> list[dict]:
    """All providers and columns of one case: one CSV row each."""
    inputs = make_inputs(case)
    torch.compiler.reset()  # else many cases in one process end in torch.compile's limit, and in eager
    if case.device == "cpu":
        torch.set_num_threads(threads)
    plain = bare_gemms(inputs)
    runs: dict[str, Callable[[], object]] = dict(plain)
    rows = []
    for name in wanted:
        provider = PROVIDERS[name]
        row = {"provider": name, "nll_error": "", "policy_ratio": "", "note": provider.missing(case) or ""}
        if row["note"]:
            rows.append({**row, "column": ""})
            continue
        op = provider.make(case)
        try:
            if provider.per_row:
                error, ratio = gate(op, inputs)
                row |= {"nll_error": f"{error:.2e}", "policy_ratio": f"{ratio:.3g}"}
                if ratio > 1:
                    row["note"] = "outside the tolerance policy"
                if name.startswith("vrpo") and ratio > 1:
                    rows.append({**row, "column": ""})
                    continue
            for column in COLUMNS:
                full_pass(op, inputs, column, per_row=provider.per_row)
        except Exception as failure:  # a rival that fails is a fact to report, not a reason to stop
            if name.startswith("vrpo"):
                raise
            rows.append({**row, "column": "", "note": f"fails: {type(failure).__name__}: {failure}"[:200]})
            continue
        for column in COLUMNS:
            runs[f"{name}|{column}"] = lambda op=op, column=column, p=provider: full_pass(
                op, inputs, column, per_row=p.per_row
            )
            rows.append({**row, "column": column})
        print(f"  ready: {name}", flush=True)
    timings = interleaved(runs, device=case.device, threads=threads, repeats=repeats)
    best = min(plain, key=lambda name: timings[name].quantile(0.5))
    unit = timings[best]
    for row in rows:
        if row["column"]:
            row |= _figures(timings[f"{row['provider']}|{row['column']}"], unit)
    for name in plain:
        rows.append({"provider": f"bare {name}", "column": "unit", **_figures(timings[name], unit)})
    rate = 2 * case.num_rows * case.size * case.num_classes / unit.quantile(0) / 1e6
    print(f"  unit: {best}, {unit.quantile(0.5):.1f} ms, at best {rate:.0f} GFLOP/s")
    return rows


def _figures(timing: Timing, unit: Timing) -> dict:
    return {
        "ms_min": f"{timing.quantile(0):.2f}",
        "ms_p20": f"{timing.quantile(0.2):.2f}",
        "ms_p50": f"{timing.quantile(0.5):.2f}",
        "ms_p80": f"{timing.quantile(0.8):.2f}",
        "reps": len(timing.samples),
        "units_min": f"{timing.quantile(0) / unit.quantile(0):.2f}",
        "units_p50": f"{timing.quantile(0.5) / unit.quantile(0.5):.2f}",
        "unit_ms_min": f"{unit.quantile(0):.2f}",
        "peak_MiB": "" if timing.peak_mib is None else f"{timing.peak_mib:.0f}",
    }


def print_table(rows: list[dict]) -> None:
    """units (median over median; best over best in brackets) and MiB per column."""
    print(f"  {'':26s}" + "".join(f"{column:>24s}" for column in COLUMNS) + "   nll error  policy")
    for name in dict.fromkeys(row["provider"] for row in rows):
        own = {row["column"]: row for row in rows if row["provider"] == name}
        first = next(iter(own.values()))
        if "" in own or "unit" in own:
            detail = first.get("note") or f"{first['units_p50']} ({first['units_min']})"
            print(f"  {name:26s} {detail}")
            continue
        cells = "".join(
            f"{r['units_p50'] + ' (' + r['units_min'] + ') ' + r['peak_MiB'] + ' MiB':>24s}"
            for r in own.values()
        )
        print(f"  {name:26s}{cells}   {first['nll_error']:>9s}  {first['policy_ratio']} {first['note']}")


def main(arguments: list[str]) -> int:
    """Parse, run every case, print and save one table per case."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    laptop = device == "cpu"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[512] if laptop else [256, 1024, 4096, 16384])
    parser.add_argument("--size", type=int, default=1024 if laptop else 4096, help="D")
    parser.add_argument("--classes", type=int, default=32768 if laptop else 126464, help="V")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"] if laptop else ["bf16"]
    )
    threads = sorted({1, torch.get_num_threads()}) if laptop else [torch.get_num_threads()]
    parser.add_argument("--threads", type=int, nargs="+", default=threads)
    parser.add_argument("--logits", nargs="+", choices=["random", "peaked"], default=["random"])
    parser.add_argument("--repeats", type=int, default=5 if laptop else 20)
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--output", type=Path, default=FILE, help="CSV file to append to")
    options = parser.parse_args(arguments)
    facts = provenance(device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    base = Case(0, options.size, options.classes, torch.float32, device)
    for num_rows in options.rows:
        for dtype in options.dtypes:
            for logits in options.logits:
                case = replace(base, num_rows=num_rows, dtype=DTYPES[dtype], logits=logits)
                for count in options.threads:
                    _run_case(case, dtype, count, options, facts)
    return 0


def _run_case(case: Case, dtype: str, threads: int, options: argparse.Namespace, facts: dict) -> None:
    meta = [torch.empty(n, case.size, dtype=case.dtype, device=case.device) for n in (case.num_rows, 1)]
    plan = plan_linear_cross_entropy(meta[0], meta[1])
    load = f"{_load():.1f}"
    print(
        f"\n{dtype} N={case.num_rows} D={case.size} V={case.num_classes} {case.logits} logits, "
        f"{threads} threads, {clock_name(case.device, threads)}, machine load {load}, "
        f"ours: {plan.backend}/{plan.gemm}",
        flush=True,
    )
    rows = bench(case, threads=threads, repeats=options.repeats, wanted=options.providers)
    print_table(rows)
    common = {
        **facts, "threads": threads, "clock": clock_name(case.device, threads), "load": load, "dtype": dtype,
        "N": case.num_rows, "D": case.size, "V": case.num_classes, "logits": case.logits, "seed": case.seed,
    }  # fmt: skip
    append([{**common, **row} for row in rows], options.output, FIELDS)


def _load() -> float:
    """Runnable processes over the last minute: how much of the machine others had."""
    path = Path("/proc/loadavg")
    return float(path.read_text().split()[0]) if path.exists() else float("nan")
