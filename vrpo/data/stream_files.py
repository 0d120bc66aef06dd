"""A path, several paths or a hub name -> a stream of rows, read while they are used and never as a whole."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import IterableDataset

from vrpo.data import readers, table
from vrpo.data.files import (
    check_no_configuration,
    check_only_split,
    files_of_folder,
    formats_of,
    from_hub,
    has_configurations,
    is_saved,
    load_rows,
    named_paths,
    parquet_source,
)


def load_stream(
    name: str | Sequence[str], *, config: str | None = None, split: str = "train"
) -> IterableDataset:
    """The rows that `load_rows` gives, in the same order, one at a time; nothing is written to a cache.

    Args: as for `load_rows`; split: a name, without a slice.
    Errors: those of `load_rows`, of a file's contents when their turn comes.
    """
    if "[" in split:
        raise ValueError(f"split {split!r} of a stream has a slice, which needs the number of all rows")
    names, paths = named_paths(name)
    if len(paths) == 1 and not paths[0].exists():
        return from_hub(names[0], config, split, streaming=True)
    whole = [path for path in paths if path.is_dir() and (is_saved(path) or has_configurations(path))]
    if config is not None and len(paths) == 1 and paths[0].is_dir():
        whole = paths
    if whole:
        if len(paths) > 1:
            raise ValueError(
                f"dataset_name: {whole[0]} is a dataset with splits of its own and cannot be streamed "
                "together with others; give it alone, or its files"
            )
        if is_saved(paths[0]):  # mapped from the disk, not read
            return load_rows(names[0], split=split).to_iterable_dataset()
        return from_hub(str(paths[0].resolve()), config, split, streaming=True)
    check_no_configuration(config, names)
    if alone := [str(path) for path in paths if not path.is_dir()]:
        check_only_split(split, alone)
    files = [file for path in paths for file in (files_of_folder(path, split) if path.is_dir() else [path])]
    # Tuples: `datasets` would take lists apart into shards.
    arguments = {"paths": tuple(map(str, files)), "formats": tuple(formats_of(files))}
    return IterableDataset.from_generator(_rows, gen_kwargs=arguments)


def _rows(paths: Sequence[str], formats: Sequence[str]) -> Iterator[dict[str, Any]]:
    for path, format in zip(map(Path, paths), formats, strict=True):
        if format == "parquet":
            features, batches = parquet_source(path)
            for batch in batches:
                yield from table.python_rows(pa.Table.from_batches([batch]), features)
            continue
        for place, row in readers.read_rows(path, format):
            if not row:
                raise ValueError(f"{path}: {place} is an object without keys")
            yield row
