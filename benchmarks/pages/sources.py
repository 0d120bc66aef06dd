"""The committed result files that a page names: rows of CSV and JSONL, values of JSON, figures in a text."""

import csv
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

ROOT = RESULTS.parents[1]
ROW_FILES = (".csv", ".jsonl")

Row = dict[str, Any]


@dataclass(frozen=True)
class Source:
    """One file, or all that a pattern (`variance/*.jsonl`) has; `name` is what a page calls it."""

    name: str
    path: str

    def rows(self) -> list[Row]:
        """Errors: ValueError for a file that has no rows."""
        if not self.path.endswith(ROW_FILES):
            raise ValueError(
                f"{self.path} is no table: take its values by {self.name}.key or {self.name}['key']"
            )
        return [row for file in _files(self.path) for row in _rows(file)]

    def text(self) -> str:
        """What a text file holds. Errors: ValueError for any other."""
        if not self.path.endswith(".txt"):
            raise ValueError(f"{self.path} is no text: only .txt files are searched")
        (file,) = _files(self.path)
        return file.read_text(encoding="utf-8")

    def content(self) -> Any:
        """What a JSON file holds. Errors: ValueError for a table."""
        if not self.path.endswith(".json"):
            raise ValueError(f"{self.path} is a table: select a row by {self.name}(column=value)")
        (file,) = _files(self.path)
        return _content(file)


def _files(path: str) -> list[Path]:
    folder = ROOT if path.startswith("examples/") else RESULTS
    files = sorted(folder.glob(path))
    if not files:
        raise ValueError(f"there is no {path} in {folder.relative_to(ROOT) or 'the repository'}")
    return files


@cache
def _rows(file: Path) -> list[Row]:
    with file.open(newline="", encoding="utf-8") as stream:
        if file.suffix == ".csv":
            return list(csv.DictReader(stream))
        return [json.loads(line) for line in stream]


@cache
def _content(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))
