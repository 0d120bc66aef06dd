"""The rows that drop_unusable_rows left out, each with its reason, in a file beside the model."""

import os
from collections.abc import Iterable
from pathlib import Path

from vrpo.data.output import to_json, write

DROPPED_FILE = "dropped_rows.jsonl"


class DroppedRows:
    """Collects what is dropped and writes all of it anew each time: one {"split", "row", "reason"} a line.

    Args: output_dir: where DROPPED_FILE goes; is_writer: whether this process writes it.
    """

    def __init__(self, output_dir: str, *, is_writer: bool):
        self._path = Path(os.path.realpath(output_dir), DROPPED_FILE)
        self._is_writer = is_writer
        self._lines: dict[str, list[str]] = {}

    def add(self, split: str, rows: Iterable[tuple[int, str]]) -> None:
        """rows: (number in the dataset, reason). Nothing is written where nothing was dropped."""
        lines = [to_json({"split": split, "row": row, "reason": reason}) + "\n" for row, reason in rows]
        if not lines:
            return
        self._lines.setdefault(split, []).extend(lines)
        if self._is_writer:
            write({self._path: "".join(line for part in self._lines.values() for line in part)})

    def restart(self, split: str) -> None:
        """Forgets what was dropped of a split, which is read again."""
        self._lines.pop(split, None)
