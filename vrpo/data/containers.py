"""What a trainer is given as a dataset -> a `datasets.Dataset`; values of any library -> plain ones."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from vrpo.data import table
from vrpo.data.problems import one_line, shown
from vrpo.data.readers import check_name, check_value


def as_dataset(data: Any, name: str = "dataset") -> Dataset:
    """What a trainer got as a dataset, as a `datasets.Dataset` that gives plain Python values.

    Args: data: a Dataset, with or without a format (a transform stays); a list of rows, which are mappings;
        a DatasetDict of a single split. name: the argument that held it, for errors.
    Errors: ValueError saying what else it is and what to pass instead.
    """
    if isinstance(data, Dataset):
        return data if data.format["type"] in (None, "custom") else data.with_format(None)
    if isinstance(data, DatasetDict):
        if len(data) == 1:
            return as_dataset(next(iter(data.values())), name)
        raise ValueError(f"{name} is a DatasetDict of the splits {', '.join(data)}: pass one of them")
    if isinstance(data, (list, tuple)):
        return _from_list(list(data), name)
    kind = type(data).__name__
    if isinstance(data, (IterableDataset, IterableDatasetDict)):
        raise ValueError(
            f"{name} must be a datasets.Dataset, got {kind}: streams are not supported yet, because lengths "
            "and example ids are checked before training; load it without streaming=True"
        )
    cure = {"DataFrame": "Dataset.from_pandas(...)", "dict": "Dataset.from_dict(...)"}
    raise ValueError(
        f"{name} must be a datasets.Dataset, got {kind}; pass {cure.get(kind, 'one')} or a list of rows"
    )


def read_columns(dataset: Dataset, names: Sequence[str]) -> dict[str, list[Any]]:
    """The columns that the dataset has of these, as Python values; `datasets.Json` exactly as written."""
    names = [name for name in names if name in dataset.column_names]
    if not names:
        return {}
    chosen = dataset.with_format(None).select_columns(names)
    rows = table.python_rows(chosen.with_format("arrow")[:], chosen.features)
    return {name: [row[name] for row in rows] for name in names}


def _from_list(rows: list[Any], name: str) -> Dataset:
    if not rows:
        raise ValueError(f"{name} has no rows")
    found = []
    for index, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ValueError(f"{name}: row {index} must map column names to values, got {shown(row)}")
        try:
            found.append({str(key): plain(value) for key, value in row.items()})
            check_value(found[-1])
            for key in found[-1]:
                check_name(key, "column names")
            if not table.is_finite(found[-1]):
                raise ValueError("NaN and infinity are no data; use None")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{name}: row {index}: {one_line(error)}") from error
    if not any(found):
        raise ValueError(f"{name}: the rows have no columns")
    return table.in_memory(found)


def plain(value: Any, depth: int = 0) -> Any:
    """Plain Python values of what formats and transforms give: tensors, arrays, scalars, tuples."""
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return plain(value.tolist(), depth + 1)
    if isinstance(value, pa.Scalar):
        return value.as_py()
    if depth > 1000:
        raise ValueError("lists are nested in themselves")
    if isinstance(value, Mapping):
        return {str(key): plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, depth + 1) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"a {type(value).__name__} is neither text, number, list nor mapping: {shown(value)}")
