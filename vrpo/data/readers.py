"""Text files -> rows as plain Python values, one at a time, each with its place in the file.

JSON lines, JSON (one array, one object, or several objects) and CSV, packed by gzip or not. Strict, because
what is read here is trained on: strings stay strings whatever they look like, and whatever is not plain data
(NaN, a key twice, half a character, another encoding) is an error of one line with its place and its cure.
"""

import codecs
import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from vrpo.data.problems import one_line, shown

Row = dict[str, Any]
Placed = tuple[str, Row]
"""("line 3", {...})"""

# Of CSV, where every cell is text, these columns are read as JSON; all others stay text.
JSON_CELLS = ("example_id", "prompt_ids", "chosen_ids", "rejected_ids", "completion_ids")
MAX_DEPTH = 500  # of nested lists and objects; the readers behind `datasets.Json` stop at 1023
_MAX_CELL = 2**30
_BOMS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_SPACE = re.compile(r"[ \t\r\n]*")


def read_rows(path: Path, format: str) -> Iterator[Placed]:
    """The rows of one file, lazily.

    Args: format: "jsonl", "json", "csv" or "tsv"; the name's, without its .gz.
    Errors: ValueError of one line that names the file, the line and what is wrong there.
    """
    try:
        with _opened(path) as file:
            _check_encoding(file)
            yield from _READERS[format](file)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ValueError(
            f"{path}: not a whole gzip file ({one_line(error)}); fetch or pack it again"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path}: {one_line(error, 400)}") from error


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    opener = gzip.open if path.suffix.lower() == ".gz" else open
    with opener(path, "rb") as file, io.BufferedReader(file) as buffered:
        yield buffered


def _check_encoding(file: io.BufferedReader) -> None:
    """Leave the file after a UTF-8 byte order mark; ValueError for what is no UTF-8 at first sight."""
    start = file.peek(4)[:4]
    if not start:
        raise ValueError("the file is empty")
    name = next((name for bom, name in _BOMS if start.startswith(bom)), None)
    if name is None and b"\0" in start:
        name = "UTF-16 or binary"
    if name is not None:
        raise ValueError(f"the file is {name}, not UTF-8; save it as UTF-8, e.g. iconv -f UTF-16 -t UTF-8")
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))


def _decoded(line: bytes, number: int) -> str:
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"line {number}: byte 0x{line[error.start]:02x} at column {error.start + 1} is not UTF-8; save "
            "the file as UTF-8, e.g. iconv -f LATIN1 -t UTF-8"
        ) from error


def _json_lines(file: io.BufferedReader) -> Iterator[Placed]:
    if file.peek(1)[:1] == b"[":
        yield from _json_text(file)
        return
    for number, line in enumerate(file, start=1):
        text = _decoded(line, number)
        if text.strip():
            place = f"line {number}"
            try:
                value = _DECODER.decode(text)
            except json.JSONDecodeError as error:
                raise _syntax(error, place) from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: {_reason(error)}") from error
            yield place, _object(value, text, place)


def _syntax(error: json.JSONDecodeError, place: str) -> ValueError:
    if error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string"):
        what = "ends in the middle of a value: is the file cut?"
    else:
        what = f"is not JSON: {error.msg} at column {error.colno}"
    return ValueError(f"{place} {what} (each line must be one object; in a .json file it may span lines)")


def _json_text(file: io.BufferedReader) -> Iterator[Placed]:
    """Objects in an array, or one after another with white space between them, over any number of lines.

    The text is in memory, its objects come one by one.
    """
    text = "".join(_decoded(line, number) for number, line in enumerate(file, start=1))
    start = position = _SPACE.match(text).end()
    is_array = text[start : start + 1] == "["
    position += is_array
    line, counted = 1, 0
    separator = ""
    while True:
        position = _SPACE.match(text, position).end()
        line, counted = line + text.count("\n", counted, position), position
        place = f"line {line}"
        if is_array and separator != "," and text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                raise ValueError(f"{place}: there is more behind the end of the array")
            return
        if not is_array and position == len(text):
            return
        try:
            value, end = _DECODER.raw_decode(text, position)
        except json.JSONDecodeError as error:
            where = f"line {error.lineno}"
            if error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated string"):
                raise ValueError(f"{where} ends in the middle of a value: is the file cut?") from error
            raise ValueError(f"{where} is not JSON: {error.msg} at column {error.colno}") from error
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{place}: {_reason(error)}") from error
        yield place, _object(value, text[position:end], place)
        position = end
        if is_array:
            position = _SPACE.match(text, position).end()
            separator = text[position : position + 1]
            if separator not in (",", "]"):
                ends = "the array has no end: is the file cut?" if not separator else "a comma is missing"
                raise ValueError(f"line {line + text.count(chr(10), counted, position)}: {ends}")
            position += separator == ","


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return f"lists and objects are nested deeper than {MAX_DEPTH}"
    return one_line(error)


def _object(value: Any, text: str, place: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(
            f'{place} holds {shown(value, 30)}; every row must be an object such as {{"prompt": ..., ...}}'
        )
    for name in value:
        check_name(name, place)
    # What follows is rare, and looking at every value takes long.
    if "\\u" in text or text.count("[") > MAX_DEPTH or text.count("{") > MAX_DEPTH:
        for name, cell in value.items():
            try:
                check_value(cell)
                check_value(name)
            except ValueError as error:
                raise ValueError(f"{place}, {name!a}: {error}") from error
    return value


def check_name(name: str, place: str) -> None:
    """ValueError for the name of a column that Arrow would cut short."""
    if "\0" in name:
        raise ValueError(f"{place}: the key {name!a} holds a NUL character")


def check_value(value: Any, depth: int = 0) -> None:
    """ValueError for what Arrow or JSON cannot hold: half a surrogate pair, a huge number, deep nesting."""
    if depth > MAX_DEPTH:
        raise ValueError(f"lists and objects are nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            code = f"\\u{ord(value[error.start]):04x}"
            raise ValueError(f"{code} is half a surrogate pair and no character; remove it") from error
    elif isinstance(value, int):
        _check_int(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_value(key, depth + 1)
            check_value(item, depth + 1)
    elif isinstance(value, list):
        for item in value:
            check_value(item, depth + 1)


def _check_int(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError("an integer has more than 64 bits; write it as a string")
    return value


def _int(text: str) -> int:
    # Python refuses to convert what has more than 4300 digits.
    return _check_int(int(text) if len(text) < 30 else 2**63)


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON; write null or leave the key out")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise ValueError(f"the number {text[:20]} is too large for a float; write it as a string")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(
    parse_constant=_no_constant, parse_float=_float, parse_int=_int, object_pairs_hook=_unique
)


def _csv(file: io.BufferedReader, delimiter: str = ",") -> Iterator[Placed]:
    """Rows of a CSV file with a header. Every cell is text, but for the columns of JSON_CELLS."""
    lines = (_decoded(line, number) for number, line in enumerate(file, start=1))
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    with _wide_cells():
        names = _next_line(reader) or []
    _check_header(names, delimiter)
    while True:
        first = reader.line_num + 1
        with _wide_cells():
            cells = _next_line(reader)
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        place = f"line {first}"
        if len(cells) != len(names):
            raise ValueError(
                f"{place} has {len(cells)} cells, the header {len(names)}; quote texts that hold commas"
            )
        row = {name: _cell(name, cell, place) for name, cell in zip(names, cells, strict=True) if name}
        yield place, row


@contextlib.contextmanager
def _wide_cells() -> Iterator[None]:
    """Cells longer than 128 KiB; the limit is the csv module's own, for all its users, and is put back."""
    before = csv.field_size_limit(_MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _next_line(reader: Any) -> list[str] | None:
    try:
        return next(reader, None)
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}: is a quote missing, or the file cut?") from error


def _check_header(names: list[str], delimiter: str) -> None:
    if not any(names):
        raise ValueError("line 1 is no header: it must name the columns")
    for name in names:
        check_name(name, "line 1")
    twice = sorted({name for name in names if name and names.count(name) > 1})
    if twice:
        raise ValueError(f"line 1: the column {shown(twice[0])} stands twice in the header")
    other = ";" if delimiter == "," else ","
    if len(names) == 1 and (other in names[0] or "\t" in names[0]):
        raise ValueError(
            f"line 1: the header is the one cell {shown(names[0])}; separate cells by {delimiter!r} "
            "(tabs: name the file .tsv)"
        )


def _cell(name: str, cell: str, place: str) -> Any:
    if name not in JSON_CELLS:
        return cell
    try:
        value = _DECODER.decode(cell)
        check_value(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{place}, {name}: {shown(cell)} is no JSON number or list of numbers") from error
    return value


_READERS: dict[str, Callable[[io.BufferedReader], Iterator[Placed]]] = {
    "jsonl": _json_lines,
    "json": _json_text,
    "csv": _csv,
    "tsv": lambda file: _csv(file, "\t"),
}
