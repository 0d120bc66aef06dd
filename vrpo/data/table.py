"""Rows as Python values -> a `datasets.Dataset` whose columns have explicit types, in memory or on disk.

Two passes: the first looks at every value and decides each column's type, the second writes. Types are never
guessed from a prefix of the rows or from what a string looks like.
"""

import errno
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, Json, List, Value

from vrpo.data.problems import one_line
from vrpo.data.readers import Row

_ROWS_AT_ONCE = 1000
_CHARACTERS_AT_ONCE = 2**25
_EXACT_IN_FLOAT = 2**53
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's: a message of length 0


def features_of(rows: Iterable[Row]) -> tuple[Features, int]:
    """The type of each column, in the order in which columns appear, and the number of rows.

    All strings -> string, all integers -> int64, numbers -> float64, booleans -> bool, all lists of integers
    -> lists of int64; None fits all. Everything else, mixed columns too, -> `datasets.Json`, which
    keeps every value as it is.
    """
    kinds: dict[str, set[str]] = {}
    count = 0
    for row in rows:
        count += 1
        for name, value in row.items():
            known = kinds.setdefault(name, set())
            if value is not None:
                known.add(_kind(value))
    return Features({name: _feature(known) for name, known in kinds.items()}), count


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= _EXACT_IN_FLOAT else "long"
    if isinstance(value, float):
        return "float"
    if isinstance(value, list) and value and set(map(type, value)) == {int}:
        return "ints"
    return "json"


def _feature(kinds: set[str]) -> Any:
    if not kinds:
        return Value("null")
    if kinds == {"text"}:
        return Value("string")
    if kinds == {"bool"}:
        return Value("bool")
    if kinds <= {"int", "long"}:
        return Value("int64")
    if kinds <= {"int", "float"}:
        return Value("float64")
    if kinds == {"ints"}:
        return List(Value("int64"))
    return Json()


def in_memory(rows: list[Row]) -> Dataset:
    """A dataset of rows that are in memory already."""
    features, _ = features_of(rows)
    schema = features.arrow_schema
    return Dataset(pa.Table.from_batches(_batches(rows, features, schema), schema=schema))


def on_disk(path: Path, source: Callable[[], tuple[Features, Iterator[pa.RecordBatch]]]) -> Dataset:
    """A memory-mapped dataset of what `source` gives, with the Arrow file `path` behind it.

    The file appears whole or not at all; processes that write it at once do not disturb each other. Where it
    is there and whole, `source` is not asked: its name has to say what it holds. One that lost its end, in a
    crash of the machine say, is written anew.

    Errors: those of `source`; OSError naming the folder that cannot be written, or the damaged file.
    """
    if not _has_its_end(path):
        features, batches = source()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle, aside = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
        except OSError as error:
            raise OSError(
                f"the cache of datasets cannot be written: {error}; HF_DATASETS_CACHE names another folder"
            ) from error
        os.close(handle)
        try:
            _write_stream(aside, features, batches)
            os.chmod(aside, 0o666 & ~_umask())  # mkstemp's is for its owner alone, and caches are shared
            os.replace(aside, path)
        except BaseException as error:
            os.unlink(aside)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise OSError(
                    f"no space left for the cache of datasets in {path.parent}; HF_DATASETS_CACHE names "
                    "another folder"
                ) from error
            raise
    try:
        return Dataset.from_file(str(path))
    except (OSError, ValueError) as error:
        raise OSError(f"the cached data {path} are damaged, delete the file: {one_line(error)}") from error


def _write_stream(path: str, features: Features, batches: Iterator[pa.RecordBatch]) -> None:
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, features.arrow_schema) as writer:
        for batch in batches:
            writer.write_batch(batch)


def _has_its_end(path: Path) -> bool:
    """Whether an Arrow stream is there and closed. Cut between two batches it reads as one of fewer rows."""
    if not path.exists() or path.stat().st_size < len(_END_OF_STREAM):
        return False
    with path.open("rb") as file:
        file.seek(-len(_END_OF_STREAM), os.SEEK_END)
        return file.read() == _END_OF_STREAM


def _umask() -> int:
    mask = os.umask(0o077)  # the only way to learn it is to set it
    os.umask(mask)
    return mask


def batches_of(read: Callable[[], Iterator[Row]]) -> tuple[Features, Iterator[pa.RecordBatch]]:
    """Features and Arrow batches of the rows that `read` gives, which is called twice.

    Errors: those of `read`; ValueError without a row.
    """
    features, count = features_of(read())
    if not count:
        raise ValueError("the file holds no rows")
    return features, _batches(read(), features, features.arrow_schema)


def _batches(rows: Iterable[Row], features: Features, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    pending: list[Row] = []
    size = 0
    for row in rows:
        pending.append(row)
        size += sum(len(value) for value in row.values() if isinstance(value, (str, list)))
        if len(pending) == _ROWS_AT_ONCE or size > _CHARACTERS_AT_ONCE:
            yield _batch(pending, features, schema)
            pending, size = [], 0
    if pending:
        yield _batch(pending, features, schema)


def _batch(rows: list[Row], features: Features, schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for name, feature in features.items():
        values = [row.get(name) for row in rows]
        if isinstance(feature, Json):
            # Not the feature's own encoder: it takes the string "12" for the number.
            texts = [None if value is None else json.dumps(value, ensure_ascii=False) for value in values]
            arrays.append(pa.ExtensionArray.from_storage(pa.json_(), pa.array(texts, pa.string())))
        else:
            arrays.append(pa.array(values, schema.field(name).type))
    if not arrays:
        raise ValueError("the rows have no columns")
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def is_finite(value: Any) -> bool:
    """Whether a value holds no NaN and no infinity, at any depth."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(is_finite, value.values()))
    return not isinstance(value, list) or all(map(is_finite, value))


def python_rows(table: pa.Table, features: Features) -> list[Row]:
    """The rows of an Arrow table as Python values; of `Json` columns what was encoded, digit for digit.

    `Json` itself decodes with ujson, which reads 0.471 as 0.47100000000000003.
    """
    columns = {name: _decoded(table[name].to_pylist(), features[name]) for name in table.column_names}
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _decoded(values: list[Any], feature: Any) -> list[Any]:
    if not _holds_json(feature):
        return values
    return [_decoded_value(value, feature) for value in values]


def _decoded_value(value: Any, feature: Any) -> Any:
    if value is None:
        return None
    if isinstance(feature, Json):
        return json.loads(value)
    if isinstance(feature, dict):
        return {name: _decoded_value(value[name], part) for name, part in feature.items()}
    if hasattr(feature, "feature"):
        return [_decoded_value(item, feature.feature) for item in value]
    return value


def _holds_json(feature: Any) -> bool:
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    return isinstance(feature, Json) or (hasattr(feature, "feature") and _holds_json(feature.feature))
