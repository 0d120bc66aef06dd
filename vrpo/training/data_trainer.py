"""DataTrainer: what a trainer's datasets become before a step: token ids, checked, within the budget."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from vrpo import data
from vrpo.data import DataReport, TokenBudget
from vrpo.data.containers import as_dataset
from vrpo.data.limits import Limits
from vrpo.data.stream import Deal, RowStream, StreamCollator, read_stream
from vrpo.models import max_positions
from vrpo.training.checkpoint_trainer import CheckpointTrainer
from vrpo.training.config import DiffusionConfig
from vrpo.training.dropped import DroppedRows
from vrpo.training.no_effect import OF_STREAMS, check_effects

logger = logging.get_logger(__name__)

STREAM_FILE = "vrpo_stream.json"


def _add_dropped(dropped: DroppedRows, row: int, reason: str) -> None:
    dropped.add("train", [(row, reason)])


class DataTrainer(CheckpointTrainer):
    """Prepares datasets, those of the constructor and those that an evaluation is given.

    A subclass sets `args`, `mask_token_id`, `gradient_mode`, `dropped_rows` and `data_reports`, by split,
    before the first one.
    """

    args: DiffusionConfig
    mask_token_id: int
    gradient_mode: str
    dropped_rows: DroppedRows
    data_reports: dict[str, DataReport]
    prepare_dataset: Callable
    stream_sides: tuple[str, ...] | None = None
    """The responses of a row of a stream; None where the trainer reads no streams."""
    has_label = False
    _pass: int | None = None
    _past: str | None = None
    _wanted_past: str | None = None

    def _prepare_each(self, dataset, tokenizer, model):
        """A dataset, or each of a dict of them."""
        if not isinstance(dataset, dict):
            return self._prepare(dataset, tokenizer, model, "eval")
        return {name: self._prepare(part, tokenizer, model, f"eval {name}") for name, part in dataset.items()}

    def _prepare(self, dataset, tokenizer, model, split):
        """Rows as token ids, checked; what is prepared already comes back as it is."""
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            raise ValueError(
                f"the {split} dataset is a dict of {sorted(dataset)}: pass one of them, such as "
                f"dataset[{sorted(dataset)[-1]!r}]"
            )
        what, _, part = split.partition(" ")
        name = f"{what}_dataset[{part!r}]" if part else f"{what}_dataset"
        if isinstance(dataset, IterableDataset):
            if split == "train":
                return self._stream(dataset, tokenizer, model)
            dataset = read_stream(dataset, name, has_label=self.has_label)
        elif split == "train":
            check_effects(self.args, OF_STREAMS)
        dataset = as_dataset(dataset, name)
        prepared, report = self.prepare_dataset(
            dataset,
            tokenizer,
            num_proc=self.args.dataset_num_proc,
            drop_unusable_rows=self.args.drop_unusable_rows,
            **self._limits(model),
        )
        self.data_reports[split] = report
        self.dropped_rows.restart(split)
        self.dropped_rows.add(split, report.unusable)
        prepared = self._fitting(prepared, tokenizer, model, split)
        (logger.warning if report.num_changed else logger.info)(f"{split} data: {report}")
        return prepared

    def _stream(self, rows: Any, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> RowStream:
        """Batches of a stream. Errors: ValueError for what needs to know all rows beforehand."""
        args = self.args
        if self.stream_sides is None:
            raise ValueError(f"{type(self).__name__} reads no streams: load train_dataset without streaming")
        if args.max_steps < 1:
            raise ValueError("max_steps must be given for a stream, whose length is not known")
        if args.dataloader_num_workers > 1:
            raise ValueError(
                f"dataloader_num_workers must be 0 or 1 for a stream, got {args.dataloader_num_workers}: "
                "each worker would number rows of its own"
            )
        if getattr(args, "precompute_ref_log_probs", False):
            raise ValueError(
                "precompute_ref_log_probs needs all rows beforehand; load them without streaming"
            )
        is_shuffled = args.train_sampling_strategy == "random"
        deal = Deal(
            batch_size=args.train_batch_size,
            process_index=args.process_index,
            num_processes=args.world_size,
            seed=args.data_seed,
            buffer_size=args.streaming_shuffle_buffer if is_shuffled else 0,
            drop_last=args.dataloader_drop_last,
        )
        return RowStream(
            rows,
            tokenizer,
            self.stream_sides,
            Limits(**self._limits(model)),
            self._stream_budget(tokenizer, model),
            deal,
            has_label=self.has_label,
            may_drop=args.drop_unusable_rows,
            on_drop=partial(_add_dropped, self.dropped_rows),
        )

    def _stream_budget(self, tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> TokenBudget:
        return self._budget()

    def get_train_dataloader(self):
        if not isinstance(self.train_dataset, RowStream):
            return super().get_train_dataloader()
        args = self.args
        if args.world_size > 1 and len(set(gather_object([self.train_dataset.digest]))) > 1:
            raise ValueError(
                "train_dataset: the processes read different streams; pass the whole stream to each, neither "
                "split by node nor shuffled without a seed"
            )
        return DataLoader(
            self.train_dataset,
            batch_size=None,  # the stream deals the rows to batches and processes itself
            collate_fn=StreamCollator(self.data_collator),
            num_workers=args.dataloader_num_workers,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            multiprocessing_context=args.dataloader_multiprocessing_context,
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        is_over = self.state.global_step >= self.state.max_steps
        if is_over and isinstance(self.train_dataset, RowStream):
            # Without a length, a finished run that is resumed would take a step.
            self.control.should_training_stop = True
            return [], 0
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._pass = inputs.get("epoch")
        if "past" in inputs:
            self._check_past(*inputs["past"])
        return super().training_step(model, inputs, num_items_in_batch)

    def _deal(self) -> list[Any]:
        """What decides how many rows of a stream a step takes, and in which order."""
        args = self.args
        return [
            args.train_batch_size * args.world_size,
            args.gradient_accumulation_steps,
            args.streaming_shuffle_buffer if args.train_sampling_strategy == "random" else 0,
            args.dataloader_drop_last,
        ]

    def _check_past(self, before: str, after: str) -> None:
        """ValueError where the stream gave other rows than those that a resumed run was trained on."""
        wanted, self._wanted_past, self._past = self._wanted_past, None, after
        if wanted is not None and wanted != before:
            raise ValueError(
                f"train_dataset: of the rows that the run was trained on up to step {self.state.global_step} "
                "the stream gives others now: give the data as it was, or start anew in another output_dir"
            )

    def _save_extras(self, folder: str) -> None:
        super()._save_extras(folder)
        if self.args.should_save and isinstance(self.train_dataset, RowStream):
            told = {"rows": self._past, "deal": self._deal()}
            Path(folder, STREAM_FILE).write_text(json.dumps(told) + "\n", encoding="utf-8")

    def _load_extras(self, checkpoint: str | None) -> None:
        super()._load_extras(checkpoint)
        self._past = self._wanted_past = None
        path = Path(checkpoint or "", STREAM_FILE)
        if checkpoint is None or self.args.ignore_data_skip or not path.is_file():
            return
        told = json.loads(path.read_text(encoding="utf-8"))
        self._past = told["rows"]
        if told["deal"] == self._deal():  # else other rows come next, and the change is told
            self._wanted_past = told["rows"]

    def _draw_epoch(self, model):
        # Of a stream, whose length is not known, the Trainer counts no epochs.
        return self._pass if model.training and self._pass is not None else super()._draw_epoch(model)

    def _limits(self, model: nn.Module) -> dict[str, Any]:
        """What rows are truncated to and checked against; see data.prepare_pairs."""
        return {
            "max_length": self.args.max_length,
            "max_prompt_length": self.args.max_prompt_length,
            "max_positions": max_positions(model.config),
            "vocab_size": model.config.vocab_size,
            "mask_token_id": self.mask_token_id,
        }

    def _budget(self, **fill: int) -> TokenBudget:
        budget = TokenBudget(
            self.args.num_samples, self.args.max_tokens_per_pack, divisible=self.gradient_mode != "joint"
        )
        return replace(budget, **fill)

    def _fitting(
        self, prepared: Dataset, tokenizer: PreTrainedTokenizerBase, model: nn.Module, split: str
    ) -> Dataset:
        """The examples that packs can hold. Errors: ValueError if others are there and may not be dropped."""
        return self._within(self._budget(), prepared, split)

    def _within(self, budget: TokenBudget, prepared: Dataset, split: str) -> Dataset:
        if not self.args.drop_unusable_rows:
            budget.check(prepared)
            return prepared
        index, tokens = budget.over(prepared)
        if not len(index):
            return prepared
        if len(index) == len(prepared):
            budget.check(prepared)
        ids = prepared.select(index)["example_id"][:]
        reasons = [(row, budget.told(int(n))) for row, n in zip(ids, tokens, strict=True)]
        self.dropped_rows.add(split, reasons)
        logger.warning(
            f"{split} data: {len(index)} of {len(prepared)} examples dropped: longer than the token budget; "
            f"the first is example {ids[0]}: {reasons[0][1]}"
        )
        return data.without(prepared, index)

    def _costs_of_epoch(self, dataset, epoch):
        return data.num_tokens(dataset).tolist()

    def get_eval_dataloader(self, eval_dataset=None):
        known = self.eval_dataset if isinstance(self.eval_dataset, dict) else {}
        if isinstance(eval_dataset, str) and eval_dataset not in known:
            raise ValueError(
                f"eval_dataset must be a dataset or the name of one, {sorted(known)}; got {eval_dataset!r}"
            )
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, self.processing_class, self.model, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        if test_dataset is None:
            raise ValueError("test_dataset must be a dataset, got None")
        return super().get_test_dataloader(
            self._prepare(test_dataset, self.processing_class, self.model, "test")
        )
