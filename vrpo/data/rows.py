"""Files and hub names -> rows -> checked, truncated token ids -> ResponseBatch.

No randomness and no masking here: which response tokens are masked is decided by `masking.py`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow.compute as compute
import torch
from datasets import Dataset, Features, List, Value, load_dataset
from transformers import PreTrainedTokenizerBase

from vrpo.batch import ResponseBatch
from vrpo.data.encode import RowProblem, encode_rows
from vrpo.data.limits import Limits, RowCounts, truncate

PAIR_SIDES = ("chosen", "rejected")
COMPLETION_SIDES = ("completion",)
SIDE_COLUMNS = ("chosen_ids", "rejected_ids", "completion_ids")
_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
_MAX_EXAMPLE_ID = 2**32 - 1
_ROWS_SHOWN = 5


@dataclass(frozen=True)
class DataReport:
    """What preparing a dataset changed. Counts of rows, responses or tokens; `str()` is one line to log.

    rows: rows read. kept: rows that remain.
    dropped_same: pairs whose sides became equal by truncation, and were dropped.
    prompts_truncated: rows whose prompt lost its beginning; responses_truncated: responses that lost
        their end (EOS included).
    prompt_tokens_cut, response_tokens_cut: tokens lost that way.
    boundaries_merged: rows in which the tokenizer joined the end of the prompt and a response's beginning.
    prompt_tokens, response_tokens: tokens that remain, summed over rows (a pair's prompt counts once).
    longest: tokens of the longest prompt + response that remains.
    """

    rows: int
    kept: int
    dropped_same: int
    prompts_truncated: int
    responses_truncated: int
    prompt_tokens_cut: int
    response_tokens_cut: int
    boundaries_merged: int
    prompt_tokens: int
    response_tokens: int
    longest: int

    @property
    def num_changed(self) -> int:
        """Rows and responses that were truncated, dropped or merged; 0 means nothing worth a warning."""
        return self.dropped_same + self.prompts_truncated + self.responses_truncated + self.boundaries_merged

    def __str__(self) -> str:
        told = [
            f"{self.kept} of {self.rows} rows, {self.prompt_tokens} prompt tokens, "
            f"{self.response_tokens} response tokens, longest sequence {self.longest}"
        ]
        if self.prompts_truncated:
            told.append(
                f"{self.prompts_truncated} prompts lost their beginning ({self.prompt_tokens_cut} tokens)"
            )
        if self.responses_truncated:
            told.append(
                f"{self.responses_truncated} responses lost their end ({self.response_tokens_cut} tokens)"
            )
        if self.dropped_same:
            told.append(f"{self.dropped_same} pairs dropped: equal after truncation")
        if self.boundaries_merged:
            told.append(f"{self.boundaries_merged} rows where prompt and response share a token")
        return "; ".join(told)


def load_rows(name: str, *, config: str | None = None, split: str = "train") -> Dataset:
    """Rows of a local file, a local dataset folder or a hub dataset.

    Args:
        name: path of a .jsonl, .json or .parquet file, or what `datasets.load_dataset` takes.
        config: configuration of a hub dataset.
        split: "train", "test[:100]", ...; of a file, only the slice matters.
    Errors: FileNotFoundError or ValueError saying what was looked for.
    """
    path = Path(name)
    if path.suffix in _READERS:
        if not path.is_file():
            raise FileNotFoundError(f"dataset {name!r}: no such file")
        files = {re.split(r"\W", split)[0]: str(path)}
        return load_dataset(_READERS[path.suffix], data_files=files, split=split)
    if path.is_file():
        raise ValueError(f"dataset {name!r}: expected a file ending in {', '.join(_READERS)}")
    try:
        return load_dataset(name, config, split=split)
    except (FileNotFoundError, ConnectionError) as error:
        raise FileNotFoundError(
            f"dataset {name!r}: neither a local file or folder nor a dataset of the hub ({error})"
        ) from error


def prepare_pairs(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> tuple[Dataset, DataReport]:
    """Preference rows -> columns prompt_ids, chosen_ids, rejected_ids (int32 lists) and example_id.

    Args:
        dataset: TRL's formats: chosen, rejected and an explicit or implicit prompt, as plain text or as
            messages; or token columns prompt_ids, chosen_ids, rejected_ids, which are taken as they are
            (no EOS is added). `encode.encode_rows` says how text becomes tokens.
        tokenizer: may be None where the dataset has token columns.
        options, where None leaves a check out:
            max_length, max_prompt_length: in tokens, see `limits.truncated_lengths`.
            vocab_size: rows of the model's embedding; ids must be below.
            num_proc: processes that tokenise.
    Returns: the dataset, rows in order, and what was truncated or dropped.
    Errors: ValueError naming the missing columns, or the unusable rows and what is wrong with each: empty
        prompt or response, equal sides, ids outside the embedding.
    """
    return _prepare(dataset, tokenizer, PAIR_SIDES, **options)


def prepare_completions(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase | None, **options: Any
) -> tuple[Dataset, DataReport]:
    """SFT rows -> columns prompt_ids, completion_ids (int32 lists) and example_id; as `prepare_pairs`.

    The columns are prompt and completion, or prompt_ids and completion_ids.
    """
    return _prepare(dataset, tokenizer, COMPLETION_SIDES, **options)


def check_token_budget(dataset: Dataset, num_samples: int, max_tokens_per_pack: int) -> None:
    """Raise unless every example of a prepared dataset fits into a pack, which never divides one.

        K * sum over its responses of (P + L) <= max_tokens_per_pack

    Errors: ValueError with the number of examples that do not fit, and the longest.
    """
    sides = [name for name in dataset.column_names if name in SIDE_COLUMNS]
    longest, longest_id, over = 0, 0, 0
    for table in dataset.with_format("arrow").iter(batch_size=10_000):
        prompt = compute.list_value_length(table["prompt_ids"]).to_numpy()
        tokens = sum(prompt + compute.list_value_length(table[side]).to_numpy() for side in sides)
        tokens *= num_samples
        over += int((tokens > max_tokens_per_pack).sum())
        if tokens.max() > longest:
            longest, longest_id = int(tokens.max()), table["example_id"][int(tokens.argmax())].as_py()
    if over:
        raise ValueError(
            f"{over} of {len(dataset)} examples are longer than the token budget, the longest is example "
            f"{longest_id}: its num_samples={num_samples} masked copies take {longest} tokens, but "
            f"max_tokens_per_pack={max_tokens_per_pack}; raise that, or lower max_length or num_samples"
        )


def _prepare(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None,
    sides: tuple[str, ...],
    *,
    max_length: int | None = None,
    max_prompt_length: int | None = None,
    vocab_size: int | None = None,
    num_proc: int | None = None,
) -> tuple[Dataset, DataReport]:
    """Encode, check, truncate; the arguments are explained at `prepare_pairs`."""
    if not isinstance(dataset, Dataset):
        raise ValueError(f"the dataset must be a datasets.Dataset, got {type(dataset).__name__}")
    limits = Limits(max_length, max_prompt_length, vocab_size)
    tokenised = _check_columns(dataset.column_names, sides)
    if not len(dataset):
        raise ValueError("the dataset has no rows")
    if not tokenised and tokenizer is None:
        raise ValueError("processing_class is None, but the dataset holds text; pass the tokenizer")
    counts = [field.name for field in fields(RowCounts)]
    ids = {name: List(Value("int32")) for name in _id_columns(sides)}
    numbers = {name: Value("int64") for name in ("example_id", *counts)}
    mapped = dataset.map(
        _prepare_rows,
        with_indices=True,
        batched=True,
        fn_kwargs={
            "sides": sides,
            "tokenizer": None if tokenised else tokenizer,
            "limits": limits,
        },
        remove_columns=dataset.column_names,
        features=Features({**ids, **numbers, "problem": Value("string")}),
        num_proc=num_proc,
        # The cache does not notice a new version of this package or an edited chat template on disk.
        load_from_cache_file=False,
        desc="Tokenising",
    )
    _raise_problems(mapped["problem"])
    totals = {name: torch.tensor(mapped[name][:]) for name in counts}
    same = totals.pop("same").bool()
    if same.any():
        mapped = mapped.select((~same).nonzero().flatten().tolist())
    if not len(mapped):
        raise ValueError(f"no pair is left: all are equal after truncation to max_length={max_length}")
    longest = int(totals.pop("longest")[~same].max())
    report = DataReport(
        rows=len(dataset),
        kept=len(mapped),
        dropped_same=int(same.sum()),
        longest=longest,
        **{name: int(count[~same].sum()) for name, count in totals.items()},
    )
    return mapped.remove_columns([*counts, "problem"]), report


def _prepare_rows(
    columns: dict[str, list],
    indices: list[int],
    *,
    sides: tuple[str, ...],
    tokenizer: PreTrainedTokenizerBase | None,
    limits: Limits,
) -> dict[str, list]:
    """A batch of rows for `Dataset.map`. Problems travel as a column, so that all of them can be named."""
    names = list(columns)
    rows = [dict(zip(names, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    encoded: list[Any] = rows if tokenizer is None else encode_rows(rows, sides, tokenizer)
    result: dict[str, list] = {name: [] for name in (*_id_columns(sides), "example_id", "problem")}
    result |= {field.name: [] for field in fields(RowCounts)}
    for row, item, index in zip(rows, encoded, indices, strict=True):
        example_id = row.get("example_id", index)
        try:
            if isinstance(item, RowProblem):
                raise item
            if not (isinstance(example_id, int) and 0 <= example_id <= _MAX_EXAMPLE_ID):
                raise RowProblem(f"example_id must be in [0, 2**32), got {example_id}")
            if tokenizer is None:
                prompt, merged = row["prompt_ids"] or [], False
                responses = [row[f"{side}_ids"] or [] for side in sides]
            else:
                prompt, responses, merged = item.prompt_ids, item.response_ids, item.merged
            kept, counts = truncate(prompt, responses, merged, sides, limits)
            problem = ""
        except RowProblem as error:
            kept, counts, problem = [[] for _ in (None, *sides)], RowCounts(), str(error)
            example_id = index
        for name, ids in zip(_id_columns(sides), kept, strict=True):
            result[name].append(ids)
        for field in fields(counts):
            result[field.name].append(int(getattr(counts, field.name)))
        result["example_id"].append(example_id)
        result["problem"].append(problem)
    return result


def _id_columns(sides: Sequence[str]) -> list[str]:
    return [f"{name}_ids" for name in ("prompt", *sides)]


def _check_columns(names: list[str], sides: tuple[str, ...]) -> bool:
    """Whether the dataset is tokenised already; ValueError if it has neither text nor token columns."""
    if set(_id_columns(sides)) <= set(names):
        return True
    text = {*sides} if sides == PAIR_SIDES else {"prompt", *sides}
    if missing := sorted(text - set(names)):
        prompt = "prompt (optional)" if sides == PAIR_SIDES else "prompt"
        raise ValueError(
            f"the dataset lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}: it has "
            f"{', '.join(names)}; needed are {prompt}, {', '.join(sides)}, or the token columns "
            f"{', '.join(_id_columns(sides))}"
        )
    return False


def _raise_problems(problem_by_row: Sequence[str]) -> None:
    rows_of: dict[str, list[int]] = {}
    for row, problem in enumerate(problem_by_row):
        if problem:
            rows_of.setdefault(problem, []).append(row)
    if not rows_of:
        return
    told = []
    for problem, rows in rows_of.items():
        shown = ", ".join(map(str, rows[:_ROWS_SHOWN]))
        more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
        told.append(f"{problem} (row{'s' * (len(rows) > 1)} {shown}{more})")
    shown = "; ".join(told[:_ROWS_SHOWN])
    more = f"; and {len(told) - _ROWS_SHOWN} more problems" if len(told) > _ROWS_SHOWN else ""
    raise ValueError(f"unusable rows in the dataset: {shown}{more}")


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
