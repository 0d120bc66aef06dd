"""Writing to standard output, whatever its encoding."""

import sys
from collections.abc import Mapping
from typing import Any


def say(text: str) -> None:
    """Write to standard output; what its encoding lacks is escaped, so that no result is lost to a print."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


def say_metrics(metrics: Mapping[str, Any]) -> None:
    """One `name  value` per line, names aligned."""
    width = max(map(len, metrics), default=0)
    for name, value in metrics.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        say(f"  {name:<{width}}  {shown}\n")
