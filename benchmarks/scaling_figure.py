"""The figure of `python -m benchmarks scaling`: a column for each axis, measured dots over modelled lines."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from benchmarks.scaling_steps import AXES

TITLES = {
    "samples": "K, samples",
    "response": "tokens of a response",
    "pairs": "pairs of a step",
    "vocabulary": "vocabulary",
    "width": "hidden features",
    "depth": "layers",
    "processes": "processes (wall clock), GPUs",
}
MEASURED, MODEL, LORA, FULL = "tab:blue", "tab:gray", "tab:green", "tab:orange"
Rows = Sequence[dict[str, str]]


def draw(rows: Rows) -> Figure:
    """Log-log, from the rows of the file: time and memory measured, then both modelled for LLaDA-8B."""
    axes_there = [axis for axis in AXES if any(row["axis"] == axis for row in rows)]
    figure = Figure(figsize=(2.3 * len(axes_there) + 1, 10), layout="constrained")
    grid = figure.subplots(4, len(axes_there), sharey="row", sharex=False, squeeze=False)
    measured = [row for row in rows if row["kind"] == "measured"]
    modelled = [row for row in rows if row["kind"] == "modelled"]
    for column, axis in enumerate(axes_there):
        own = [row for row in measured if row["axis"] == axis]
        here = grid[:, column]
        _measured(here[0], own, "ms", "floor_ms")
        _measured(here[1], own, "peak_MiB", "model_MiB")
        for name, colour in (("LoRA", LORA), ("full", FULL)):
            points = [row for row in modelled if (row["axis"], row["setup"]) == (axis, name)]
            _range(here[2], points, colour, name)
            _line(here[3], points, "model_MiB", colour, name, scale=2**-10)
        here[0].set_title(TITLES[axis], fontsize=10)
        for row, axes in enumerate(here):
            pair = own if row < 2 else [point for point in modelled if point["axis"] == axis]
            _ticks(axes, sorted({int(point["value"]) for point in pair}))
    labels = ("measured: ms", "measured: MiB", "modelled: s a step", "modelled: GiB a GPU")
    for axes, label in zip(grid[:, 0], labels, strict=True):
        axes.set_ylabel(label)
    _legends(grid)
    figure.suptitle(_title(measured), fontsize=11)
    figure.get_layout_engine().set(w_pad=0.08)
    return figure


def _numbers(rows: Rows, key: str, scale: float = 1.0) -> tuple[list[int], list[float]]:
    """(values of the axis, figures) of the rows that have one."""
    there = [row for row in rows if row[key]]
    return [int(row["value"]) for row in there], [scale * float(row[key]) for row in there]


def _measured(axes: Axes, rows: Rows, key: str, model: str) -> None:
    axes.plot(*_numbers(rows, model), "-", color=MODEL, label="cost model", zorder=1)
    axes.plot(*_numbers(rows, key), "o", color=MEASURED, label="measured", zorder=2)


def _line(axes: Axes, rows: Rows, key: str, colour: str, label: str, scale: float) -> None:
    axes.plot(*_numbers(rows, key, scale), "-", color=colour, label=label)


def _range(axes: Axes, rows: Rows, colour: str, label: str) -> None:
    values, least = _numbers(rows, "model_ms_least", 1e-3)
    _, most = _numbers(rows, "model_ms_most", 1e-3)
    axes.fill_between(values, least, most, color=colour, alpha=0.35, label=label)
    axes.plot(values, most, "-", color=colour, linewidth=0.8)


def _ticks(axes: Axes, values: Sequence[int]) -> None:
    """Powers of two on both axes; every value of the axis is a tick, of many every other one."""
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set_xticks(values[:: 2 if len(values) > 5 else 1])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.tick_params(labelsize=8)
    axes.grid(True, alpha=0.3)


def _short(value: float) -> str:
    """0.25, 512, 66 k."""
    return f"{value / 1000:.0f} k" if value >= 10000 else f"{value:g}"


def _legends(grid) -> None:
    for row in (0, 2):
        grid[row, 0].legend(fontsize=8, loc="upper left")


def _title(measured: Rows) -> str:
    """Two lines that say what was measured and what was not."""
    lower = "modelled only: LLaDA-8B on H100s, 64 pairs a step, LoRA on one GPU, all weights on eight (FSDP2)"
    if not measured:
        return lower
    size = measured[0]
    model = "model: its arithmetic at the measured matmul rate, its memory"
    what = f"dots measured: {size['dtype']}, {size['device'].split(',')[0]}; lines the cost {model}"
    return f"Upper two rows, {what}\nLower two rows, {lower}"
