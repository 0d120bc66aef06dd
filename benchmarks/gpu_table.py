"""python -m benchmarks gpu-table DIR [DIR ...]: Markdown tables of the CSV files that `make gpu` wrote.

kernels: N x mode in the default GEMM form (the one measured first), the other form beside it. tiles: the
fastest shapes of each size and mode. memory: masks and cross_entropy against a device copy. step: K rows and
the variants. rivals: every package on one contract, a table for each N. Each revision has tables of its own,
in the order of the folders. A file that is not there has no table; "-" is what was not measured.
"""

import argparse
import csv
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

Rows = list[dict[str, str]]

MODES = ("no gradient", "frozen head", "trained, tiles kept", "trained, recomputed", "replay, both passes")
COLUMNS = ("no gradient", "frozen head", "trained head")
TEXT = ("", "N, D x V", "mode", "size", "verdict", "note", "form", "shape")
SHAPE = ("first_cols", "group_rows", "num_warps", "num_stages")
BEST = 5  # tile shapes shown per size and mode
LEAST_ROUNDS = 3  # of a comparison that counts
NO_TIME = "not run: no time left"  # bench_linear_cross_entropy.NO_TIME, whose module needs torch
POLICY = "outside the tolerance policy"


def read(path: Path) -> Rows:
    """The whole rows of a CSV file, none if it does not exist; a run that was killed can cut the last one."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return [row for row in csv.DictReader(stream) if None not in row.values()]


def caption(title: str, rows: Rows) -> str:
    """A line that says what was measured, and on what, when and from which revision."""
    first = rows[0]
    dates = sorted({row["date"][:10] for row in rows})
    facts = [first["device"], " to ".join(dict.fromkeys((dates[0], dates[-1])))]
    for name in ("git", "torch", "triton", "transformers"):
        values = sorted({row[name] for row in rows if row.get(name)})
        facts += [f"{name} {', '.join(values)}"] if values else []
    return f"{title} ({', '.join(facts)}):"


def grid(head: list[str], lines: list[list[str]]) -> list[str]:
    """A Markdown table with the columns of TEXT to the left and figures to the right."""
    marks = ["---" if title in TEXT else "---:" for title in head]
    return ["| " + " | ".join(line) + " |" for line in (head, marks, *lines)]


def number(text: str | None, digits: int) -> str:
    """A figure with so many decimals, "-" if there is none."""
    return f"{float(text):.{digits}f}" if text else "-"


def _spread(row: dict[str, str]) -> str:
    if not row.get("pct_of_gemm"):
        return "-"
    low, high = row.get("pct_p20"), row.get("pct_p80")
    return f"{float(row['pct_of_gemm']):.0f}" + (f" ({float(low):.0f}..{float(high):.0f})" if low else "")


def _worst(row: dict[str, str]) -> str:
    verdict = row["verdict"] if row["verdict"] != "ok" else ""
    return " ".join(filter(None, (f"{float(row['nll_err']):.1e}" if row["nll_err"] else "-", verdict)))


def _problem(row: dict[str, str]) -> tuple[str, ...]:
    return tuple(row[name] for name in ("N", "D", "V", "case"))


def _title(problem: tuple[str, ...]) -> str:
    rows, hidden, classes, case = problem
    logits, _, head = case.partition(", ")
    peaked = ", peaked" if logits.startswith("peaked") else ""
    return f"{rows}, {hidden} x {classes}{peaked}" + (f", {head}" if head else "")


def kernels(rows: Rows) -> Iterator[str]:
    """N x mode of both forms, then the rows that include the host's launches."""
    ours = [row for row in rows if row["provider"] == "vrpo" and row["ms_p50"]]
    if not ours:
        return
    default = ours[0]["gemm"]
    found = {(_problem(row), row["mode"], row["gemm"]): row for row in ours}
    yield caption(f"`linear_cross_entropy`, {ours[0]['dtype']}, form `{default}`", rows)
    yield ""
    head = ["N, D x V", "mode", "ms", "% of bare GEMM", "peak MiB", "largest nll error"]
    others = sorted({row["gemm"] for row in ours} - {default})
    head += [f"{form}: {what}" for form in others for what in ("ms", "%", "peak MiB")]
    lines = []
    for problem in dict.fromkeys(_problem(row) for row in ours):
        for mode in MODES:
            row = found.get((problem, mode, default))
            if row is None:
                continue
            line = [_title(problem), mode, number(row["ms_p50"], 2), _spread(row)]
            line += [number(row["peak_MiB"], 0), _worst(row)]
            for form in others:
                other = found.get((problem, mode, form), {})
                line += [number(other.get("ms_p50"), 2), _spread(other), number(other.get("peak_MiB"), 0)]
            lines.append(line)
    yield from grid(head, lines)
    yield from _host(rows)
    yield from _sustained(rows)


def _host(rows: Rows) -> Iterator[str]:
    host = [row for row in rows if row["provider"] == "vrpo, host included" and row["ms_p50"]]
    if not host:
        return
    yield ""
    yield caption("From an idle device, launches by the host included", host)
    yield ""
    lines = [
        [
            _title(_problem(row)),
            row["mode"],
            number(row["ms_p50"], 2),
            _spread(row),
            number(row["host_ms"], 2),
        ]
        for row in host
    ]
    yield from grid(["N, D x V", "mode", "ms", "% of bare GEMM", "of it host ms"], lines)


def _sustained(rows: Rows) -> Iterator[str]:
    """Time and energy at the power limit, and what the bare GEMM alone would take of them."""
    found = [row for row in rows if row["provider"].endswith(", sustained") and row["ms_p50"]]
    unit = {_problem(row): row for row in found if not row["mode"]}
    lines = []
    for row in found:
        one, units = unit.get(_problem(row)), float(row["units"])
        if one is None:
            continue
        line = [_title(_problem(row)), row["mode"] or "bare GEMM", number(row["ms_p50"], 2)]
        line += [number(row["joule"], 2), row["watt"] or "-", row["sm_mhz"] or "-"]
        for name in ("ms_p50", "joule"):  # without NVML there is no energy
            known = one[name] and row[name]
            line.append(f"{100 * units * float(one[name]) / float(row[name]):.0f}" if known else "-")
        lines.append(line)
    if lines:
        head = ["N, D x V", "mode", "ms", "J", "W", "MHz", "% of bare GEMM", "% of it, by energy"]
        yield from ("", caption("Repeated without pause, at the power limit", found), "", *grid(head, lines))


def _verdict(row: dict[str, str]) -> str:
    note = row["note"].split(":")[0]
    if not note:
        return "within the policy"
    ratio = f" by {float(row['policy_ratio']):.0f}x" if row["note"].startswith(POLICY) else ""
    return f"{note}{ratio}"


def rivals(rows: Rows) -> Iterator[str]:
    """A table for each head and N; a provider that could not run shows why, one that was not reached is left
    out, and so is a table of fewer rounds than LEAST_ROUNDS: the end of a stage that ran out of time.
    """
    rows = [row for row in rows if not row["ms_p50"] or int(row["reps"] or LEAST_ROUNDS) >= LEAST_ROUNDS]
    for index, case in enumerate(dict.fromkeys(_head_and_rows(row) for row in rows if row["ms_p50"])):
        yield from [""] if index else []
        yield from _rivals_of([row for row in rows if _head_and_rows(row) == case and row["note"] != NO_TIME])


def _head_and_rows(row: dict[str, str]) -> tuple[str, str]:
    """Files from before there were heads have plain ones."""
    return row.get("head") or "plain", row["N"]


def _rivals_of(rows: Rows) -> Iterator[str]:
    size = f"N = {rows[0]['N']}, D = {rows[0]['D']}, V = {rows[0]['V']}, {rows[0]['dtype']}"
    head = _head_and_rows(rows[0])[0]
    size += "" if head == "plain" else f", head with {head}"
    yield caption(f"ms and units of the bare GEMM of the same run, {size}", rows)
    yield ""
    titles = ["", *(f"{column}: {what}" for column in COLUMNS for what in ("ms (units)", "peak MiB"))]
    lines = []
    for name in dict.fromkeys(row["provider"] for row in rows):
        own = [row for row in rows if row["provider"] == name]
        if name.startswith("bare "):
            continue
        # The last row of a column is the run that counts, if a part was measured twice.
        by_column = {row["column"]: row for row in own if row["ms_p50"]}
        line = [name]
        for column in COLUMNS:
            row = by_column.get(column, {})
            units = f" ({row['units_p50']})" if row else ""
            line += [number(row.get("ms_p50"), 2) + units, number(row.get("peak_MiB"), 0)]
        last = own[-1]
        lines.append([*line, last["nll_error"] or "-", _verdict(last)])
    yield from grid([*titles, "nll error", "verdict"], lines)


def tiles(rows: Rows) -> Iterator[str]:
    """The fastest correct shapes of each size and mode."""
    good = [row for row in rows if row["ms_p50"] and row["cols"] and row["verdict"] != "RED"]
    if not good:
        return

    def key(row: dict[str, str]) -> tuple[int, str]:
        return int(row["N"]), row["mode"]

    yield caption(f"Tile shapes of `linear_cross_entropy`, the {BEST} fastest of each size and mode", rows)
    yield ""
    lines = []
    for _, group in groupby(sorted(good, key=key), key=key):
        for row in sorted(group, key=lambda row: float(row["ms_p50"]))[:BEST]:
            line = [_title(_problem(row)), row["mode"], row["provider"].removeprefix("vrpo "), _shape(row)]
            lines.append([*line, number(row["ms_p50"], 2), _spread(row), number(row["peak_MiB"], 0)])
    yield from grid(["N, D x V", "mode", "form", "shape", "ms", "% of bare GEMM", "peak MiB"], lines)


def _shape(row: dict[str, str]) -> str:
    """`rows x cols` of the tiles, then the block of the fused product, warps and stages."""
    shape = [f"{row['rows']} x {row['cols']}"]
    if row.get("block_rows"):
        shape.append(f"blocks {row['block_rows']} x {row['block_cols']} x {row['block_hidden']}")
    shape += [f"`{name}` {row[name]}" for name in SHAPE if row.get(name)]
    # Of earlier revisions: one unless it says otherwise.
    more = ("programs_per_sm", "streams")
    return ", ".join(
        shape + [f"`{name}` {row[name]}" for name in more if row.get(name, "1") not in ("", "1")]
    )


def step(rows: Rows) -> Iterator[str]:
    """Steps by K, then the variants against the LoRA step with as many tokens."""
    timed = [row for row in rows if row["tokens_per_s"]]
    if not timed:
        return
    plain = {(row["case"], row["K"]): row for row in timed if row["case"] in ("LoRA", "full")}
    yield caption("One VRPO step of one pair, LLaDA-8B's shape, random weights", rows)
    yield ""
    head = ["", "K", "ms", "tokens/s", "TFLOP/s", "% of bare GEMM", "peak GiB"]
    order = sorted(plain.items(), key=lambda item: (item[0][0] != "LoRA", int(item[0][1])))
    yield from grid(head, [_step_line(row) for _, row in order])
    variants = [row for row in timed if row["case"] not in ("LoRA", "full", "LoRA, first step")]
    if not variants:
        return
    yield ""
    yield "Variants, and their time over that of LoRA with as many tokens:"
    yield ""
    lines, base = [], {row["T"]: float(row["ms"]) for (case, _), row in plain.items() if case == "LoRA"}
    for row in variants:
        ratio = f"{float(row['ms']) / base[row['T']]:.3f}" if row["T"] in base else "-"
        lines.append([*_step_line(row), ratio, row["note"]])
    yield from grid([*head, "over LoRA", "note"], lines)


def _step_line(row: dict[str, str]) -> list[str]:
    figures = [number(row[name], 0) for name in ("ms", "tokens_per_s", "tflops")]
    return [row["case"], row["K"], *figures, number(row["pct_of_gemm"], 1), number(row["peak_GiB"], 1)]


def memory(rows: Rows) -> Iterator[str]:
    """Every kernel that moves bytes."""
    timed = [row for row in rows if row["ms_p50"]]
    if not timed:
        return
    yield caption("Kernels that move bytes", rows)
    yield ""
    lines = []
    for row in timed:
        size = row["case"] or (f"N = {row['N']}, V = {row['V']}" if row["V"] else f"{row['N']} elements")
        figures = [number(row["ms_p50"], 3), number(row["GB_per_s"], 0), number(row["pct_of_copy"], 1)]
        lines.append([f"`{row['op']}`, {row['mode']}", size, *figures, row["Gpositions_per_s"] or "-"])
    yield from grid(["", "size", "ms", "GB/s", "% of a copy", "Gpositions/s"], lines)


TABLES = {"kernels": kernels, "tiles": tiles, "memory": memory, "step": step, "rivals": rivals}


def _runs(rows: Rows) -> list[Rows]:
    """The rows of each revision on each device with each torch: only those stand in one table."""
    found: dict[tuple[str | None, ...], Rows] = {}
    for row in rows:
        found.setdefault(tuple(row.get(name) for name in ("git", "device", "torch")), []).append(row)
    return list(found.values())


def tables(*folders: Path) -> Iterator[str]:
    """The lines of all tables of the folders, a title above those of each file."""
    for name, render in TABLES.items():
        rendered = [
            lines
            for folder in folders
            for rows in _runs(read(folder / f"{name}.csv"))
            if (lines := list(render(rows)))
        ]
        if rendered:
            yield from (f"### {name}", "")
        for lines in rendered:
            yield from (*lines, "")


def main(arguments: list[str]) -> int:
    """Prints the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu-table", description=__doc__.split("\n")[0]
    )
    files = ", ".join(f"{name}.csv" for name in TABLES)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help=f"folder with some of {files}")
    folders = parser.parse_args(arguments).folders
    lines = list(tables(*folders))
    if not lines:
        parser.error(f"no rows in {', '.join(map(str, folders))}: there is none of {files}")
    print(*lines, sep="\n")
    return 0
