"""What is wrong with rows: one exception per row, one ValueError of one line per dataset."""

import json
from collections.abc import Sequence
from typing import Any

_SHOWN = 5


class RowProblem(ValueError):
    """One row cannot be used. The text says why; the caller adds the row number."""


def raise_problems(problem_by_row: Sequence[str | None]) -> None:
    """ValueError that names each problem with its rows, in the order of the first; "" and None are none."""
    found = [(row, problem) for row, problem in enumerate(problem_by_row) if problem]
    if found:
        raise ValueError(f"unusable rows in the dataset: {told_problems(found)}")


def told_problems(found: Sequence[tuple[int, str]]) -> str:
    """(row, problem) pairs in one line: each problem with its first rows, the first problems."""
    rows_of: dict[str, list[int]] = {}
    for row, problem in found:
        rows_of.setdefault(problem, []).append(row)
    told = []
    for problem, rows in rows_of.items():
        shown = ", ".join(map(str, rows[:_SHOWN]))
        more = f" and {len(rows) - _SHOWN} more" if len(rows) > _SHOWN else ""
        told.append(f"{problem} (row{'s' * (len(rows) > 1)} {shown}{more})")
    shown = "; ".join(told[:_SHOWN])
    more = f"; and {len(told) - _SHOWN} more problems" if len(told) > _SHOWN else ""
    return f"{shown}{more}"


def one_line(error: BaseException, limit: int = 200) -> str:
    """The text of an exception without line breaks, cut to `limit` characters; its type where it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[:limit] + " ..."


def shown(value: Any, limit: int = 60) -> str:
    """A value as an error message shows it: short, ASCII, of one line."""
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = ascii(value)
    return text if len(text) <= limit else text[:limit] + " ..."
