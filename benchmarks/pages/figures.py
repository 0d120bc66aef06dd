r"""The expression of a mark, and its value in the form of the number before it.

    step(case="LoRA", K=8).ms                     the cell of the only row with these values
    step(case="hand", K=4).ms / 1000              + - * / of figures and numbers
    max(rivals(N=4096).nll_error)                 min, max, mean, sum of a column, count of rows
    min(all(N=(512, 1024), provider="Liger").ms / all(N=(512, 1024), provider="vrpo").ms)
    sum(runs(arm="a", seed=(1, 2)).loss < runs(arm="b", seed=(1, 2)).loss)   in how many pairs it is lower
    max(abs(prediction(drift="late").predicted - prediction(drift="late").measured))
    summary(r"SFT 600 steps (\d+)")              the only match in a text file, its group
    quickstart.held_out.vrpo["elbo/accuracies"]   a value of a JSON file

A tuple selects one row for each of its values (for each combination of several tuples), in that order, so
that two such columns can be divided by each other, as two columns of the same rows can. Empty cells of rows
that no tuple selects count for nothing. Numbers are compared as such: 8 selects "8.0" too.
"""

import ast
import math
import operator
import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from benchmarks.pages.sources import Row, Source

NUMBER = r"[+-]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:e[+-]?\d+)?"

OPERATORS = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Lt: operator.lt,
    ast.Gt: operator.gt,
}
NAMED_CELL = re.compile(r"(?:[^\s:]+:\S+ ?)+")
"""A cell with several figures, each with a name: `1:0.4015 2:0.5185`."""
OVER_COLUMNS = {
    "min": min,
    "max": max,
    "sum": math.fsum,
    "mean": lambda values: math.fsum(values) / len(values),
    "count": len,
}
FUNCTIONS = ("abs", *OVER_COLUMNS)

Grid = tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class Selection:
    """Rows of a file. grid: the tuples that they were selected by, () if there were none."""

    rows: tuple[Row, ...]
    grid: Grid
    said: str


@dataclass(frozen=True)
class Column:
    """Figures of several rows, None for an empty cell. order: what two columns must share to be combined."""

    values: tuple[float | None, ...]
    order: tuple[Any, ...]
    said: str


def figure(expression: str, sources: Mapping[str, Source]) -> float:
    """The value of an expression. Errors: ValueError if it has none, not one, or none that is finite."""
    try:
        tree = ast.parse(" ".join(expression.split()), mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{expression!r} is no expression: {error.msg}") from None
    value = _evaluate(tree.body, sources)
    if isinstance(value, Selection | Column):
        number = len(value.rows if isinstance(value, Selection) else value.values)
        what = "rows" if number != 1 else "row, and no column of it"
        raise ValueError(f"{value.said} selects {number} {what}; a figure needs one cell")
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{expression.strip()} must be a finite number, got {value!r}")
    return float(value)


def written_as(text: str, value: float) -> str:
    """value with the decimals, sign, commas, exponent and leading zero that the number `text` has."""
    sign = "+" if text.startswith("+") else ""
    mantissa, has_exponent, _ = text.partition("e")
    decimals = len(mantissa.partition(".")[2])
    if has_exponent:
        digits, _, exponent = f"{value:{sign}.{decimals}e}".partition("e")
        return f"{digits}e{int(exponent)}"
    comma = "," if "," in text else ""
    told = f"{value:{sign}{comma}.{decimals}f}"
    bare = re.sub(r"^([+-]?)0\.", r"\1.", told)
    return bare if text.lstrip("+-").startswith(".") else told


def _evaluate(node: ast.expr, sources: Mapping[str, Source]) -> Any:
    match node:
        case ast.Constant(value=int() | float()):
            return node.value
        case ast.UnaryOp(op=ast.USub()):
            return _combined(ast.Sub, 0, _evaluate(node.operand, sources), ast.unparse(node))
        case ast.BinOp() if type(node.op) in OPERATORS:
            both = (_evaluate(side, sources) for side in (node.left, node.right))
            return _combined(type(node.op), *both, ast.unparse(node))
        case ast.Compare(left=left, ops=[op], comparators=[right]) if type(op) in OPERATORS:
            sides = (_evaluate(side, sources) for side in (left, right))
            return _combined(type(op), *sides, ast.unparse(node))
        case ast.Call(func=ast.Name(id="abs"), args=[argument], keywords=[]):
            return _size(_evaluate(argument, sources), ast.unparse(node))
        case ast.Call(func=ast.Name(id=name), args=[argument], keywords=[]) if name in OVER_COLUMNS:
            return _over_column(name, _evaluate(argument, sources), ast.unparse(argument))
        case ast.Call(func=ast.Name(id=name), args=[ast.Constant(value=str(pattern))], keywords=[]):
            return _matched(_source(name, sources), pattern, ast.unparse(node))
        case ast.Call(func=ast.Name(id=name), args=[]):
            return _selected(_source(name, sources), node)
        case ast.Attribute():
            return _part(_owner(node.value, sources), node.attr, ast.unparse(node))
        case ast.Subscript(slice=ast.Constant(value=key)):
            return _part(_owner(node.value, sources), key, ast.unparse(node))
    raise ValueError(f"{ast.unparse(node)!r} is not one of the forms of benchmarks/pages/figures.py")


def _owner(node: ast.expr, sources: Mapping[str, Source]) -> Any:
    """What an attribute or a key is of: a JSON file by its name, or any expression."""
    if isinstance(node, ast.Name):
        return _source(node.id, sources).content()
    return _evaluate(node, sources)


def _source(name: str, sources: Mapping[str, Source]) -> Source:
    if name not in sources:
        raise ValueError(f"the page names no source {name!r}; it has {', '.join(sources) or 'none'}")
    return sources[name]


def _selected(source: Source, call: ast.Call) -> Selection:
    said = ast.unparse(call)
    wanted = {word.arg: _wanted(word.value) for word in call.keywords if word.arg}
    rows = source.rows()
    unknown = set(wanted) - {name for row in rows for name in row}
    if unknown:
        raise ValueError(f"{source.path} has no column {', '.join(sorted(unknown))}")
    grid = tuple((name, value) for name, value in wanted.items() if isinstance(value, tuple))
    single = {name: value for name, value in wanted.items() if not isinstance(value, tuple)}
    rows = [row for row in rows if _fits(row, single)]
    if not grid:
        if not rows:
            raise ValueError(f"{said} selects no row of {source.path}")
        return Selection(tuple(rows), (), said)
    found = []
    for values in product(*(values for _, values in grid)):
        own = dict(zip((name for name, _ in grid), values, strict=True))
        fitting = [row for row in rows if _fits(row, own)]
        if len(fitting) != 1:
            raise ValueError(f"{said} selects {len(fitting)} rows of {source.path} for {own}; it needs one")
        found += fitting
    return Selection(tuple(found), grid, said)


def _matched(source: Source, pattern: str, said: str) -> float | Column:
    try:
        found = re.findall(pattern, source.text())
    except re.error as error:
        raise ValueError(f"{said} is no regular expression: {error}") from None
    if not found or not all(isinstance(text, str) for text in found) or re.compile(pattern).groups != 1:
        raise ValueError(f"{said} needs one group and a match in {source.path}, it has {len(found)} matches")
    values = tuple(_number(text, said) for text in found)
    return values[0] if len(values) == 1 else Column(values, (source.path, pattern), said)


def _wanted(node: ast.expr) -> Any:
    match node:
        case ast.Constant():
            return node.value
        case ast.Tuple(elts=values) if values and all(isinstance(value, ast.Constant) for value in values):
            return tuple(value.value for value in values)
    raise ValueError(f"a column is selected by a value or a tuple of values, got {ast.unparse(node)}")


def _fits(row: Row, wanted: Mapping[str, Any]) -> bool:
    return all(_same(row.get(name), value) for name, value in wanted.items())


def _same(cell: Any, value: Any) -> bool:
    if isinstance(value, str | bool):
        return str(cell) == str(value)
    return cell not in (None, "") and _is_number(cell) and float(cell) == value


def _is_number(cell: Any) -> bool:
    try:
        float(cell)
    except (TypeError, ValueError):
        return False
    return True


def _part(owner: Any, key: Any, said: str) -> Any:
    if isinstance(owner, Selection):
        cells = [_several(row.get(key)) for row in owner.rows]
        if not any(key in row for row in owner.rows):
            raise ValueError(f"{owner.said} has no column {key!r}")
        if len(cells) == 1 and not owner.grid and not isinstance(cells[0], list):
            return _number(cells[0], said)
        # A column of a whole file may have gaps; one that was selected value by value may not.
        lists = [cell if isinstance(cell, list) else [(None, cell)] for cell in cells]
        flat = [part for cell in lists for _, part in cell]
        names = tuple(name for cell in lists for name, _ in cell)
        rows = tuple(map(id, owner.rows)) if len(owner.rows) > 1 else ()
        order = (*(owner.grid or rows), names)
        is_gap = [cell in (None, "") and not owner.grid for cell in flat]
        values = (None if gap else _number(cell, said) for cell, gap in zip(flat, is_gap, strict=True))
        return Column(tuple(values), order, said)
    try:
        return owner[key]
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{said}: there is no {key!r}") from None


def _several(cell: Any) -> Any:
    """A cell of several figures as a list of (name, figure)."""
    if isinstance(cell, list):
        return list(enumerate(cell))
    if isinstance(cell, str) and NAMED_CELL.fullmatch(cell):
        return [tuple(part.split(":", 1)) for part in cell.split()]
    return cell


def _number(cell: Any, said: str) -> float:
    if not _is_number(cell):
        raise ValueError(f"{said} must be a number, got {cell!r}")
    return float(cell)


def _over_column(name: str, value: Any, said: str) -> float:
    if isinstance(value, Selection):
        if name != "count":
            raise ValueError(f"{name}({said}) needs a column of these rows")
        return len(value.rows)
    values = value
    if isinstance(value, Column):
        values = tuple(figure for figure in value.values if figure is not None)
    if isinstance(values, int | float):
        values = (float(values),)
    if not values:
        raise ValueError(f"{name}({said}): no row has a figure")
    return OVER_COLUMNS[name](values)


def _size(value: Any, said: str) -> Any:
    if isinstance(value, Column):
        sizes = (None if figure is None else abs(figure) for figure in value.values)
        return Column(tuple(sizes), value.order, said)
    if isinstance(value, int | float):
        return abs(value)
    raise ValueError(f"{said} needs figures")


def _combined(kind: type[ast.operator | ast.cmpop], left: Any, right: Any, said: str) -> Any:
    columns = [side for side in (left, right) if isinstance(side, Column)]
    if any(not isinstance(side, int | float | Column) for side in (left, right)):
        raise ValueError(f"{said}: only figures can be combined, and columns of selections")
    if len(columns) == 2 and (left.order != right.order or len(left.values) != len(right.values)):
        raise ValueError(f"{said}: both columns must be of the same rows, or selected by the same tuples")
    try:
        if not columns:
            return OPERATORS[kind](left, right)
        length = len(columns[0].values)
        sides = [side.values if isinstance(side, Column) else (side,) * length for side in (left, right)]
        values = tuple(None if None in pair else OPERATORS[kind](*pair) for pair in zip(*sides, strict=True))
    except ZeroDivisionError:
        raise ValueError(f"{said} divides by 0") from None
    return Column(values, columns[0].order, said)
