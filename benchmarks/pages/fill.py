"""A page with its marked tables and figures as the result files have them."""

import ast
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.pages.figures import FUNCTIONS, figure, written_as
from benchmarks.pages.markdown import BLOCK, COMMENT, FIGURE, TABLE, line_of, sources_of, without_code
from benchmarks.pages.sources import Source


@dataclass(frozen=True)
class Finding:
    """What is wrong in which line of a page."""

    line: int
    text: str


@dataclass
class Filled:
    """The page as it should be; what that changes; what could not be made."""

    text: str
    changes: list[Finding] = field(default_factory=list)
    errors: list[Finding] = field(default_factory=list)


def filled(text: str, table_of: Callable[[str], str]) -> Filled:
    """The page with every marked table and figure made anew.

    Args:
        table_of: name -> Markdown of that table; ValueError for a name that no table has.
    """
    try:
        sources = sources_of(text)
    except ValueError as error:
        return Filled(text, errors=[Finding(1, str(error))])
    page = _with_tables(text, table_of)
    used: set[str] = set()
    figures = _with_figures(page.text, sources, used)
    errors = page.errors + figures.errors + _malformed(text)
    errors += [Finding(1, f"no mark uses source {name!r}") for name in sources if name not in used]
    errors += [Finding(1, f"a source cannot be called {name!r}") for name in sources if name in FUNCTIONS]
    return Filled(figures.text, page.changes + figures.changes, sorted(errors, key=lambda found: found.line))


def _with_tables(text: str, table_of: Callable[[str], str]) -> Filled:
    page, parts, place = Filled(text), [], 0
    live = without_code(text)
    for match in TABLE.finditer(text):
        if live[match.start()] == " ":
            continue
        line, name = line_of(text, match.start()), match[1]
        try:
            made = f"<!-- table: {name} -->\n\n{table_of(name)}\n\n<!-- end -->"
        except ValueError as error:
            page.errors.append(Finding(line, str(error)))
            continue
        if made != match[0]:
            page.changes.append(Finding(line, f"table {name} is not what its files give"))
        parts += [text[place : match.start()], made]
        place = match.end()
    page.text = "".join([*parts, text[place:]])
    return page


def _with_figures(text: str, sources: dict[str, Source], used: set[str]) -> Filled:
    page, parts, place = Filled(text), [], 0
    live = without_code(text)
    for match in FIGURE.finditer(text):
        if live[match.start()] == " ":
            continue
        mark = match.end("number") if match["number"] else match.start()
        line, number = line_of(text, mark), match["number"]
        used |= _names(match["expression"])
        if not number:
            page.errors.append(Finding(line, f"no number stands right before <!-- ={match['expression']}-->"))
            continue
        if BLOCK.search(match[0]):
            page.errors.append(
                Finding(line, "a line of a mark begins with what Markdown takes for a new block")
            )
        try:
            made = written_as(number, figure(match["expression"], sources))
        except ValueError as error:
            page.errors.append(Finding(line, str(error)))
            continue
        if made != number:
            page.changes.append(
                Finding(line, f"{number} is {made} in {' '.join(match['expression'].split())}")
            )
        parts += [text[place : match.start()], made]
        place = match.end("number")
    page.text = "".join([*parts, text[place:]])
    return page


def _names(expression: str) -> set[str]:
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval")
    except SyntaxError:
        return set()
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def _malformed(text: str) -> list[Finding]:
    """Comments that look like marks and are none: a table without its end, a misspelt source."""
    rest = without_code(text)
    tables = {match.start() for match in TABLE.finditer(text)}
    found = []
    for match in COMMENT.finditer(rest):
        inside = match[0][4:-3].strip()
        known = re.fullmatch(r"=.*|table: \S+|end|source: [a-z][a-z0-9_]* = \S+", inside, re.DOTALL)
        is_open = inside.startswith("table:") and match.start() not in tables
        if not known or is_open:
            found.append(Finding(line_of(text, match.start()), f"{match[0]!r} is no mark, or has no end"))
    return found
