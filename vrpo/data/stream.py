"""A `datasets.IterableDataset` -> batches of prepared rows, pass after pass, without end.

A row is tokenised, checked and truncated when its turn comes, by the functions that prepare a whole dataset.
Its example id is its example_id, or its number in the stream as it came: both are fixed before rows are
shuffled and dealt to processes, so neither the shuffle nor the number of processes is in a mask.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from vrpo.data.budget import TokenBudget
from vrpo.data.containers import as_dataset
from vrpo.data.limits import Limits
from vrpo.data.rows import (
    PAIR_SIDES,
    WANTED_COLUMNS,
    apart,
    are_pairs,
    check_columns,
    id_columns,
    prepare_rows,
)
from vrpo.data.seen import SeenIds

logger = logging.get_logger(__name__)

Row = dict[str, Any]
_AT_ONCE = 32  # rows that are tokenised together
_HEAD = 64  # rows that say which stream it is
_LARGEST_EVALUATION = 100_000


@dataclass(frozen=True)
class Deal:
    """How the rows of a pass become batches.

    batch_size: examples of one process. process_index, num_processes: which process this is.
    seed, buffer_size: each row is drawn from the next buffer_size ones, otherwise in each pass; below 2, rows
        keep their order. drop_last: leave out the rows of a pass that fill no batch of all processes.
    """

    batch_size: int
    process_index: int = 0
    num_processes: int = 1
    seed: int = 0
    buffer_size: int = 0
    drop_last: bool = False


class RowStream(torch.utils.data.IterableDataset):
    """Batches, as lists of prepared rows with "epoch", the number of the pass, in each row, and "past".

    past is (before, after): digests of all rows that were given before this batch, and with it, the same in
    every process. A run that goes on compares them to know that it skipped what it was trained on.

    The last batch of a pass may be smaller; no batch is of two passes. Of every batch of all processes,
    batch_size * num_processes rows, each process gets its own part, the same rows whatever their number; only
    where there are fewer rows left than processes, the first ones of the pass fill up.

    Args:
        rows: the stream, whole in every process. It gives the same rows in the same order in each pass.
        tokenizer, sides, limits: as in preparing a dataset; budget: what an example may take.
        has_label: rows have a label (`prepare_labelled`); pairs without one are taken apart, and the two are
            neighbours in the stream.
        may_drop: whether rows that cannot be used are left out.
        on_drop: called in the first pass with (row number, reason) of each row that is.
    Errors: ValueError for missing columns or a stream without rows, at once; when its turn comes, for a row
        that cannot be used, with its number.
    """

    def __init__(
        self,
        rows: IterableDataset,
        tokenizer: PreTrainedTokenizerBase | None,
        sides: tuple[str, ...],
        limits: Limits,
        budget: TokenBudget,
        deal: Deal,
        *,
        has_label: bool = False,
        may_drop: bool = False,
        on_drop: Callable[[int, str], None] | None = None,
    ):
        self._rows = rows.with_format(None)
        self._limits, self._budget, self._deal = limits, budget, deal
        self._may_drop, self._on_drop = may_drop, None
        first = next(iter(self._rows), None)
        if first is None:
            raise ValueError("train_dataset is a stream without rows")
        self._is_apart = has_label and are_pairs(list(first))
        self._has_label = has_label and not self._is_apart
        self._sides = PAIR_SIDES if self._is_apart else sides
        self._columns = [name for name in wanted_columns(self._has_label) if name in first]
        is_tokenised = check_columns(list(first), self._sides, has_label=self._has_label)
        if not is_tokenised and tokenizer is None:
            raise ValueError("processing_class is None, but the dataset holds text; pass the tokenizer")
        self._tokenizer = None if is_tokenised else tokenizer
        self.digest = self._digest()
        self._on_drop = on_drop

    def _digest(self) -> str:
        """SHA-256 of the first prepared rows: what can be known of a stream without reading all of it."""
        head = list(itertools.islice(self._prepared(0), _HEAD))
        if not head:
            raise ValueError("drop_unusable_rows leaves no row of the stream")
        return hashlib.sha256(repr([sorted(row.items()) for row in head]).encode()).hexdigest()

    def __iter__(self) -> Iterator[list[Row]]:
        after = ""
        for epoch in itertools.count():
            part = None
            for whole, part in self._batches(epoch):
                before, after = after, _digest_of(after, whole)
                yield [row | {"epoch": epoch, "past": (before, after)} for row in part]
            if part is None:
                raise ValueError("the stream has no batch: it gave too few rows in a pass")

    def _batches(self, epoch: int) -> Iterator[tuple[list[Row], list[Row]]]:
        """Each batch of a pass, and this process's part of it."""
        deal = self._deal
        first: list[Row] = []
        rows = shuffled(self._prepared(epoch), deal.buffer_size, [deal.seed, epoch])
        while batch := list(itertools.islice(rows, deal.batch_size * deal.num_processes)):
            first = first or batch
            is_last = len(batch) < deal.batch_size * deal.num_processes
            if is_last and deal.drop_last:
                return
            whole, fill = list(batch), itertools.cycle(first)
            while len(batch) < deal.num_processes:
                batch.append(next(fill))
            start, stop = (
                len(batch) * index // deal.num_processes
                for index in (deal.process_index, deal.process_index + 1)
            )
            yield whole, batch[start:stop]

    def _prepared(self, epoch: int) -> Iterator[Row]:
        """The usable rows of a pass, in the order of the stream."""
        source, number, dropped = iter(self._rows), 0, 0
        seen = SeenIds() if epoch == 0 and "example_id" in self._columns else None
        while chunk := list(itertools.islice(source, _AT_ONCE)):
            columns = {name: [row.get(name) for row in chunk] for name in self._columns}
            numbers = list(range(number, number + len(chunk)))
            found = prepare_rows(
                columns,
                numbers,
                sides=self._sides,
                tokenizer=self._tokenizer,
                limits=self._limits,
                features=None,
                has_label=self._has_label,
            )
            for index, row_number in enumerate(numbers):
                for row, problem in self._examples(found, index):
                    if not problem:
                        if seen is not None and not seen.add(row["example_id"]):
                            raise ValueError(_repeats(row["example_id"], row_number))
                        yield row
                        continue
                    dropped += 1
                    self._drop(epoch, row_number, problem, dropped)
            number += len(chunk)

    def _examples(self, found: Mapping[str, list], index: int) -> Iterator[tuple[Row, str]]:
        """(example, why it cannot be used) of each example of a row."""
        names = ["example_id", *id_columns(self._sides), *(["label"] if self._has_label else [])]
        row = {name: found[name][index] for name in names}
        if problem := self._problem(found, index):
            yield row, problem
            return
        rows = [row]
        if self._is_apart:
            two = apart({name: [value] for name, value in row.items()})
            rows = [{name: values[side] for name, values in two.items()} for side in (0, 1)]
        for example in rows:
            yield example, self._too_long(example)

    def _problem(self, found: Mapping[str, list], index: int) -> str:
        if found["problem"][index]:
            if not self._may_drop:
                raise ValueError(
                    f"unusable row in the stream: {found['problem'][index]} (row "
                    f"{found['example_id'][index]}); drop_unusable_rows leaves such rows out"
                )
            return found["problem"][index]
        return "chosen and rejected are equal after truncation" if found["same"][index] else ""

    def _too_long(self, row: Row) -> str:
        prompt, *responses = (len(ids) for name, ids in row.items() if name.endswith("_ids"))
        tokens = int(self._budget.tokens(prompt, responses))
        if tokens <= self._budget.max_tokens_per_pack:
            return ""
        if not self._may_drop:
            raise ValueError(
                f"example {row['example_id']} of the stream is longer than the token budget: "
                f"{self._budget.told(tokens)}"
            )
        return f"longer than the token budget: {self._budget.told(tokens)}"

    def _drop(self, epoch: int, row: int, reason: str, count: int) -> None:
        if epoch or self._on_drop is None:
            return
        self._on_drop(row, reason)
        if count & (count - 1) == 0:  # at 1, 2, 4, 8, ...
            logger.warning(f"{count} of the first {row + 1} rows of the stream dropped; row {row}: {reason}")


def _repeats(example_id: int, row: int) -> str:
    return (
        f"example_id {example_id} repeats in row {row} of the stream: each row needs its own, because it "
        "decides the masks; without the column, rows are numbered"
    )


def _digest_of(before: str, rows: list[Row]) -> str:
    digest = hashlib.sha256(before.encode())
    for row in rows:
        for name, value in sorted(row.items()):
            digest.update(name.encode())
            digest.update(np.asarray(value, dtype=np.int64).tobytes())
    return digest.hexdigest()


def shuffled(rows: Iterator[Row], size: int, seed: list[int]) -> Iterator[Row]:
    """Each row drawn from a buffer of `size` rows, which the next one refills; below 2, the same order."""
    if size < 2:
        yield from rows
        return
    generator = np.random.default_rng(seed)
    buffer = list(itertools.islice(rows, size))
    for row in rows:
        index = int(generator.integers(size))
        yield buffer[index]
        buffer[index] = row
    for index in generator.permutation(len(buffer)).tolist():
        yield buffer[index]


def wanted_columns(has_label: bool) -> tuple[str, ...]:
    return (*WANTED_COLUMNS, "label") if has_label else WANTED_COLUMNS


def read_stream(data: IterableDataset, name: str, *, has_label: bool = False) -> Dataset:
    """All rows of a stream that training reads, in memory: an evaluation needs their number.

    Errors: ValueError beyond 100,000 rows, or without one.
    """
    rows = list(itertools.islice(data.with_format(None), _LARGEST_EVALUATION + 1))
    if len(rows) > _LARGEST_EVALUATION:
        raise ValueError(
            f"{name} is a stream of more than {_LARGEST_EVALUATION} rows, and an evaluation reads all of "
            "them; pass a part of it, such as stream.take(1000)"
        )
    wanted = wanted_columns(has_label)
    return as_dataset([{name: row[name] for name in wanted if name in row} for row in rows], name)


@dataclass(frozen=True)
class StreamCollator:
    """Rows of a RowStream -> what `collator` makes of them, and what the stream tells: epoch, past."""

    collator: Callable[[list[Row]], dict[str, Any]]

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        return {**self.collator(rows), "epoch": rows[0]["epoch"], "past": rows[0]["past"]}
