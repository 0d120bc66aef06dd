"""python -m benchmarks model: expected times of linear_cross_entropy on a GPU, beside what was measured.

The model (benchmarks/gpu_model.py) counts waves of output blocks and bytes for the tiles in force. Each cell
is milliseconds of forward and backward, and the percentage of the bare product's rate. Below it, where a
committed file of `make gpu` has the same device, shape and form: the measured time, its percentage, and by
how much the measured time is longer than the predicted one. Nothing runs on a GPU.
"""

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_model import (
    DEVICES,
    EPILOGUE_PS,
    FP32_OUTPUT,
    LAUNCH_US,
    MODES,
    POWER_SLOWDOWN,
    Head,
    Model,
)
from benchmarks.record import RESULTS

GOALS = {"H100": 87.0, "H200": 90.0}
"""Percent of the bare product from GOAL_ROWS rows on that the design aims at, in the default form."""
GOAL_ROWS, GOAL_MODES = 4096, ("no gradient", "frozen head", "trained, tiles kept")
ROWS = (512, 1024, 2048, 4096, 4100, 8192, 16384)


@dataclass(frozen=True)
class Measured:
    """One row of a kernels.csv of `make gpu`."""

    ms: float
    percent: float
    git: str


Key = tuple[str, int, int, int, str, str]
"""Device, N, D, V, mode, form."""


def measurements(folder: Path) -> dict[Key, Measured]:
    """The latest measured row of every key under this folder: ours, random logits, host ahead."""
    found: dict[Key, tuple[str, Measured]] = {}
    for path in sorted(folder.glob("**/kernels.csv")):
        with path.open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                name = next((name for name in DEVICES if name in row.get("device", "")), None)
                wanted = row.get("provider") == "vrpo" and row.get("case") == "random logits"
                if name is None or not wanted or not row.get("pct_of_gemm"):
                    continue
                key = (name, *(int(row[axis]) for axis in "NDV"), row["mode"], row["gemm"])
                one = Measured(float(row["ms_p50"]), float(row["pct_of_gemm"]), row["git"])
                if key not in found or found[key][0] <= row["date"]:
                    found[key] = (row["date"], one)
    return {key: value for key, (_date, value) in found.items()}


def table(device: str, form: str, rows: list[int], hidden: int, classes: int, known: dict) -> list[str]:
    """The lines of one device and form."""
    width = 24
    lines = [f"  {'N':>6s} {'unit ms':>8s}  " + "".join(f"{mode:>{width}s}" for mode in MODES)]
    for num_rows in rows:
        model = Model(DEVICES[device], Head(num_rows, hidden, classes), form)
        cells = [_cell(f"{model.ms(mode):.2f} ({model.percent(mode):.0f} %)", width) for mode in MODES]
        lines.append(f"  {num_rows:6d} {model.unit_ms():8.3f}  {''.join(cells)}")
        beside = [known.get((device, num_rows, hidden, classes, mode, form)) for mode in MODES]
        if any(beside):
            cells = [_beside(one, model.ms(mode), width) for mode, one in zip(MODES, beside, strict=True)]
            lines.append(f"  {'':6s} {'measured':>8s}  {''.join(cells)}")
    return lines


def _cell(text: str, width: int) -> str:
    return f"{text:>{width}s}"


def _beside(one: Measured | None, predicted: float, width: int) -> str:
    if one is None:
        return _cell("-", width)
    return _cell(f"{one.ms:.2f} ({one.percent:.0f} %) {100 * (one.ms / predicted - 1):+.0f} %", width)


def below_goal(device: str, rows: list[int], hidden: int, classes: int) -> list[str]:
    """What the model puts below the goal of the design, a phrase each."""
    found = []
    for num_rows in (count for count in rows if count >= GOAL_ROWS):
        model = Model(DEVICES[device], Head(num_rows, hidden, classes))
        for mode in GOAL_MODES:
            if model.percent(mode) < GOALS[device]:
                found.append(f"{mode} at N = {num_rows}: {model.percent(mode):.1f} %")
    return found


def main(arguments: list[str]) -> int:
    """Prints the tables, the constants and how the goals fare."""
    options = _parse(arguments)
    known = measurements(options.measured)
    for name in options.devices:
        device = DEVICES[name]
        default = Model(device, Head(1, options.size, options.classes)).tiles.gemm
        print(f"{name}: {device.tflops:.0f} TFLOP/s, {device.bandwidth} TB/s, {device.num_sms} SMs")
        print(f"  {device.source}")
        for form in ("fused", "cublas"):
            mark = ", the default" if form == default else ""
            print(
                f"\n{name}, {form}{mark}, bf16, D = {options.size}, V = {options.classes}: ms (% of the unit)"
            )
            print("\n".join(table(name, form, options.rows, options.size, options.classes, known)))
        if name in GOALS:
            missed = below_goal(name, options.rows, options.size, options.classes)
            verdict = "reached" if not missed else "missed by " + "; ".join(missed)
            print(f"\n{name}, goal {GOALS[name]:.0f} % for 1, 2, 3 units from N = {GOAL_ROWS} on: {verdict}")
        print()
    print(
        f"constants: fp32 output {FP32_OUTPUT}, epilogue {EPILOGUE_PS} ps per logit and SM, "
        f"power {POWER_SLOWDOWN}, {LAUNCH_US} us a launch; sources in benchmarks/gpu_model.py"
    )
    revisions = sorted({one.git for one in known.values()})
    print(f"measured at revisions {', '.join(revisions) or '-'}, with the tiles of theirs")
    return 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--devices", nargs="+", choices=list(DEVICES), default=list(DEVICES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS), help="N")
    parser.add_argument("--size", type=int, default=4096, help="D")
    parser.add_argument("--classes", type=int, default=126464, help="V")
    parser.add_argument(
        "--measured", type=Path, default=RESULTS / "gpu", help="folder with kernels.csv files"
    )
    options = parser.parse_args(arguments)
    for name in ("rows", "size", "classes"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) < 1:
            parser.error(f"--{name} must be at least 1, got {values}")
    return options
