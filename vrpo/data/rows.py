"""Rows of any accepted shape -> checked, truncated token ids -> ResponseBatch.

No randomness and no masking here: which response tokens are masked is decided by `estimator/masking.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as compute
import torch
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase

from vrpo.batch import ResponseBatch
from vrpo.data import table
from vrpo.data.budget import SIDE_COLUMNS
from vrpo.data.containers import as_dataset, plain
from vrpo.data.encode import encode_rows
from vrpo.data.formats import EXTRA_COLUMNS, MESSAGES_COLUMNS
from vrpo.data.limits import Limits, RowCounts, truncate
from vrpo.data.problems import RowProblem, raise_problems, shown, told_problems
from vrpo.data.report import DataReport

PAIR_SIDES = ("chosen", "rejected")
COMPLETION_SIDES = ("completion",)
WANTED_COLUMNS = tuple(
    dict.fromkeys(
        (
            *("example_id", "prompt", *PAIR_SIDES, *COMPLETION_SIDES, *EXTRA_COLUMNS, *MESSAGES_COLUMNS),
            *("prompt_ids", *SIDE_COLUMNS),
        )
    )
)
"""All columns that are ever read, but for the label of unpaired data."""
_MAX_EXAMPLE_ID = 2**32 - 1
_STAMP = "prepared by vrpo with "


def prepare_pairs(
    dataset: Dataset | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> tuple[Dataset, DataReport]:
    """Preference rows -> columns prompt_ids, chosen_ids, rejected_ids (int32 lists) and example_id.

    Args:
        dataset: what `as_dataset` takes, in TRL's formats: chosen, rejected and an explicit or implicit
            prompt, as plain text or as messages, row by row (`formats.example`); "tools" and
            "chat_template_kwargs" for the chat template; or token columns prompt_ids, chosen_ids,
            rejected_ids, which are taken as they are (no EOS is added). `encode.encode_rows` says how text
            becomes tokens. "example_id", an integer per row, none twice, decides the masks of a row; without
            it, it is the row's number.
        tokenizer: may be None where the dataset has token columns.
        options, where None leaves a check out:
            max_length, max_prompt_length: in tokens, see `limits.truncated_lengths`.
            max_positions: positions of the model; a row that is longer, truncated, is an error.
            vocab_size: rows of the model's embedding; ids must be below.
            mask_token_id: may not stand in the data. None: the tokenizer's.
            num_proc: processes that tokenise.
            drop_unusable_rows: leave rows that cannot be used out, and list them in the report, instead of
            raising.
    Returns: the dataset, rows in order, and what was truncated or dropped. A dataset that was prepared with
        the same options comes back as it is.
    Errors: ValueError naming the missing columns, or the unusable rows and what is wrong with each, or
        saying that no row is left.
    """
    return _prepare(dataset, tokenizer, PAIR_SIDES, **options)


def prepare_completions(
    dataset: Dataset | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> tuple[Dataset, DataReport]:
    """SFT rows -> columns prompt_ids, completion_ids (int32 lists) and example_id; as `prepare_pairs`.

    The columns are prompt and completion; or messages, of which the last one is the completion and the rest
    the prompt; or prompt_ids and completion_ids.
    """
    return _prepare(dataset, tokenizer, COMPLETION_SIDES, **options)


def prepare_labelled(
    dataset: Dataset | Sequence[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> tuple[Dataset, DataReport]:
    """Unpaired preferences -> the columns of `prepare_completions` and label (1 desirable, 0 undesirable).

    The columns are those of `prepare_completions` and label, true or false, as in TRL. Pairs without a label
    are taken apart: each becomes two rows, the chosen one desirable, with example_id 2 i and 2 i + 1.
    """
    dataset = as_dataset(dataset)
    columns = (
        list(dataset[0]) if dataset.format["type"] == "custom" and len(dataset) else dataset.column_names
    )
    if are_pairs(columns):
        pairs, report = prepare_pairs(dataset, tokenizer, **options)
        return _unpaired(pairs), replace(report, examples_per_row=len(PAIR_SIDES))
    return _prepare(dataset, tokenizer, COMPLETION_SIDES, has_label=True, **options)


def are_pairs(columns: Sequence[str]) -> bool:
    """Whether unpaired data with these columns are pairs, to be taken apart."""
    return "label" not in columns and any(
        {*sides} <= {*columns} for sides in (PAIR_SIDES, id_columns(PAIR_SIDES))
    )


def apart(rows: Mapping[str, list]) -> dict[str, list]:
    """Prepared pairs -> two labelled rows each. Errors: ValueError for an example_id that has no double."""
    largest = max(rows["example_id"], default=0)
    if 2 * largest + 1 > _MAX_EXAMPLE_ID:
        raise ValueError(f"example_id must be below 2**31 where pairs are taken apart, got {largest}")
    sides = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    return {
        "prompt_ids": [prompt for prompt in rows["prompt_ids"] for _ in PAIR_SIDES],
        "completion_ids": [completion for pair in sides for completion in pair],
        "example_id": [2 * i + side for i in rows["example_id"] for side in (0, 1)],
        "label": [label for _ in rows["example_id"] for label in (1, 0)],
    }


def _unpaired(pairs: Dataset) -> Dataset:
    ids_type = List(Value("int32"))
    features = {"prompt_ids": ids_type, "completion_ids": ids_type}
    features |= {"example_id": Value("int64"), "label": Value("int64")}
    apart_rows = pairs.map(
        apart,
        batched=True,
        remove_columns=pairs.column_names,
        features=Features(features),
        load_from_cache_file=False,
        desc="Unpairing",
    )
    apart_rows.info.description = pairs.info.description
    return apart_rows


def _prepare(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase | None,
    sides: tuple[str, ...],
    *,
    has_label: bool = False,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    max_positions: int | None = None,
    vocab_size: int | None = None,
    mask_token_id: int | None = None,
    num_proc: int | None = None,
    drop_unusable_rows: bool = False,
) -> tuple[Dataset, DataReport]:
    """Encode, check, truncate; the arguments are explained at `prepare_pairs`."""
    dataset = as_dataset(dataset)
    if mask_token_id is None and tokenizer is not None:
        mask_token_id = tokenizer.mask_token_id
    limits = Limits(max_length, max_prompt_length, max_positions, vocab_size, mask_token_id)
    stamp = f"{_STAMP}{limits}"
    if dataset.info.description == stamp:
        return dataset, _report_of_prepared(dataset, sides, has_label)
    if not len(dataset):
        raise ValueError("the dataset has no rows")
    has_transform = dataset.format["type"] == "custom"
    columns = list(dataset[0]) if has_transform else dataset.column_names
    tokenised = check_columns(columns, sides, has_label=has_label)
    if not tokenised and tokenizer is None:
        raise ValueError("processing_class is None, but the dataset holds text; pass the tokenizer")
    mapped = _mapped(dataset, None if tokenised else tokenizer, sides, limits, num_proc, has_label)
    unusable = _unusable(mapped, drop_unusable_rows)
    if unusable:
        mapped = without(mapped, [row for row, _ in unusable])
    if "example_id" in columns:
        _check_unique(mapped, np.delete(np.arange(len(dataset)), [row for row, _ in unusable]))
    counts = [field.name for field in fields(RowCounts)]
    totals = {name: torch.tensor(mapped[name][:]) for name in counts}
    same = totals.pop("same").bool()
    if same.any():
        mapped = without(mapped, same.nonzero().flatten().tolist())
    if not len(mapped):
        raise ValueError(f"no pair is left: all are equal after truncation to max_length={max_length}")
    longest = int(totals.pop("longest")[~same].max())
    report = DataReport(
        rows=len(dataset),
        kept=len(mapped),
        dropped_same=int(same.sum()),
        longest=longest,
        unusable=tuple(unusable),
        **{name: int(count[~same].sum()) for name, count in totals.items()},
    )
    mapped = mapped.remove_columns([*counts, "problem"])
    mapped.info.description = stamp
    return mapped, report


def _unusable(mapped: Dataset, may_drop: bool) -> list[tuple[int, str]]:
    """(row, problem) of the rows that cannot be used; ValueError if they may not be dropped, or are all."""
    problems = mapped["problem"][:]
    if not may_drop:
        raise_problems(problems)
    found = [(row, problem) for row, problem in enumerate(problems) if problem]
    if len(found) == len(problems):
        raise ValueError(
            f"drop_unusable_rows leaves none of the {len(problems)} rows: {told_problems(found)}"
        )
    return found


def without(dataset: Dataset, rows: Sequence[int]) -> Dataset:
    """The dataset but for these rows."""
    return dataset.select(np.delete(np.arange(len(dataset)), rows))


def _mapped(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    sides: tuple[str, ...],
    limits: Limits,
    num_proc: int | None,
    has_label: bool,
) -> Dataset:
    """The token columns, the counts and the problem of each row."""
    wanted = {"example_id", "label"} if has_label else {"example_id"}
    if tokenizer is None:
        wanted |= {*id_columns(sides)}
    else:
        wanted |= {"prompt", *sides, *EXTRA_COLUMNS, *MESSAGES_COLUMNS}
    features = None
    if dataset.format["type"] != "custom":
        # Only what is read: other columns may need packages to be decoded, as images do.
        dataset = dataset.select_columns([name for name in dataset.column_names if name in wanted])
        features = dataset.features
        dataset = dataset.with_format("arrow")
    ids = {name: List(Value("int32")) for name in id_columns(sides)}
    numbers = ["example_id", *(field.name for field in fields(RowCounts)), *(["label"] if has_label else [])]
    mapped = dataset.map(
        prepare_rows,
        with_indices=True,
        batched=True,
        fn_kwargs={
            "sides": sides,
            "tokenizer": tokenizer,
            "limits": limits,
            "features": features,
            "has_label": has_label,
        },
        remove_columns=dataset.column_names,
        features=Features({**ids, **dict.fromkeys(numbers, Value("int64")), "problem": Value("string")}),
        num_proc=num_proc,
        # The cache does not notice a new version of this package or an edited chat template on disk.
        load_from_cache_file=False,
        desc="Tokenising",
    )
    return mapped.with_format(None)


def prepare_rows(
    columns: pa.Table | Mapping[str, Sequence[Any]],
    indices: list[int],
    *,
    sides: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
    features: Features | None,
    has_label: bool = False,
) -> dict[str, list]:
    """A batch of rows for `Dataset.map`. Problems travel as a column, so that all of them can be named."""
    rows = list(_rows(columns, features))
    good = [row for row in rows if not isinstance(row, RowProblem)]
    encoded = iter(good if tokenizer is None else encode_rows(good, sides, tokenizer))
    result: dict[str, list] = {name: [] for name in (*id_columns(sides), "example_id", "problem")}
    result |= {field.name: [] for field in fields(RowCounts)}
    if has_label:
        result["label"] = []
    for row, index in zip(rows, indices, strict=True):
        try:
            item = row if isinstance(row, RowProblem) else next(encoded)
            if isinstance(item, RowProblem):
                raise item
            example_id, label = _example_id(row, index), _label(row) if has_label else 0
            if tokenizer is None:
                pieces = [row[name] for name in id_columns(sides)]
                kept, counts = truncate(*_split_tokens(pieces, sides), sides, limits)
            else:
                kept, counts = truncate(item.prompt_ids, item.response_ids, sides, limits, item)
            problem = ""
        except RowProblem as error:
            kept, counts, problem = [[] for _ in (None, *sides)], RowCounts(), str(error)
            example_id, label = index, 0
        for name, ids in zip(id_columns(sides), kept, strict=True):
            result[name].append(ids)
        for field in fields(counts):
            result[field.name].append(int(getattr(counts, field.name)))
        result["example_id"].append(example_id)
        if has_label:
            result["label"].append(label)
        result["problem"].append(problem)
    return result


def _rows(
    columns: pa.Table | Mapping[str, Sequence[Any]], features: Features | None
) -> Iterator[Mapping[str, Any] | RowProblem]:
    if features is not None:
        yield from table.python_rows(columns, features)
        return
    names = list(columns)
    for values in zip(*columns.values(), strict=True):
        try:
            yield {name: plain(value) for name, value in zip(names, values, strict=True)}
        except ValueError as error:
            yield RowProblem(str(error))


def _example_id(row: Mapping[str, Any], index: int) -> int:
    example_id = row.get("example_id", index)
    if type(example_id) is not int or not 0 <= example_id <= _MAX_EXAMPLE_ID:
        raise RowProblem(f"example_id must be in [0, 2**32), an integer, got {shown(example_id)}")
    return example_id


def _label(row: Mapping[str, Any]) -> int:
    label = row.get("label")
    if type(label) not in (bool, int) or label not in (0, 1):
        raise RowProblem(f"label must be true or false, got {shown(label)}")
    return int(label)


def _split_tokens(pieces: list[Any], sides: tuple[str, ...]) -> tuple[list[int], list[list[int]]]:
    for name, ids in zip(id_columns(sides), pieces, strict=True):
        if ids is None or ids == []:
            raise RowProblem(f"{name.removesuffix('_ids')} has no tokens")
        if not isinstance(ids, list) or set(map(type, ids)) != {int}:
            wrong = ids if not isinstance(ids, list) else next(i for i in ids if type(i) is not int)
            raise RowProblem(f"{name} must be a list of integers, got {shown(wrong)}")
    return pieces[0], pieces[1:]


def _check_unique(mapped: Dataset, rows: np.ndarray) -> None:
    """ValueError if an example_id stands twice; `rows`: the numbers that the rows of `mapped` had."""
    ids = np.asarray(mapped["example_id"][:])
    _, first, inverse = np.unique(ids, return_index=True, return_inverse=True)
    again = np.flatnonzero(first[inverse] != np.arange(len(ids)))
    if len(again):
        index = int(again[0])
        raise ValueError(
            f"example_id {ids[index]} stands in rows {rows[first[inverse[index]]]} and {rows[index]}, and "
            f"{len(again)} rows in all repeat one: each needs its own, because it decides the masks; without "
            "the column, rows are numbered"
        )


def _report_of_prepared(dataset: Dataset, sides: tuple[str, ...], has_label: bool = False) -> DataReport:
    names = id_columns(sides)
    needed = [*names, "label"] if has_label else names
    if missing := [name for name in needed if name not in dataset.column_names]:
        raise ValueError(f"the dataset was prepared for another trainer: it lacks {', '.join(missing)}")
    lengths = {name: [np.zeros(0, dtype=np.int64)] for name in names}
    for part in dataset.with_format("arrow").iter(batch_size=10_000):
        for name in names:
            lengths[name].append(compute.list_value_length(part[name]).to_numpy())
    prompt, *responses = (np.concatenate(lengths[name]) for name in names)
    longest = max((int((prompt + response).max(initial=0)) for response in responses), default=0)
    return DataReport(
        rows=len(dataset),
        kept=len(dataset),
        dropped_same=0,
        prompts_truncated=0,
        responses_truncated=0,
        prompt_tokens_cut=0,
        response_tokens_cut=0,
        boundaries_merged=0,
        prompt_tokens=int(prompt.sum()),
        response_tokens=int(sum(response.sum() for response in responses)),
        longest=longest,
    )


def id_columns(sides: Sequence[str]) -> list[str]:
    return [f"{name}_ids" for name in ("prompt", *sides)]


def check_columns(names: list[str], sides: tuple[str, ...], *, has_label: bool = False) -> bool:
    """Whether the dataset is tokenised already; ValueError if it lacks text and token columns, or labels."""
    is_tokenised = _are_tokens(names, sides)
    if has_label and "label" not in names:
        raise ValueError(
            f"the dataset lacks the column label, true for a desirable completion and false for another: it "
            f"has {', '.join(names)}; pairs (chosen, rejected) need none"
        )
    return is_tokenised


def _are_tokens(names: list[str], sides: tuple[str, ...]) -> bool:
    if set(id_columns(sides)) <= set(names):
        return True
    is_pairs = sides == PAIR_SIDES
    if not is_pairs and set(MESSAGES_COLUMNS) & set(names):
        return False
    text = {*sides} if is_pairs else {"prompt", *sides}
    if missing := sorted(text - set(names)):
        prompt = "prompt (optional)" if is_pairs else "prompt"
        also = "" if is_pairs else "or messages, "
        why = ""
        if "text" in names and not is_pairs:
            why = "; a text alone does not say where the response begins, and only responses are masked"
        raise ValueError(
            f"the dataset lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: it has "
            f"{', '.join(names)}; needed are {prompt}, {', '.join(sides)}, {also}or the token columns "
            f"{', '.join(id_columns(sides))}{why}"
        )
    return False


@dataclass(frozen=True)
class PairCollator:
    """Prepared preference rows -> {"example_id": (B,) int64, "responses": ResponseBatch with R = 2B}."""

    sides: tuple[str, ...] = PAIR_SIDES

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        prompts = [row["prompt_ids"] for row in rows for _ in self.sides]
        responses = [row[f"{side}_ids"] for row in rows for side in self.sides]
        example_B = torch.tensor([row["example_id"] for row in rows], dtype=torch.int64)
        pieces = [ids for pair in zip(prompts, responses, strict=True) for ids in pair]
        batch = ResponseBatch(
            tokens_U=torch.tensor([token for ids in pieces for token in ids], dtype=torch.int64),
            prompt_length_R=torch.tensor([len(ids) for ids in prompts], dtype=torch.int64),
            response_length_R=torch.tensor([len(ids) for ids in responses], dtype=torch.int64),
            example_R=example_B.repeat_interleave(len(self.sides)),
            side_R=torch.arange(len(self.sides)).repeat(len(rows)),
            num_sides=len(self.sides),
        )
        # accelerate reads the batch size from the first entry, which therefore has to be a tensor.
        return {"example_id": example_B, "responses": batch}


@dataclass(frozen=True)
class CompletionCollator(PairCollator):
    """Prepared SFT rows -> the same, with one response per example (R = B)."""

    sides: tuple[str, ...] = COMPLETION_SIDES


@dataclass(frozen=True)
class LabelledCollator(CompletionCollator):
    """Prepared labelled rows -> the same; side_R is 0 for a desirable and 1 for an undesirable response."""

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        inputs = super().__call__(rows)
        side_R = 1 - torch.tensor([row["label"] for row in rows], dtype=torch.int64)
        return {**inputs, "responses": replace(inputs["responses"], side_R=side_R)}
