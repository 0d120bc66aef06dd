"""The waterfall: time and peak memory of a step, from public code to everything, a bar for each technique."""

import csv
from pathlib import Path

# Rows of the ladder in its order, with the label of the figure. What serves as a baseline alone is left out.
BARS = {
    "public code": "public code",
    "hand assembly": "hand assembly, one batch",
    "hand assembly, pair by pair": "hand assembly, pair by pair",
    "hand assembly, response by response": "hand assembly, response by response",
    "packed": "packed, no padding",
    "+ masked rows": "+ head at masked rows only",
    "+ fused head": "+ fused head",
    "+ last layer at masked rows": "+ last layer at masked rows only",
    "+ small packs": "+ packs of {tokens} tokens",
    "replay": "  the same with replay",
    "+ reference known": "+ reference precomputed",
    "+ better masks": "+ K = {fewer} of better masks",
    "+ better masks, reference known": "   and reference precomputed",
    "+ better masks, upper half": "   and upper half trained, trunk shared",
}
MIX_NAMES = {"gsm8k": "GSM8K's lengths", "ultrafeedback-like": "UltraFeedback-like"}

Key = tuple[str, str, str, str, str, str]
"""Device, threads, size, mix, pairs and weights of a case."""
Case = dict[str, dict[str, str]]
"""Variant -> row."""


def latest(path: Path) -> dict[Key, Case]:
    """The newest of the fullest runs of each case; a run begins with public code.

    Errors: ValueError if there is none.
    """
    with path.open(newline="", encoding="utf-8") as stream:
        rows = [row for row in csv.DictReader(stream) if row["ms"]]
    if not rows:
        raise ValueError(f"{path} has no measured rows")
    runs: dict[Key, list[Case]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("device", "threads", "size", "mix", "pairs", "weights"))
        if row["variant"] == "public code":
            runs.setdefault(key, []).append({})
        runs[key][-1][row["variant"]] = row
    return {key: max(reversed(own), key=len) for key, own in runs.items()}


def digits(value: float) -> str:
    """Three digits, without an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def colour(name: str) -> str:
    """Of a bar: public code grey, assemblies brown, ours blue."""
    return "#9e9e9e" if name == "public code" else "#c49a6c" if name.startswith("hand") else "#2f6f9f"


def labels_of(case: Case) -> dict[str, str]:
    """Variant -> label, of the bars that a case has."""
    fewer = case.get("+ better masks", {}).get("K", "")
    tokens = case.get("+ small packs", {}).get("max_tokens", "")
    return {name: label.format(fewer=fewer, tokens=tokens) for name, label in BARS.items() if name in case}


def draw(path: Path, threads: str = "1", size: str = "9M"):
    """Time and memory of each technique, for both length mixes, as shares of public code's."""
    from matplotlib.figure import Figure

    full = (threads, size, "full")
    cases = {key[3]: rows for key, rows in latest(path).items() if (*key[1:3], key[5]) == full}
    if not cases:
        raise ValueError(f"{path} has no rows of size {size!r} at {threads} threads")
    figure = Figure(figsize=(11, 3.9 * len(cases)), layout="constrained")
    axes = figure.subplots(len(cases), 2, squeeze=False, sharey="row")
    for pair, (mix, rows) in zip(axes, cases.items(), strict=True):
        names, labels = zip(*labels_of(rows).items(), strict=True)
        first = rows["public code"]
        for axis, (column, unit, per) in zip(
            pair, (("ms", "s", 1000.0), ("peak_MiB", "MiB", 1.0)), strict=True
        ):
            values = [float(rows[name][column]) / per for name in names]
            axis.barh(labels, values, color=[colour(name) for name in names])
            for place, (name, value) in enumerate(zip(names, values, strict=True)):
                times = float(first[column]) / per / value
                text = f" {digits(value)} {unit}" + ("" if name == "public code" else f" ({times:.1f}x)")
                axis.text(value, place, f" {text}", va="center", fontsize=8)
            axis.set_xlim(0, 1.28 * max(values))
            axis.spines[["top", "right"]].set_visible(False)
        pair[0].invert_yaxis()
        tokens = f"{first['pairs']} pairs, {100 * float(first['fill']):.0f} % of one padded batch are tokens"
        pair[0].set_title(f"time of a step: {MIX_NAMES[mix]}\n{tokens}", fontsize=10, loc="left")
        pair[1].set_title("peak memory above the weights", fontsize=10, loc="left")
    row = next(iter(next(iter(cases.values())).values()))
    figure.suptitle(
        f"One VRPO step, {int(row['parameters']) / 1e6:.0f} M parameters, {row['dtype']}, {threads} thread; "
        f"x: times less than public code\nDown to 'reference precomputed': K = {row['K']}, equal gradients; "
        "below: fewer samples of other masks; last bar: half of the layers train",
        fontsize=11,
    )
    return figure
