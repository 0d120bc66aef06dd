"""Tables and figures of all result files: ratios to `paper` at equal forwards, over models and pairs.

A ratio is the mean variance over a model's pairs over that of `paper` with independent sides on the same
pairs. The mean over models stands beside the worst and the best model; its 95 % interval resamples models
and pairs. Writes variance.csv (every design), prediction.csv (predicted beside measured) and a figure of each
beside the folder of the results, and prints every table in Markdown.
"""

import argparse
import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt

from benchmarks.record import RESULTS
from benchmarks.variance import training
from benchmarks.variance.measure import SFT_DESIGNS, TABLE2
from benchmarks.variance.run import FOLDER, key, read_rows
from vrpo.estimator.designs import DESIGNS

NUM_RESAMPLES = 2000
TASKS = {
    "arithmetic": "sums",
    "gsm8k": "GSM8K",
    "gsm8k-10m": "GSM8K, 11 M parameters",
    "gsm8k-long": "five GSM8K problems",
}

Rows = dict[tuple, dict]


@dataclass(frozen=True)
class Ratio:
    """mean over models of ratios, its 95 % interval, the ratio of every model."""

    mean: float
    low: float
    high: float
    models: dict[int, float]
    pairs: int

    @property
    def worst(self) -> float:
        return max(self.models.values())

    @property
    def best(self) -> float:
        return min(self.models.values())

    def __str__(self) -> str:
        return f"{two(self.mean)} [{two(self.low)}, {two(self.high)}]"


def two(value: float) -> str:
    """Two digits, no zero before the point."""
    return f"{value:.2f}".removeprefix("0") if value < 9.995 else f"{value:.0f}"


def load(folder: Path = FOLDER) -> dict[str, dict[int, Rows]]:
    """task -> model -> key -> row. Of rows with one key the last counts.

    Errors: ValueError for a figure that is not finite.
    """
    found: dict[str, dict[int, Rows]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in read_rows(file):
            for name, value in row.items():
                if isinstance(value, list | float) and not np.isfinite(value).all():
                    raise ValueError(f"{file}: {name!r} of {key(row)} must be finite, got {value}")
            found.setdefault(row["task"], {}).setdefault(row["model"], {})[key(row)] = row
    return found


def over_models(measured: Iterable[tuple[int, list[float], list[float]]]) -> Ratio | None:
    """Ratio of means per model, and their mean. measured: (model, variances, variances of the baseline).

    Pairs that only one of the two has are left out, and models whose baseline has no variance. Models of a
    task are measured on the same pairs, so a resample of pairs is the same for all of them.
    """
    models, resampled = {}, []
    for model, value, base in measured:
        both_B2 = np.array(list(zip(value, base, strict=False)))
        if not both_B2.mean(0)[1] > 0:
            continue
        models[model] = float(np.divide(*both_B2.mean(0)))
        pick = np.random.default_rng(0).integers(len(both_B2), size=(NUM_RESAMPLES, len(both_B2)))
        resampled.append(np.divide(*both_B2[pick].mean(1).T))
    if not models:
        return None
    chosen = np.random.default_rng(1).integers(len(models), size=(NUM_RESAMPLES, len(models)))
    means = np.array(resampled)[chosen, np.arange(NUM_RESAMPLES)[:, None]].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return Ratio(float(np.mean(list(models.values()))), float(low), float(high), models, len(both_B2))


QUANTITIES = ("score", "loss", "gradient", "absolute")
PAIR_MASKS = ("independent", "positions")


def variances(
    rows: Rows, quantity: str, drift: str, design: str, pair_masks: str, number: int
) -> list[float] | None:
    """Per pair (of absolute ELBOs: per response), or None where it was not measured."""
    if quantity == "gradient":
        row = rows.get(("gradient", drift, design, pair_masks, number))
        return row and row["gradient"]
    if quantity == "absolute":
        row = rows.get(("absolute", drift, design, None, number))
        return row and row["response"]
    row = rows.get(("score", drift, design, None, number))
    return row and row[quantity + ("" if pair_masks == "positions" else "_independent")]


def ratio(
    models: dict[int, Rows], quantity: str, drift: str, design: str, pair_masks: str, number: int
) -> Ratio | None:
    """Of a design to `paper` with independent sides at equal forwards; None where no model has both."""
    found = []
    for model, rows in models.items():
        value = variances(rows, quantity, drift, design, pair_masks, number)
        base = variances(rows, quantity, drift, "paper", "independent", number)
        if value and base:
            found.append((model, value, base))
    return over_models(found)


def summaries(found: dict[str, dict[int, Rows]]) -> Iterator[dict]:
    """Every ratio as a row of variance.csv."""
    for task, models in found.items():
        keys = {known for rows in models.values() for known in rows}
        drifts = sorted({drift for kind, drift, *_ in keys if kind != "predicted"})
        designs = sorted({known[2] for known in keys if known[0] in ("score", "gradient", "absolute")})
        for quantity, drift, number, design, pair_masks in product(
            QUANTITIES, drifts, (4, 8), designs, PAIR_MASKS
        ):
            if quantity == "absolute" and pair_masks == "positions":
                continue
            told = ratio(models, quantity, drift, design, pair_masks, number)
            if told:
                yield {
                    "task": task,
                    "drift": drift,
                    "quantity": quantity,
                    "design": design,
                    "pair_masks": pair_masks,
                    "num_samples": number,
                    "unbiased": is_unbiased(design),
                    "models": len(told.models),
                    "pairs": told.pairs,
                    **{name: f"{getattr(told, name):.4g}" for name in FIGURES},
                    "each": " ".join(f"{m}:{x:.4g}" for m, x in told.models.items()),
                }


def is_unbiased(design: str) -> bool:
    """Weightings that are in no design, balanced ones, are exact."""
    return design not in DESIGNS or DESIGNS[design].unbiased


FIGURES = ("mean", "low", "high", "worst", "best")


def predictions(found: dict[str, dict[int, Rows]]) -> Iterator[dict]:
    """Predicted beside measured ratios, per model. Nothing is fitted: every model is one left out."""
    for task, models in found.items():
        for model, rows in models.items():
            for (kind, drift, design, pair_masks, number), row in rows.items():
                if kind != "predicted" or drift == "reference":
                    continue
                base = rows.get(("predicted", drift, "paper", "independent", number))
                if base is None:
                    continue
                told = ratio({model: rows}, "score", drift, design, pair_masks, number)
                yield {
                    "task": task,
                    "model": model,
                    "drift": drift,
                    "design": design,
                    "pair_masks": pair_masks,
                    "num_samples": number,
                    "predicted": f"{row['total'] / base['total']:.4g}",
                    **{part: f"{row[part] / base['total']:.3g}" for part in PARTS},
                    "measured": told and f"{told.mean:.4g}",
                    "low": told and f"{told.low:.4g}",
                    "high": told and f"{told.high:.4g}",
                }


PARTS = ("levels", "tokens", "masks", "samples")


def write(rows: list[dict], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def table(header: list[str], lines: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *lines])


COLUMNS = [
    ("arithmetic", "late"),
    ("arithmetic", "early"),
    ("gsm8k", "late"),
    ("gsm8k", "early"),
    ("gsm8k-10m", "late"),
    ("gsm8k-10m", "early"),
    ("gsm8k-long", "late"),
    ("gsm8k-long", "early"),
]


def label(design: str, pair_masks: str) -> str:
    biased = "" if is_unbiased(design) else " (biased)"
    return f"`{design}`{biased}" + (", positions" if pair_masks == "positions" else "")


def cell(told: Ratio | None) -> str:
    if told is None:
        return "-"
    spread = f"; {two(told.best)} to {two(told.worst)}" if len(told.models) > 1 else ""
    return f"{told}{spread}"


def known_columns(
    found: dict, quantity: str, number: int, columns: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    """Those tasks and drifts of which there are figures."""
    return [
        (task, drift)
        for task, drift in columns
        if ratio(found.get(task, {}), quantity, drift, "paper", "independent", number)
    ]


def design_table(found: dict, quantity: str, number: int, columns: list[tuple[str, str]]) -> str:
    """Designs sorted by their mean over all models and drifts shown: mean [interval]; best to worst model.

    Without columns that nobody measured, and designs that the first column left lacks; empty if none is left.
    """
    columns = known_columns(found, quantity, number, columns)
    if not columns:
        return ""
    designs = {known[2] for models in found.values() for rows in models.values() for known in rows}
    lines = []
    for design in sorted(designs):
        for pair_masks in PAIR_MASKS[:1] if quantity == "absolute" else PAIR_MASKS:
            told = [
                ratio(found[task], quantity, drift, design, pair_masks, number) for task, drift in columns
            ]
            each = [x for one in told if one for x in one.models.values()]
            if told[0]:
                lines.append((float(np.mean(each)), max(each), design, pair_masks, told))
    lines.sort(key=lambda line: line[0])
    return table(
        ["design", "mean, worst", *(f"{TASKS[task]}, {drift}" for task, drift in columns)],
        (
            [label(design, pair_masks), f"{two(mean)}, {two(worst)}", *map(cell, told)]
            for mean, worst, design, pair_masks, told in lines
        ),
    )


def paper_table(found: dict) -> str:
    """How noisy the paper's score is by itself: standard deviation at K = 4, per task and drift."""
    lines = []
    for task, drift in COLUMNS:
        values = []
        for rows in found.get(task, {}).values():
            value = variances(rows, "score", drift, "paper", "independent", 4)
            if value:
                values.append(float(np.sqrt(np.mean(value))))
        if values:
            lines.append([f"{TASKS[task]}, {drift}", f"{np.mean(values):.2f}", str(len(values))])
    return table(["", "standard deviation of the score, `paper`, K = 4", "models"], lines)


def gradient_noise_table(found: dict) -> str:
    """How far the measured gradient variances of single models can be trusted, by two figures of `paper`."""
    lines = []
    for task, name in TASKS.items():
        pairs, shares, halves = 0, [], []
        for rows, drift in product(found.get(task, {}).values(), ("late", "early")):
            four, eight = (
                variances(rows, "gradient", drift, "paper", "independent", number) for number in (4, 8)
            )
            if four and sum(four) > 0:
                pairs = max(pairs, len(four))
                shares.append(max(four) / sum(four))
            if four and eight and sum(eight) > 0:
                halves.append(sum(four) / sum(eight) / 2)
        if shares and halves:
            cells = [
                f"{two(np.mean(x))}; {two(min(x))} to {two(max(x))} ({len(x)})" for x in (shares, halves)
            ]
            lines.append([name, str(pairs), *cells])
    header = ["", "pairs", "share of the noisiest pair, K = 4", "variance at K = 4 over twice that at K = 8"]
    return table(header, lines) if lines else ""


def complete(found: dict, task: str, names: list[tuple]) -> dict[int, list[dict]]:
    """model -> the rows of all these keys, of the models that have every one."""
    models = found.get(task, {})
    return {
        model: [rows[name] for name in names]
        for model, rows in models.items()
        if all(n in rows for n in names)
    }


def table2(found: dict) -> str:
    """The paper's Table 2 in kind: variances of score, loss and gradient, means over models."""
    names = [("table2", "late", design, None, scheme.num_samples) for design, scheme in TABLE2.items()]
    known = {task: complete(found, task, names) for task in TASKS}
    known = {task: models for task, models in known.items() if models}
    columns = list(product(("score", "loss", "gradient"), known))
    lines = []
    for place, design in enumerate(TABLE2):
        each = [
            np.mean([np.mean(rows[place][name]) for rows in known[task].values()]) for name, task in columns
        ]
        lines.append([design, *(f"{value:.3g}" for value in each)])
    return table(["n_t x n_y", *(f"{name}, {TASKS[task]}" for name, task in columns)], lines) if known else ""


def sft_table(found: dict) -> str:
    """Variance of the SFT gradient relative to `paper` at equal K, of (n) models that have all designs."""
    known = {}
    for task, stage, number in product(TASKS, ("reference", "sft-early"), (2, 4)):
        names = [("sft", stage, design, None, number) for design in SFT_DESIGNS]
        models = complete(found, task, names)
        if models:
            known[task, stage, number] = models
    columns = list(dict.fromkeys((task, stage) for task, stage, _ in known))
    lines = []
    for number, (place, design) in product((2, 4), enumerate(SFT_DESIGNS)):
        cells = []
        for task, stage in columns:
            models = known.get((task, stage, number), {})
            told = [(m, r[place]["gradient"], r[PAPER]["gradient"]) for m, r in models.items()]
            cells.append(f"{cell(over_models(told))} ({len(told)})" if told else "-")
        lines.append([f"`{design}`", str(number), *cells])
    return table(["design", "K", *(f"{TASKS[task]}, {stage}" for task, stage in columns)], lines)


PAPER = SFT_DESIGNS.index("paper")


def bound_table(found: dict) -> str:
    """Predicted ratios of the flat weights and of the best ones on the same masks, means over models."""
    lines = []
    for number in (4, 8):
        for name, kind, design in (
            ("`balanced`", "predicted", "balanced"),
            ("the best weights on its masks", "bound", "spaced"),
            ("`graded-balanced`", "predicted", "graded-balanced"),
            ("the best weights on its masks", "bound", "graded"),
        ):
            cells = []
            for task, drift in COLUMNS:
                each = []
                for rows in found.get(task, {}).values():
                    row = rows.get((kind, drift, design, "positions", number))
                    base = rows.get(("predicted", drift, "paper", "independent", number))
                    if row and base:
                        each.append(row["total"] / base["total"])
                cells.append(
                    f"{two(float(np.mean(each)))}; {two(min(each))} to {two(max(each))}" if each else "-"
                )
            lines.append([name, str(number), *cells])
    return table(["positions shared", "K", *(f"{TASKS[task]}, {drift}" for task, drift in COLUMNS)], lines)


def plot(found: dict, path: Path) -> None:
    """Every model a dot, mean over models and its interval a bar: score variance relative to `paper`."""
    shown = [
        ("paper", "positions"),
        ("inverse-root", "positions"),
        ("balanced", "independent"),
        ("balanced", "positions"),
        ("graded-balanced", "independent"),
        ("graded-balanced", "positions"),
        ("ratio", "positions"),
    ]
    columns = known_columns(found, "score", 4, COLUMNS)
    if not columns:
        return
    figure, axes = plt.subplots(
        2,
        len(columns),
        figsize=(2.3 * len(columns) + 2, 6.4),
        sharex=True,
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    for row, number in zip(axes, (4, 8), strict=True):
        for axis, (task, drift) in zip(row, columns, strict=True):
            for place, (design, pair_masks) in enumerate(reversed(shown)):
                told = ratio(found[task], "score", drift, design, pair_masks, number)
                if told is None:
                    continue
                color = "tab:red" if (design, pair_masks) == ("graded-balanced", "positions") else "tab:gray"
                axis.plot(
                    list(told.models.values()), [place] * len(told.models), "o", ms=4, color=color, alpha=0.6
                )
                axis.plot([told.low, told.high], [place] * 2, "-", color=color, lw=2)
                axis.plot([told.mean], [place], "|", color="black", ms=12)
            axis.axvline(1, color="black", lw=0.8)
            axis.axvline(0.5, color="black", lw=0.5, ls=":")
            axis.set_yticks(
                range(len(shown)),
                [f"{d}, {p}" if p == "positions" else d for d, p in reversed(shown)],
                fontsize=8,
            )
            axis.set(xlim=(0, 1.3))
            axis.set_title(f"{TASKS[task]}\n{drift}, K = {number}", fontsize=8)
            axis.grid(alpha=0.3, axis="x")
    figure.supxlabel("score variance / the paper's at equal forwards; a dot is a model", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_predictions(rows: list[dict], path: Path) -> None:
    """Measured against predicted ratio, one dot per model, drift, design and K."""
    figure, axis = plt.subplots(figsize=(4.6, 4.4), layout="constrained")
    for task, name in TASKS.items():
        known = [row for row in rows if row["task"] == task and row["measured"]]
        if not known:
            continue
        axis.plot(
            [float(row["predicted"]) for row in known],
            [float(row["measured"]) for row in known],
            "o",
            ms=3,
            alpha=0.6,
            label=name,
        )
    axis.plot([0, 1.2], [0, 1.2], color="black", lw=0.8)
    axis.set(xlabel="predicted from other masks", ylabel="measured", xlim=(0, 1.2), ylim=(0, 1.2))
    axis.legend(fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def say_predictions(rows: list[dict]) -> str:
    """Predicted ratio minus the measured one, by task: mean; size, mean and largest; how many within .1."""
    told: dict = {}
    for row in rows:
        if row["measured"] and row["design"] != "paper":
            name = (row["design"], row["pair_masks"], row["num_samples"], row["task"])
            told.setdefault(name, []).append(float(row["predicted"]) - float(row["measured"]))
    tasks = [task for task in TASKS if any(name[3] == task for name in told)]
    lines = []
    for design, pair_masks in SHOWN_PREDICTIONS:
        for number in (4, 8):
            cells = []
            for task in tasks:
                error = np.array(told.get((design, pair_masks, number, task), []))
                size = np.abs(error)
                cells.append(
                    f"{error.mean():+.2f}; {two(size.mean())}, {two(size.max())}; "
                    f"{np.count_nonzero(size < 0.1 + 1e-9)} of {len(error)}"
                    if len(error)
                    else "-"
                )
            if any(cell != "-" for cell in cells):
                lines.append([label(design, pair_masks), str(number), *cells])
    return table(["design", "K", *(TASKS[task] for task in tasks)], lines)


SHOWN_PREDICTIONS = [
    ("graded-balanced", "positions"),
    ("balanced", "positions"),
    ("graded-balanced", "independent"),
]


def parts_table(found: dict) -> str:
    """What the noise of `paper` is made of, how much of it two answers share, what designs leave of it."""
    lines = []
    for task, name in TASKS.items():
        for drift in ("small", "early", "late"):
            told: dict[str, list[float]] = {}
            for rows in found.get(task, {}).values():
                kinds = [("paper", "independent"), ("paper", "positions")]
                kinds += [("balanced", "positions"), ("graded-balanced", "positions")]
                known = [rows.get(("predicted", drift, *kind, 4)) for kind in kinds]
                if None in known:
                    continue
                base = known[0]
                shared, balanced, graded = (row["total"] / base["total"] for row in known[1:])
                for part in PARTS:
                    told.setdefault(part, []).append(base[part] / base["total"])
                told.setdefault("correlation", []).append(1 - shared)
                told.setdefault("balanced", []).append(balanced)
                told.setdefault("graded-balanced", []).append(graded)
            if told:
                cells = [
                    f"{np.mean(each):.2f} ({min(each):.2f} to {max(each):.2f})" for each in told.values()
                ]
                lines.append([f"{name}, {drift}", str(len(told["levels"])), *cells])
    header = ["", "models", *PARTS, "correlation", "`balanced`, positions", "`graded-balanced`, positions"]
    return table(header, lines) if lines else ""


def bias_table(found: dict) -> str:
    """What `ratio` is off by: its score minus that of exact weights on the same masks, nats x beta."""
    lines = []
    for number in (4, 8):
        cells = []
        for task, drift in COLUMNS:
            each = []
            for rows in found.get(task, {}).values():
                biased, exact = (
                    rows.get(("score", drift, name, None, number)) for name in ("ratio", "balanced")
                )
                if biased and exact:
                    each.append(float(np.mean(np.subtract(biased["mean"], exact["mean"]))))
            cells.append(f"{np.mean(each):+.3f}; {min(each):+.3f} to {max(each):+.3f}" if each else "-")
        lines.append([f"`ratio`, K = {number}", *cells])
    return table(["", *(f"{TASKS[task]}, {drift}" for task, drift in COLUMNS)], lines)


SUMMARY = [
    ("paper", "positions"),
    ("balanced", "positions"),
    ("graded-balanced", "independent"),
    ("graded-balanced", "positions"),
    ("ratio", "positions"),
]


def summary_table(found: dict) -> str:
    """Mean over all models and drifts, and the worst of them: of scores, losses and gradients."""
    columns = list(product(("score", "loss", "gradient"), (4, 8)))
    lines = []
    for design, pair_masks in SUMMARY:
        cells = []
        for quantity, number in columns:
            told = [
                ratio(found.get(task, {}), quantity, drift, design, pair_masks, number)
                for task, drift in COLUMNS
            ]
            each = [x for one in told if one for x in one.models.values()]
            cells.append(f"{two(float(np.mean(each)))}, {two(max(each))} ({len(each)})" if each else "-")
        lines.append([label(design, pair_masks), *cells])
    return table(["mean, worst (of)", *(f"{quantity}, K = {number}" for quantity, number in columns)], lines)


BESIDE = [
    ("score", 4, "graded-balanced", "balanced"),
    ("score", 8, "graded-balanced", "balanced"),
    ("gradient", 4, "graded-balanced", "balanced"),
    ("gradient", 8, "graded-balanced", "balanced"),
    ("score", 4, "inverse-root-balanced", "graded-balanced"),
]


def beside_table(found: dict) -> str:
    """On how many models and drifts one design has less variance than another, both with shared positions."""
    lines = []
    for quantity, number, design, other in BESIDE:
        counts = []
        for task in TASKS:
            pairs = []
            for drift in ("late", "early"):
                told = [
                    ratio(found.get(task, {}), quantity, drift, name, "positions", number)
                    for name in (design, other)
                ]
                one, two = ({} if known is None else known.models for known in told)
                pairs += [(one[model], two[model]) for model in one if model in two]
            counts.append((sum(first < second for first, second in pairs), len(pairs)))
        total = tuple(map(sum, zip(*counts, strict=True)))
        if total[1]:
            cells = [f"{below} of {known}" if known else "-" for below, known in (*counts, total)]
            lines.append([f"{quantity}, K = {number}: `{design}` below `{other}`", *cells])
    return table(["positions shared", *TASKS.values(), "all"], lines) if lines else ""


def tables(found: dict, predicted: list[dict], outcome: list[dict]) -> dict[str, str]:
    """Every table by the name that pages know it by; those of what was not measured are left out."""
    stages = [(task, stage) for stage in ("reference", "sft-early") for task in TASKS]
    made = {"summary": summary_table(found), "paper": paper_table(found), "bias": bias_table(found)}
    for quantity, number in product(QUANTITIES, (4, 8)):
        columns = stages if quantity == "absolute" else COLUMNS
        made[f"{quantity}-{number}"] = design_table(found, quantity, number, columns)
    made["beside"] = beside_table(found)
    made["gradient-noise"] = gradient_noise_table(found)
    if predicted:
        made["prediction"] = say_predictions(predicted)
        made["parts"] = parts_table(found)
    kinds = {known[0] for models in found.values() for rows in models.values() for known in rows}
    for kind, make_table in (("bound", bound_table), ("sft", sft_table), ("table2", table2)):
        if kind in kinds:
            made[kind] = make_table(found)
    if outcome:
        made["training"] = training.paired_table(outcome)
    return {name: told for name, told in made.items() if told}


def everything(results: Path) -> tuple[dict, list[dict], dict[str, str]]:
    """(what was measured, predicted beside measured, all tables)."""
    found = load(results)
    predicted = list(predictions(found))
    return found, predicted, tables(found, predicted, read_rows(results.parent / training.FILE.name))


def page_tables() -> dict[str, str]:
    """All tables of the committed files, for `python -m benchmarks pages`."""
    return everything(FOLDER)[2]


def report(args: argparse.Namespace) -> int:
    found, predicted, made = everything(args.results)
    out, measured = args.results.parent, list(summaries(found))
    if not measured:
        raise SystemExit(f"no variances in {args.results}: `python -m benchmarks variance run` measures them")
    write(measured, out / "variance.csv")
    plot(found, out / "variance.png")
    if predicted:
        write(predicted, out / "prediction.csv")
        plot_predictions(predicted, out / "prediction.png")
    for name, told in made.items():
        print(f"{name}\n\n{told}\n")
    return 0


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument("--results", type=Path, default=RESULTS / "variance", help="folder of result files")
    command.set_defaults(run=report)
