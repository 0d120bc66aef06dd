"""DataTrainer: what a trainer's datasets become before a step: token ids, checked, within the budget."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from vrpo import data
from vrpo.data import TokenBudget
from vrpo.models import max_positions
from vrpo.training.checkpoint_trainer import CheckpointTrainer
from vrpo.training.config import DiffusionConfig
from vrpo.training.dropped import DroppedRows

logger = logging.get_logger(__name__)


class DataTrainer(CheckpointTrainer):
    """Prepares datasets, those of the constructor and those that an evaluation is given.

    A subclass sets `args`, `mask_token_id`, `gradient_mode` and `dropped_rows` before the first one.
    """

    args: DiffusionConfig
    mask_token_id: int
    gradient_mode: str
    dropped_rows: DroppedRows
    prepare_dataset: Callable

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
        prepared, report = self.prepare_dataset(
            dataset,
            tokenizer,
            num_proc=self.args.dataset_num_proc,
            drop_unusable_rows=self.args.drop_unusable_rows,
            **self._limits(model),
        )
        self.dropped_rows.restart(split)
        self.dropped_rows.add(split, report.unusable)
        prepared = self._fitting(prepared, tokenizer, model, split)
        (logger.warning if report.num_changed else logger.info)(f"{split} data: {report}")
        return prepared

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
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, self.processing_class, self.model, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(
            self._prepare(test_dataset, self.processing_class, self.model, "test")
        )
