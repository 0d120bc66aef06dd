"""What `make quickstart` printed, from its metrics.json, which is benchmarks/results/quickstart.json."""

import json
import textwrap

from benchmarks.record import RESULTS
from examples import quickstart_report

FILE = RESULTS / "quickstart.json"
WIDTH = 112


def page_tables() -> dict[str, str]:
    """For `python -m benchmarks pages`: a block of code, as it is printed."""
    metrics = json.loads(FILE.read_text(encoding="utf-8"))
    notes = (quickstart_report.first_step_text(metrics), quickstart_report.variance_text(metrics))
    parts = [
        quickstart_report.pairs_text(metrics["pairs"]),
        quickstart_report.table(metrics),
        "\n".join(textwrap.fill(note, WIDTH) for note in notes),
    ]
    return {"outcome": textwrap.indent("\n\n".join(parts), "    ")}
