"""report.md and report.png beside a trained model: the curves that a person looks at after a run.

Made from the Trainer's log_history alone. The figure needs matplotlib (the extra `plot`).
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging

from vrpo.data.output import write

logger = logging.get_logger(__name__)

REPORT_FILE, FIGURE_FILE = "report.md", "report.png"
_COLUMNS = 3

Points = list[tuple[float, float]]
"""(step, value)"""


@dataclass(frozen=True)
class Panel:
    """title and what stands beside the axis; label -> key of the log; shown if one of the keys was logged."""

    title: str
    unit: str
    curves: Mapping[str, str]


DISPLACEMENT = "displacement/{}"
"""logps minus the reference's, computed here: key of the chosen or the rejected response, nats."""

PANELS = (
    Panel("Loss", "nats", {"training": "loss", "evaluation": "eval_loss"}),
    Panel("Margin", "nats", {"training": "rewards/margins", "evaluation": "eval_rewards/margins"}),
    Panel("Accuracy", "share", {"training": "rewards/accuracies", "evaluation": "eval_rewards/accuracies"}),
    Panel(
        "Displacement (policy - reference)",
        "nats",
        {side: DISPLACEMENT.format(side) for side in ("chosen", "rejected")},
    ),
    Panel(
        "ELBO per token",
        "nats",
        {side: f"elbo/{side}_per_token" for side in ("chosen", "rejected", "completion")},
    ),
    Panel("Standard error of the score", "nats", {"training": "vrpo/score_std"}),
    Panel("Gradient norm", "", {"training": "grad_norm"}),
    Panel("Learning rate", "", {"training": "learning_rate"}),
    Panel("Throughput", "tokens / s", {"training": "vrpo/tokens_per_second"}),
    Panel("Peak memory", "GB", {"training": "vrpo/peak_memory_gb"}),
)


def curves_of(log_history: Sequence[Mapping[str, Any]]) -> dict[str, Points]:
    """key -> its points in order, displacement included; what is no number is left out."""
    found: dict[str, Points] = {}
    for entry in log_history:
        step = entry.get("step", 0)
        values = dict(entry)
        for side in ("chosen", "rejected"):
            policy, reference = entry.get(f"logps/{side}"), entry.get(f"elbo/ref_{side}")
            if policy is not None and reference is not None:
                values[DISPLACEMENT.format(side)] = policy - reference
        for key, value in values.items():
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.setdefault(key, []).append((step, float(value)))
    return found


def write_report(folder: str, log_history: Sequence[Mapping[str, Any]], title: str) -> bool:
    """Writes REPORT_FILE and, with matplotlib, FIGURE_FILE to the folder; False if nothing was logged.

    Errors: those of the file system and of matplotlib.
    """
    curves = curves_of(log_history)
    panels = [
        (panel, {label: curves[key] for label, key in panel.curves.items() if key in curves})
        for panel in PANELS
    ]
    panels = [(panel, lines) for panel, lines in panels if lines]
    if not panels:
        return False
    has_figure = importlib.util.find_spec("matplotlib") is not None
    if not has_figure:
        logger.warning_once("the report has no figure: pip install vrpo[plot] brings matplotlib")
    contents: dict[Path, str | bytes] = {Path(folder, REPORT_FILE): _markdown(title, panels, has_figure)}
    if has_figure:
        contents[Path(folder, FIGURE_FILE)] = _figure(panels)
    write(contents)
    return True


def _markdown(title: str, panels: list[tuple[Panel, dict[str, Points]]], has_figure: bool) -> str:
    lines = [f"# Training of {title}", ""]
    if has_figure:
        lines += [f"![curves over optimizer steps]({FIGURE_FILE})", ""]
    lines += ["| what | of | unit | first | last | lowest | highest | points |"]
    lines += ["|---|---|---|---|---|---|---|---|"]
    for panel, curves in panels:
        for label, points in curves.items():
            values = [value for _, value in points]
            numbers = (values[0], values[-1], min(values), max(values))
            shown = " | ".join(f"{value:.5g}" for value in numbers)
            lines.append(f"| {panel.title} | {label} | {panel.unit} | {shown} | {len(values)} |")
    lines += [
        "",
        "Displacement is the ELBO of the policy minus that of the reference, per response. Where that of the "
        "chosen responses falls, the margin grows because both sides become less likely: raise sft_weight. "
        "The standard error is that of one pair's score, from the spread between replicates of its masks.",
        "",
    ]
    return "\n".join(lines)


def _figure(panels: list[tuple[Panel, dict[str, Points]]]) -> bytes:
    """All panels in one PNG; drawn without pyplot, which would keep the figure and choose a window."""
    import io

    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4.4 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for axis, (panel, curves) in zip(axes, panels, strict=False):
        for label, points in curves.items():
            marker = "o" if len(points) < 30 else None
            axis.plot(*zip(*points, strict=True), label=label, marker=marker, markersize=3, linewidth=1.4)
        axis.set_title(panel.title, fontsize=11)
        axis.set_xlabel("optimizer step", fontsize=9)
        axis.set_ylabel(panel.unit, fontsize=9)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if len(curves) > 1:
            axis.legend(fontsize=8)
    for axis in figure.axes[len(panels) :]:
        axis.set_axis_off()
    with io.BytesIO() as file:
        figure.savefig(file, format="png", dpi=120)
        return file.getvalue()
