"""A path, several paths or a hub name -> rows. Which files are meant is decided here.

What a file holds decides what is loaded, never its name and time: the cache, in the folder of `datasets`,
goes by a hash of the content.
"""

import difflib
import gzip
import hashlib
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as parquet
from datasets import (
    Dataset,
    DatasetDict,
    Features,
    IterableDataset,
    ReadInstruction,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets import config as datasets_config
from datasets.table import table_cast
from transformers.utils import logging

from vrpo.data import readers, table
from vrpo.data.problems import one_line
from vrpo.data.readers import Row

logger = logging.get_logger(__name__)

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".tsv": "tsv"}
SUFFIXES = (*FORMATS, ".parquet")
_OTHER_SUFFIXES = (
    ".gz", ".bz2", ".xz", ".zst", ".zip", ".tar", ".txt", ".arrow", ".xlsx", ".yaml", ".yml",
    ".jsonlines", ".pkl",
)  # fmt: skip
ONLY_SPLIT = "train"
"""What all rows of data without splits are, as in `datasets`."""
_LAYOUT = 1  # of the cached files; to be raised when what the readers make of a file changes
_PARQUET_ROWS = 1000
_HUB_NAME = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?", re.ASCII)
_SPLITS = {
    "train": "train",
    "training": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "test": "test",
    "testing": "test",
    "eval": "test",
    "evaluation": "test",
}


def load_rows(name: str | Sequence[str], *, config: str | None = None, split: str = "train") -> Dataset:
    """Rows of local files or folders, or of a hub dataset.

    Args:
        name: a path, or several, whose rows follow one another. Files: .jsonl, .ndjson, .json (an array of
            objects, or objects), .csv, .tsv, .parquet, also as .gz. Folders: what `Dataset.save_to_disk`
            wrote, or data files, whose names tell their splits (train-00001.parquet, test/a.jsonl; all is
            "train" where no name does). Else the name of a hub dataset, which `datasets.load_dataset` loads.
        config: configuration of a hub dataset, or of a folder whose README.md names configurations.
        split: "train", "test[:100]", "train[:10%]", ...; files, and a saved `Dataset`, have one split,
            "train".
    Returns: strings stay strings, even where they look like dates or numbers; columns that hold messages,
        or values of several types, are `datasets.Json`.
    Errors: FileNotFoundError, OSError or ValueError of one line that names the file, its line and the cure.
    """
    names, paths = named_paths(name)
    if len(paths) == 1 and not paths[0].exists():
        return from_hub(names[0], config, split)
    if any(path.is_dir() for path in paths):
        if len(paths) == 1:
            return _from_folder(paths[0], config, split)
        parts = [load_rows(item, config=config, split=_split_name(split)) for item in names]
        return _sliced(_joined(parts, names), split)
    check_no_configuration(config, names)
    check_only_split(split, names)
    return _sliced(_from_files(paths), split)


def named_paths(name: str | Sequence[str]) -> tuple[list[str], list[Path]]:
    """The names and their paths. Errors: ValueError or FileNotFoundError, unless one may be a hub name."""
    names = [name] if isinstance(name, str) else list(name)
    if not names or not all(isinstance(item, str) and item.strip() for item in names):
        raise ValueError(f"dataset_name must be a path, a hub name, or a list of paths, got {name!r}")
    paths = [Path(item).expanduser() for item in names]
    for item, path in zip(names, paths, strict=True):
        if not path.exists() and (len(names) > 1 or _looks_like_a_path(item)):
            raise FileNotFoundError(_not_found(item, path))
    return names, paths


def check_no_configuration(config: str | None, names: Sequence[str]) -> None:
    if config is not None:
        raise ValueError(f"dataset_config={config!r} belongs to a hub name or a folder; {names[0]} is a file")


def check_only_split(split: str, names: Sequence[str], what: str = "a file") -> None:
    """ValueError for a split of what has none: its rows would pass for those of another split."""
    name = _split_name(split)
    if name != ONLY_SPLIT:
        raise ValueError(
            f"dataset {', '.join(names)}: {what} has no splits but {ONLY_SPLIT!r}, got {split!r}; give the "
            f"data of that split by its own name, or a slice such as {ONLY_SPLIT}[:100]"
        )


def _looks_like_a_path(name: str) -> bool:
    """Whether nobody can mean a dataset of the hub, whose names are `name` or `owner/name`."""
    return (
        name.lower().endswith((*SUFFIXES, *_OTHER_SUFFIXES))
        or name.startswith((".", "~", "/"))
        or not _HUB_NAME.fullmatch(name)
        or ("/" in name and Path(name).parent.exists())
    )


def _not_found(name: str, path: Path) -> str:
    """What is missing, from the first part of the path that is, and what is there of a similar name."""
    if "://" in name:
        return f"dataset {name!r}: URLs are not read; download the file, or give a hub name"
    told = f"dataset {name!r}: no such file or folder"
    if "\\" in name:
        slashed = name.replace("\\", "/")
        return (
            f"{told}; did you mean {slashed}?" if Path(slashed).exists() else f"{told}; separate folders by /"
        )
    missing = _first_missing(path)
    if missing != path:
        told += f" (there is no folder {str(missing)!r})"
    if close := _close_matches(path):
        told += f"; did you mean {' or '.join(map(str, close))}?"
    elif re.search(r"[*?\[]", name):
        told += "; patterns are not expanded here, list the files"
    return told


def _first_missing(path: Path) -> Path:
    while path.parent != path and not path.parent.exists():
        path = path.parent
    return path


def _close_matches(path: Path) -> list[Path]:
    """What is there of a similar name as the first part of the path that is missing."""
    missing = _first_missing(path)
    try:
        there = sorted(item.name for item in missing.parent.iterdir())
    except OSError:
        return []
    found = [missing.parent / match for match in difflib.get_close_matches(missing.name, there, n=3)]
    rest = path.relative_to(missing)
    return [item / rest if (item / rest).exists() else item for item in found]


def from_hub(
    name: str, config: str | None, split: str, *, streaming: bool = False
) -> Dataset | IterableDataset:
    try:
        return load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # its errors are of a dozen types, from httpx's to its own
        if Path(name).exists():
            raise ValueError(f"dataset {name!r} cannot be loaded: {one_line(error, 400)}") from error
        close = _close_matches(Path(name))
        near = f" (did you mean {' or '.join(map(str, close))}?)" if close else ""
        kind = ValueError if isinstance(error, ValueError) else FileNotFoundError
        raise kind(
            f"dataset {name!r}: there is no such file or folder{near}, and as a dataset of the hub it cannot "
            f"be loaded: {one_line(error, 400)}"
        ) from error


def _from_folder(path: Path, config: str | None, split: str) -> Dataset:
    if is_saved(path):
        return _saved(path, split)
    if config is not None or has_configurations(path):
        return from_hub(str(path.resolve()), config, split)
    return _sliced(_from_files(files_of_folder(path, split)), split)


def is_saved(path: Path) -> bool:
    """Whether a folder is what `Dataset.save_to_disk` wrote."""
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def files_of_folder(path: Path, split: str) -> list[Path]:
    """The data files of a split, whose names tell it."""
    files = sorted(item for item in path.rglob("*") if item.is_file() and _format(item) is not None)
    files = [item for item in files if not any(part.startswith(".") for part in item.relative_to(path).parts)]
    if not files:
        raise FileNotFoundError(
            f"dataset {str(path)!r}: the folder holds no file ending in {', '.join(SUFFIXES)}"
        )
    by_split: dict[str, list[Path]] = {}
    for item in files:
        by_split.setdefault(_split_of(item.relative_to(path)), []).append(item)
    if set(by_split) == {""}:
        by_split = {"train": files}
    if left_out := by_split.pop("", []):
        names = ", ".join(str(item.relative_to(path)) for item in left_out)
        logger.warning(f"dataset {str(path)!r}: names tell the splits here, and left out are {names}")
    wanted = re.split(r"\W", split)[0]
    if wanted not in by_split:
        raise ValueError(f"dataset {str(path)!r}: there is no split {wanted!r}, only {', '.join(by_split)}")
    return by_split[wanted]


def has_configurations(path: Path) -> bool:
    card = path / "README.md"
    return card.is_file() and re.search(r"^configs:", card.read_text(errors="replace"), re.M) is not None


def _saved(path: Path, split: str) -> Dataset:
    try:
        saved = load_from_disk(str(path))
    except Exception as error:
        raise ValueError(
            f"dataset {str(path)!r} was saved by `datasets` and cannot be read: {one_line(error)}"
        ) from (error)
    if isinstance(saved, DatasetDict):
        wanted = re.split(r"\W", split)[0]
        if wanted not in saved:
            raise ValueError(f"dataset {str(path)!r}: there is no split {wanted!r}, only {', '.join(saved)}")
        saved = saved[wanted]
    else:
        check_only_split(split, [str(path)], "a saved Dataset")
    return _sliced(saved, split)


def _split_of(path: Path) -> str:
    """The split that a name tells, from the last part of the path to the first; "" if none does."""
    for part in reversed(path.parts):
        for word in re.split(r"[-._ 0-9]+", part.lower()):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _format(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    last = suffixes[-1] if suffixes else ""
    return "parquet" if last == ".parquet" else FORMATS.get(last)


def formats_of(paths: Sequence[Path]) -> list[str]:
    """By the names. Errors: ValueError for what is no data file."""
    formats = [_format(path) for path in paths]
    for path, format in zip(paths, formats, strict=True):
        if not path.is_file():
            raise ValueError(f"dataset {str(path)!r}: not a regular file")
        if format is None:
            raise ValueError(
                f"dataset {str(path)!r}: expected a file ending in {', '.join(SUFFIXES)}, also with .gz"
            )
    return formats


def _from_files(paths: Sequence[Path]) -> Dataset:
    formats = formats_of(paths)
    kinds = {format == "parquet" for format in formats}
    if len(kinds) > 1:
        return _joined([_from_files([path]) for path in paths], [str(path) for path in paths])
    if kinds == {True}:
        parts = [table.on_disk(_cached([path]), lambda path=path: parquet_source(path)) for path in paths]
        return _joined(parts, [str(path) for path in paths])

    return table.on_disk(_cached(paths), lambda: _text_source(paths, formats))


def _text_source(paths: Sequence[Path], formats: Sequence[str]) -> tuple[Features, Iterator[pa.RecordBatch]]:
    def rows() -> Iterator[Row]:
        for path, format in zip(paths, formats, strict=True):
            for place, row in readers.read_rows(path, format):
                if not row:
                    raise ValueError(f"{path}: {place} is an object without keys")
                yield row

    try:
        return table.batches_of(rows)
    except ValueError as error:
        if str(error) == "the file holds no rows":
            raise ValueError(f"{', '.join(map(str, paths))}: the file holds no rows") from error
        raise


def _cached(paths: Sequence[Path]) -> Path:
    content = hashlib.blake2b(f"{_LAYOUT}".encode(), digest_size=20)
    for path in paths:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "blake2b").hexdigest()
        content.update(f"{_format(path)} {path.suffix.lower() == '.gz'} {digest};".encode())
    return Path(datasets_config.HF_DATASETS_CACHE) / "vrpo" / f"{content.hexdigest()}.arrow"


def parquet_source(path: Path) -> tuple[Features, Iterator[pa.RecordBatch]]:
    try:
        packed = path.suffix.lower() == ".gz"
        source = pa.BufferReader(gzip.decompress(path.read_bytes())) if packed else str(path)
        file = parquet.ParquetFile(source)
        plain = [
            field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field
            for field in file.schema_arrow
        ]
        schema = pa.schema(plain, metadata=file.schema_arrow.metadata)
        if len(set(schema.names)) < len(schema.names):
            raise ValueError("two columns have the same name")
        features = Features.from_arrow_schema(schema)
    except (ValueError, OSError, EOFError, zlib.error, pa.ArrowException) as error:
        raise ValueError(f"{path}: not a Parquet file that can be read: {one_line(error)}") from error
    if not file.metadata.num_rows:
        raise ValueError(f"{path}: the file holds no rows")
    return features, _parquet_batches(path, file, features)


def _parquet_batches(path: Path, file: parquet.ParquetFile, features: Features) -> Iterator[pa.RecordBatch]:
    schema = features.arrow_schema
    missing = file.metadata.num_rows
    try:
        for batch in file.iter_batches(_PARQUET_ROWS):
            batch.validate(full=True)  # else text that is no UTF-8 fails wherever it is read first
            missing -= len(batch)
            yield from table_cast(pa.Table.from_batches([batch]), schema).to_batches()
        if missing:
            raise ValueError(f"{missing} rows are missing")
    except (ValueError, OSError, pa.ArrowException) as error:
        raise ValueError(f"{path}: the Parquet file is damaged: {one_line(error)}; fetch it again") from error


def _joined(parts: Sequence[Dataset], names: Sequence[str]) -> Dataset:
    if len(parts) == 1:
        return parts[0]
    try:
        return concatenate_datasets(list(parts))
    except (ValueError, TypeError, pa.ArrowInvalid) as error:
        raise ValueError(f"the rows of {', '.join(names)} do not go together: {one_line(error)}") from error


def _split_name(split: str) -> str:
    return re.split(r"\W", split)[0]


def _sliced(rows: Dataset, split: str) -> Dataset:
    name = _split_name(split)
    try:
        [instruction] = ReadInstruction.from_spec(split).to_absolute({name: len(rows)})
    except (ValueError, AssertionError, KeyError) as error:
        raise ValueError(
            f"split {split!r} cannot be read: {one_line(error)}; write train[:100] or train[:10%]"
        ) from (error)
    start, stop, _ = slice(instruction.from_, instruction.to).indices(len(rows))
    if start >= stop:
        raise ValueError(f"split {split!r} selects none of {len(rows)} rows")
    return rows if (start, stop) == (0, len(rows)) else rows.select(range(start, stop))
