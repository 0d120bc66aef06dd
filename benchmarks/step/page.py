"""The tables of docs/step.md, from benchmarks/results/step.csv and generate.csv."""

import csv
from collections.abc import Callable

from benchmarks.bench_generate import OUTPUT as DECODING
from benchmarks.step.bench import OUTPUT
from benchmarks.step.figure import MIX_NAMES, Case, digits, labels_of, latest
from benchmarks.step.setup import SIZES
from benchmarks.variance.report import table

OURS = "+ small packs"


def cases(weights: str = "full") -> dict[tuple[str, str, str], Case]:
    """(threads, size, mix) -> the rows by variant of the last such case, the smaller models first."""
    found = {key[1:4]: rows for key, rows in latest(OUTPUT).items() if key[5] == weights}
    sizes, mixes = list(SIZES), list(MIX_NAMES)
    order = sorted(found, key=lambda key: (sizes.index(key[1]), mixes.index(key[2]), int(key[0])))
    return {key: found[key] for key in order}


def ratio(case: Case, name: str, other: str, column: str = "ms") -> str:
    """How many times as much the other takes."""
    return digits(float(case[other][column]) / float(case[name][column]))


def technique(case: Case) -> str:
    """Time and memory of every variant of one case."""
    lines = []
    for name, label in labels_of(case).items():
        row = case[name]
        figures = [digits(float(row[key])) for key in ("ms", "speedup", "speedup_hand")]
        others = [f"{float(row[key]):.0f}" for key in ("peak_MiB", "pct_of_floor")]
        lines.append([label.strip(), *figures, *others])
    header = ["", "ms", "x public code", "x hand assembly", "peak MiB", "% of floor"]
    return table(header, lines)


def _label(key: tuple[str, str, str], case: Case) -> list[str]:
    threads, size, mix = key
    fill = 100 * float(case["public code"]["fill"])
    return [f"{size}, {threads} thread{'s' * (threads != '1')}", MIX_NAMES[mix], f"{fill:.0f}"]


def _summary(columns: dict[str, Callable[[Case], str]], found: dict[tuple[str, str, str], Case]) -> str:
    lines = [[*_label(key, case), *(make(case) for make in columns.values())] for key, case in found.items()]
    return table(["parameters", "lengths", "fill %", *columns], lines)


def equal_masks(found: dict[tuple[str, str, str], Case]) -> str:
    """Same masks, same gradient: time over that of the others, memory under theirs, share of the floor."""
    return _summary(
        {
            "x public code": lambda case: ratio(case, OURS, "public code"),
            "x hand assembly": lambda case: ratio(case, OURS, "hand assembly"),
            "x the same, pair by pair": lambda case: ratio(case, OURS, "hand assembly, pair by pair"),
            "% of floor": lambda case: f"{float(case[OURS]['pct_of_floor']):.0f}",
            "MiB": lambda case: f"{float(case[OURS]['peak_MiB']):.0f}",
            "hand MiB": lambda case: f"{float(case['hand assembly']['peak_MiB']):.0f}",
            "replay MiB": lambda case: f"{float(case['replay']['peak_MiB']):.0f}",
            "rounds": lambda case: case[OURS]["rounds"],
        },
        found,
    )


def less_work(found: dict[tuple[str, str, str], Case]) -> str:
    """What is left out beyond that: the reference, samples, the lower half."""

    def over(name: str, other: str) -> Callable[[Case], str]:
        return lambda case: ratio(case, name, other)

    return _summary(
        {
            "known reference, over ours": over("+ reference known", OURS),
            "K = 4, over public code": over("+ better masks", "public code"),
            "and known reference": over("+ better masks, reference known", "public code"),
            "upper half, shared trunk, over K = 4": over("+ better masks, upper half", "+ better masks"),
            "over public code that trains all": over("+ better masks, upper half", "public code"),
            "that trains the upper half at K = 4": over(
                "+ better masks, upper half", "public code, our masks, upper half"
            ),
        },
        found,
    )


def passes() -> str:
    """LoRA: two passes against one of both, milliseconds, and the share of the floor of the two."""
    lines = []
    for key, case in cases("LoRA").items():
        if "one batched pass" in case:
            times = [digits(float(case[name]["ms"])) for name in (OURS, "one batched pass")]
            lines.append([*_label(key, case)[:2], *times, f"{float(case[OURS]['pct_of_floor']):.0f}"])
    return table(["parameters", "lengths", "two passes, ms", "one pass, ms", "two passes, % of floor"], lines)


def decoding(rows: list[dict[str, str]]) -> str:
    """Tokens per second and memory of each way, of the newest run of each case."""
    newest = {(row["case"], row["way"]): row for row in rows}
    ways = list(dict.fromkeys(way for _, way in newest))
    lines = []
    for case in dict.fromkeys(case for case, _ in newest):
        own = [newest[case, way] for way in ways]
        cells = [f"{float(row['tokens_per_s']):.0f}, {float(row['peak_MiB']):.0f} MiB" for row in own]
        lines.append([case, own[0]["prompts"], *cells, f"{float(own[0]['pct_of_gemm']):.0f}"])
    header = ["parameters", "prompts", *(f"{way}, tokens/s" for way in ways), f"{ways[0]}, % of products"]
    return table(header, lines)


def page_tables() -> dict[str, str]:
    """Name -> Markdown."""
    found = cases()
    tables = {"equal": equal_masks(found), "less": less_work(found), "passes": passes()}
    with DECODING.open(newline="", encoding="utf-8") as stream:
        tables["generate"] = decoding(list(csv.DictReader(stream)))
    for (threads, size, mix), case in found.items():
        if threads == "1":
            tables[f"{size}-{mix}"] = technique(case)
    return tables
