"""The tables of docs/step.md, from benchmarks/results/step.csv."""

from collections.abc import Callable

from benchmarks.step.bench import OUTPUT
from benchmarks.step.figure import BARS, latest
from benchmarks.variance.report import table

Row = dict[str, str]
Case = dict[str, Row]
MIXES = {"gsm8k": "GSM8K's lengths", "ultrafeedback-like": "UltraFeedback-like"}
OURS = "+ small packs"


def number(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cases(weights: str = "full") -> dict[tuple[str, str, str], Case]:
    """(threads, size, mix) -> the newest rows by variant."""
    return {key[1:4]: rows for key, rows in latest(OUTPUT).items() if key[4] == weights}


def ratio(case: Case, name: str, other: str, column: str = "ms") -> str:
    """How many times as much the other takes."""
    return number(float(case[other][column]) / float(case[name][column]))


def technique(case: Case) -> str:
    """Time and memory of every variant of one case."""
    fewer = case["+ better masks"]["K"]
    lines = []
    for name, label in BARS.items():
        row = case[name]
        figures = [number(float(row[key])) for key in ("ms", "speedup", "speedup_hand")]
        others = [f"{float(row[key]):.0f}" for key in ("peak_MiB", "pct_of_floor", "mfu_pct")]
        lines.append([label.format(fewer=fewer).strip(), *figures, *others])
    header = ["", "ms", "x public code", "x hand assembly", "peak MiB", "% of floor", "MFU %"]
    return table(header, lines)


def _label(key: tuple[str, str, str], case: Case) -> list[str]:
    threads, size, mix = key
    public = case["public code"]
    return [
        f"{size}, {threads} thread{'s' * (threads != '1')}",
        MIXES[mix],
        f"{100 * float(public['fill']):.0f}",
    ]


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
        },
        found,
    )


def less_work(found: dict[tuple[str, str, str], Case]) -> str:
    """What is left out beyond that: the reference, samples, the lower half."""

    def over(name: str, other: str) -> Callable[[Case], str]:
        return lambda case: ratio(case, name, other)

    return _summary(
        {
            "reference known, x ours": over("+ reference known", OURS),
            "better masks, x public code": over("+ better masks", "public code"),
            "and reference known": over("+ better masks, reference known", "public code"),
            "upper half, shared trunk, x ours": over("+ better masks, upper half", "+ better masks"),
            "the same, x public code": over("+ better masks, upper half", "public code"),
        },
        found,
    )


def passes() -> str:
    """LoRA: two passes against one of both, milliseconds."""
    lines = []
    for (threads, size, mix), case in cases("LoRA").items():
        if "one batched pass" in case:
            two, one = float(case[OURS]["ms"]), float(case["one batched pass"]["ms"])
            lines.append(
                [f"{size}, {threads} thread{'s' * (threads != '1')}", MIXES[mix], number(two), number(one)]
            )
    return table(["parameters", "lengths", "two passes, ms", "one batched pass, ms"], lines)


def page_tables() -> dict[str, str]:
    """Name -> Markdown."""
    found = cases()
    tables = {"equal": equal_masks(found), "less": less_work(found), "passes": passes()}
    for (threads, size, mix), case in found.items():
        if threads == "1":
            tables[f"{size}-{mix}"] = technique(case)
    return tables
