"""DiffusionSFTTrainer: masked-diffusion supervised fine-tuning, with EOS fill."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as compute
import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from vrpo import data
from vrpo.batch import ResponseBatch
from vrpo.data.encode import closing_ids
from vrpo.estimator.eos_fill import EosFill, fill_lengths, mean_fill
from vrpo.gradient import StepResult
from vrpo.models import max_positions, special_tokens
from vrpo.objectives import preference
from vrpo.step import Objective
from vrpo.training.argument_types import check_config
from vrpo.training.config import DiffusionSFTConfig
from vrpo.training.packed_trainer import Metrics
from vrpo.training.trainer import DiffusionTrainer

logger = logging.get_logger(__name__)

AUTOMATIC_FILL = 4
"""max_eos_fill=None: times the longest response, so that even the shortest is seen among that many masks."""


class DiffusionSFTTrainer(DiffusionTrainer):
    """Masked-diffusion supervised fine-tuning: minimises -B(y) / L of the completions.

    y is the completion and, in training, its EOS fill (DiffusionSFTConfig.max_eos_fill), without which a
    model learns the length of an answer from the number of masks; L counts both. Evaluation is without fill:
    eval_loss is that of the completions alone, the same draw at every evaluation, comparable across epochs,
    fills and runs, and what `vrpo score` measures.

    Args: as VRPOTrainer, without a reference; datasets in TRL's format `prompt`, `completion`, text or
        messages, or `prompt_ids`, `completion_ids`.

    Metrics, means over examples: `logps/completion` (ELBO estimate, nats; with its fill in training),
    `elbo/completion_per_token` (the same per token, fill counted), `sft/eos_fill` (tokens of fill per
    example; training only), `vrpo/tokens_per_second`.
    """

    args: DiffusionSFTConfig
    collator = data.CompletionCollator
    stream_sides = data.COMPLETION_SIDES
    prepare_dataset = staticmethod(data.prepare_completions)
    method = "sft"
    metric_names = ("logps/completion", "elbo/completion_per_token")
    linear_objective = True
    eos_fill: EosFill | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
        args: DiffusionSFTConfig | None = None,
        **kwargs: Any,
    ):
        args = DiffusionSFTConfig(output_dir="sft_output") if args is None else args
        check_config(args, DiffusionSFTConfig)
        super().__init__(model, args, **kwargs)

    def _fitting(self, prepared, tokenizer, model, split):
        if split != "train" or self.args.max_eos_fill == 0:  # evaluation is without fill
            return super()._fitting(prepared, tokenizer, model, split)
        if self.args.drop_unusable_rows:  # else the fill would be made for responses that are dropped
            prepared = super()._fitting(prepared, tokenizer, model, split)
        fill = self.eos_fill = build_eos_fill(prepared, tokenizer, self.args, model)
        budget = self._budget(max_fill=fill.max_fill, max_length=fill.max_length)
        return self._within(budget, prepared, split)

    def _stream_budget(self, tokenizer, model):
        if self.args.max_eos_fill is None:
            raise ValueError(
                "max_eos_fill must be given for a stream: None follows the longest response of all rows"
            )
        if self.args.max_eos_fill == 0:
            return self._budget()
        fill = self.eos_fill = build_eos_fill(None, tokenizer, self.args, model)
        return self._budget(max_fill=fill.max_fill, max_length=fill.max_length)

    def _costs_of_epoch(self, dataset, epoch):
        tokens_E = torch.from_numpy(data.num_tokens(dataset))
        if self.eos_fill is None:
            return tokens_E.tolist()
        fill = self.eos_fill
        ends = [fill.is_whole(ids) for part in _tables(dataset) for ids in _tails(part, fill.longest_ending)]
        room_E = (fill.max_length - tokens_E).clamp(min=0, max=fill.max_fill)
        bound_E = torch.where(torch.tensor(ends, dtype=torch.bool), room_E, 0)
        example_E = torch.tensor(dataset.with_format(None)["example_id"][:], dtype=torch.int64)
        fill_E = fill_lengths(fill.seed, epoch, example_E, torch.zeros_like(example_E), bound_E)
        return (tokens_E + fill_E).tolist()

    def _responses(self, inputs, model):
        batch = super()._responses(inputs, model)
        if self.eos_fill is None or not model.training:
            return batch
        return self.eos_fill(batch, self._draw_epoch(model))

    def _objective(self, batch: ResponseBatch, replicate_K: tuple[int, ...]) -> Objective:
        return lambda policy_RK, _: preference.denoising_loss(policy_RK, batch.response_length_R)

    def _metrics(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        metrics = {
            "logps/completion": result.policy_RK.mean(dim=1),
            "elbo/completion_per_token": -result.loss_B,
        }
        if batch.fill_R is not None:
            metrics["sft/eos_fill"] = batch.fill_R.to(result.policy_RK)
        return metrics


def build_eos_fill(
    prepared: Dataset | None, tokenizer: PreTrainedTokenizerBase, args: DiffusionSFTConfig, model: nn.Module
) -> EosFill | None:
    """The fill that the configuration asks for; None where it is switched off. Says what it will do.

    prepared: the training set; None of a stream, where max_eos_fill must be given.

    Errors: ValueError if there is no EOS token.
    """
    if args.max_eos_fill == 0:
        return None
    special = special_tokens(model.config, tokenizer)
    if special.eos is None:
        raise ValueError(
            "EOS fill needs an eos_token, and processing_class has none: set tokenizer.eos_token, or switch "
            "the fill off with max_eos_fill=0 (a model then learns an answer's length from its masks)"
        )
    max_fill = args.max_eos_fill
    if max_fill is None:
        max_fill = AUTOMATIC_FILL * _longest_response(prepared)
    endings = [(token,) for token in special.terminal]
    if closing := closing_ids(tokenizer):
        endings.append(closing)
    fill = EosFill(
        eos_token_id=special.eos,
        endings=tuple(dict.fromkeys(endings)),
        max_fill=max_fill,
        max_length=min(args.max_length, max_positions(model.config)),
        seed=args.seed,
    )
    if prepared is None:
        return fill
    _report(fill, prepared, tokenizer)
    longest = _longest_response(prepared)
    if max_fill < longest:
        logger.warning(
            f"max_eos_fill={max_fill} is below the longest response of {longest} tokens: decoded into as "
            "many masks, a short answer has more to fill than it was trained with; raise max_eos_fill"
        )
    return fill


def _longest_response(prepared: Dataset) -> int:
    return max(
        compute.max(compute.list_value_length(table["completion_ids"])).as_py() for table in _tables(prepared)
    )


def _tables(prepared: Dataset) -> Iterator[pa.Table]:
    return prepared.select_columns("completion_ids").with_format("arrow").iter(batch_size=10_000)


def _tails(table: pa.Table, size: int) -> Iterator[list[int]]:
    """The last tokens of each response, at most `size`."""
    lists = table["completion_ids"].combine_chunks()
    values, ends = lists.values.to_numpy(), lists.offsets.to_numpy()
    for start, end in pairwise(ends.tolist()):
        yield values[max(start, end - size) : end].tolist()


def _report(fill: EosFill, prepared: Dataset, tokenizer: PreTrainedTokenizerBase) -> None:
    told = f"EOS fill: 0 to {fill.max_fill} tokens a response, {mean_fill(fill.max_fill):.1f} on average"
    open_rows = sum(
        not fill.is_whole(ids) for table in _tables(prepared) for ids in _tails(table, fill.longest_ending)
    )
    if not open_rows:
        return logger.info(told)
    endings = " or ".join(repr(tokenizer.decode(list(ending))) for ending in fill.endings)
    logger.warning(
        f"{told}; but {open_rows} of {len(prepared)} responses do not end with {endings}: they count as "
        "truncated, get no fill and teach no stop"
    )
