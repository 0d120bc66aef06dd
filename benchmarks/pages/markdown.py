"""Where a page has code, marks and tables. Everything works on offsets into the text of the page."""

import re

from benchmarks.pages.figures import NUMBER
from benchmarks.pages.sources import Source

TABLE = re.compile(r"<!-- table: (\S+) -->.*?<!-- end -->", re.DOTALL)
FIGURE = re.compile(rf"(?P<number>(?<![\w.]){NUMBER})?<!--\s+=(?P<expression>.*?)-->", re.DOTALL)
SOURCE = re.compile(r"<!-- source: ([a-z][a-z0-9_]*) = (\S+) -->")
BLOCK = re.compile(r"\n\s*(?:[-+*>#|]|=+|\d+[.)])(?=\s)|\n\s*\n")
"""What begins a new block of Markdown, even inside a comment."""
COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)

_FENCED = re.compile(r"^(```|~~~).*?^\1[^\n]*$", re.DOTALL | re.MULTILINE)
_INDENTED = re.compile(r"(?:\A|(?<=\n\n))(?: {4}[^\n]*(?:\n|\Z)|\n(?= {4}))+")
_INLINE = re.compile(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", re.DOTALL)

Span = tuple[int, int]


def line_of(text: str, offset: int) -> int:
    """The line of an offset, from 1."""
    return text.count("\n", 0, offset) + 1


def blanked(text: str, spans: list[Span]) -> str:
    """text with spaces in the place of these spans; lines stay lines."""
    for start, stop in spans:
        text = text[:start] + re.sub(r"[^\n]", " ", text[start:stop]) + text[stop:]
    return text


def spans(pattern: re.Pattern, text: str) -> list[Span]:
    return [match.span() for match in pattern.finditer(text)]


def without_code(text: str) -> str:
    """The page with its code blanked: fenced, indented by four spaces after an empty line, in backticks."""
    for pattern in (_FENCED, _INDENTED):
        text = blanked(text, spans(pattern, text))
    # Backticks in a mark are the table's business; a span of code never holds a blank line.
    inline = [span for span in spans(_INLINE, text) if "\n\n" not in text[slice(*span)]]
    return blanked(text, inline)


def sources_of(text: str) -> dict[str, Source]:
    """The files that a page names. Errors: ValueError for a name given twice."""
    found: dict[str, Source] = {}
    for name, path in SOURCE.findall(without_code(text)):
        if name in found:
            raise ValueError(f"source {name!r} is named twice")
        found[name] = Source(name, path)
    return found
