"""python -m benchmarks liger-view IN.csv OUT.csv: figures of `benchmarks kernels` for Liger's plots.

Writes the columns of Liger-Kernel's benchmark/data/all_benchmark_data.csv, which benchmarks_visualizer.py
there reads: one row per metric, x = N. "speed" (ms) and "memory" (MB, which are MiB there too) are its own
metrics; "units" are multiples of the bare product; every other figure is a metric whose three values are
equal. What describes a case (D, V, dtype, threads, revision, ...) is the JSON of extra_benchmark_config_str,
the same for all providers of a case, because a plot shows one such string; a note is a row without values.
liger_version is empty: our rows do not know it. Nothing is lost: --back makes the first file again, byte for
byte.

    python benchmarks_visualizer.py --data-file OUT.csv --kernel-name linear_cross_entropy --metric-name speed
"""

import argparse
import csv
import json
from collections.abc import Iterable
from pathlib import Path

from benchmarks.bench_linear_cross_entropy import FIELDS as OURS

FIELDS = (
    *("kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit"),
    *("x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80"),
    *("extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version"),
)
SPREAD = {
    "speed": ("ms", ("ms_p50", "ms_p20", "ms_p80")),
    "units": ("bare products", ("units_p50", "units_p20", "units_p80")),
}
"""Metric -> unit, our columns for y_value_50, _20, _80."""
SINGLE = {
    "memory": ("MB", "peak_MiB"),
    **{
        name: (unit, name)
        for name, unit in (
            ("ms_min", "ms"),
            ("units_min", "bare products"),
            ("unit_ms_min", "ms"),
            ("reps", "rounds"),
            ("load", "processes"),
            ("nll_error", "nats"),
            ("policy_ratio", "of what is allowed"),
        )
    },
}
"""Metric -> unit, our column."""
DIRECT = {"provider": "kernel_provider", "N": "x_value", "device": "gpu_name", "date": "timestamp"}
"""Our column -> Liger's."""
MODES = {"no gradient": "no-grad-forward", "unit": "no-grad-forward", "frozen head": "full"}
"""Our column "column" -> Liger's mode; "full" for the rest. The JSON keeps ours."""
_METRIC_COLUMNS = {name for _, names in SPREAD.values() for name in names} | {
    name for _, name in SINGLE.values()
}
_CASE = tuple(name for name in OURS if name not in (*_METRIC_COLUMNS, *DIRECT, "note"))


def to_liger(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of ours, each as several of Liger's; the first of them is its "speed"."""
    found = []
    for row in rows:
        case = {name: row[name] for name in _CASE if name in row}
        common = {
            "kernel_name": "linear_cross_entropy",
            "kernel_operation_mode": MODES.get(row["column"], "full"),
            "x_name": "N",
            "x_label": "rows",
            "extra_benchmark_config_str": json.dumps(case),
            **{theirs: row[ours] for ours, theirs in DIRECT.items()},
        }
        for metric, (unit, names) in SPREAD.items():
            if metric == "speed" or any(row[name] for name in names):
                found.append(_metric(common, metric, unit, [row[name] for name in names]))
        for metric, (unit, name) in SINGLE.items():
            if row[name]:
                found.append(_metric(common, metric, unit, [row[name]] * 3))
        if row["note"]:
            noted = {"extra_benchmark_config_str": json.dumps({**case, "note": row["note"]})}
            found.append(_metric({**common, **noted}, "note", "", [""] * 3))
    return found


def _metric(common: dict[str, str], metric: str, unit: str, values: list[str]) -> dict[str, str]:
    of_y = dict(zip(("y_value_50", "y_value_20", "y_value_80"), values, strict=True))
    return {**common, "metric_name": metric, "metric_unit": unit, **of_y}


def from_liger(rows: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """The rows that `to_liger` was given.

    Errors: ValueError for rows that it did not make.
    """
    found: list[dict[str, str]] = []
    for row in rows:
        metric = row["metric_name"]
        case = json.loads(row["extra_benchmark_config_str"])
        if metric == "speed":
            found.append({**dict.fromkeys((*_METRIC_COLUMNS, "note"), ""), **case})
            found[-1].update({ours: row[theirs] for ours, theirs in DIRECT.items()})
        if not found or row["kernel_name"] != "linear_cross_entropy":
            raise ValueError(f"not made by liger-view: {row['kernel_name']}, metric {metric}")
        if metric in SPREAD:
            values = (row[f"y_value_{share}"] for share in (50, 20, 80))
            found[-1].update(zip(SPREAD[metric][1], values, strict=True))
        elif metric in SINGLE:
            found[-1][SINGLE[metric][1]] = row["y_value_50"]
        elif metric == "note":
            found[-1]["note"] = case["note"]
        else:
            raise ValueError(f"metric_name must be one of ours, got {metric!r}")
    return found


def _read(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with path.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        return list(reader.fieldnames or ()), list(reader)


def convert(source: Path, target: Path, *, back: bool = False) -> int:
    """Writes `target`; returns its number of rows.

    Errors: ValueError for a file with other columns.
    """
    header, rows = _read(source)
    expected = FIELDS if back else OURS
    known = [name for name in expected if name in header]
    required = set(expected) - ({"head"} if not back else set())
    if header != known or not required <= set(header):
        raise ValueError(f"{source} must have the columns {list(expected)}, got {header}")
    made = from_liger(rows) if back else to_liger(rows)
    fields = [name for name in OURS if not made or name in made[0]] if back else FIELDS
    with target.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fields)
        writer.writeheader()
        writer.writerows(made)
    return len(made)


def main(arguments: list[str]) -> int:
    """0, or 1 with one line on why a file cannot be converted."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks liger-view",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="IN.csv")
    parser.add_argument("target", type=Path, metavar="OUT.csv")
    parser.add_argument("--back", action="store_true", help="from Liger's columns to ours")
    options = parser.parse_args(arguments)
    try:
        count = convert(options.source, options.target, back=options.back)
    except (OSError, ValueError) as error:
        print(error)
        return 1
    print(f"{options.target}: {count} rows")
    return 0
