"""PackedTrainer: the loop over micro-batches of packs, under transformers.Trainer.

What the Trainer lacks for packs: micro-batches by token budget, metrics as means over examples, evaluation,
and a loss that is one mean over all examples of the optimizer step, however they are spread over
micro-batches, accumulation and processes.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.step import NLL, split_by_tokens
from vrpo.training.adapter_trainer import AdapterTrainer
from vrpo.training.checks import responses_of
from vrpo.training.finite import last_good_checkpoint

Metrics = dict[str, Tensor]
"""Name -> one value per example of the micro-batch."""


def as_nll(model: nn.Module) -> NLL:
    """The model as step.py sees it: a pack in, nll_N out."""

    def nll(pack: PackedBatch) -> Tensor:
        return model(**pack.model_inputs()).nll

    return nll


class PackedTrainer(AdapterTrainer):
    """Trains and evaluates on packs; a subclass says what a micro-batch costs (`_micro_batch_loss`)."""

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums: dict[str, dict[str, Tensor | float]] = {
            "train": defaultdict(float),
            "eval": defaultdict(float),
        }
        self._num_tokens = 0
        self._seconds = 0.0
        super().__init__(*args, **kwargs)
        # Our loss is already one mean over the optimizer step (see training_step).
        self.model_accepts_loss_kwargs = True

    def _responses(self, inputs: dict[str, Any], model: nn.Module) -> ResponseBatch:
        """What a batch trains or evaluates on; the token budget cuts what this returns."""
        return responses_of(inputs)

    def _micro_batch_loss(
        self, model: nn.Module, batch: ResponseBatch, epoch: int
    ) -> tuple[Tensor, Metrics, int]:
        """(loss of each example with gradient, metrics of each example, tokens in the pack)."""
        raise NotImplementedError

    def _draw_epoch(self, model: nn.Module) -> int:
        # Keyed by epoch and not by step, so that an example's masks do not depend on the batch size.
        return int(self.state.epoch or 0) if model.training else EVALUATION_EPOCH

    def _micro_batches(self, batch: ResponseBatch) -> list[ResponseBatch]:
        def split(at_least: int) -> list[ResponseBatch]:
            return list(
                split_by_tokens(batch, self.args.num_samples, self.args.max_tokens_per_pack, at_least)
            )

        parts = split(at_least=1)
        if self.args.world_size > 1:
            # Sharded models run collectives in every forward: all ranks must make the same number of them.
            count = torch.tensor([len(parts)], device=self.args.device)
            parts = split(at_least=int(self.accelerator.gather(count).max()))
        return parts

    def _losses(self, model: nn.Module, parts: list[ResponseBatch]) -> Iterator[tuple[Tensor, Metrics, int]]:
        """(loss of each example, metrics, tokens) of each micro-batch, in order."""
        epoch = self._draw_epoch(model)
        for part in parts:
            with self.compute_loss_context_manager():
                loss_B, metrics, num_tokens = self._micro_batch_loss(model, part, epoch)
            if not torch.isfinite(loss_B.detach()).all():
                self._raise_not_finite(loss_B, part)
            yield loss_B, metrics, num_tokens

    def _raise_not_finite(self, loss_B: Tensor, part: ResponseBatch) -> None:
        bad = ~torch.isfinite(loss_B.detach()).cpu()
        examples = part.example_R[:: part.num_sides][bad].tolist()
        raise FloatingPointError(
            f"loss is not finite at step {self.state.global_step}: {loss_B.detach().cpu()[bad].tolist()} for "
            f"the examples {examples} (rows of the dataset). Stopped before another optimizer step; "
            f"{last_good_checkpoint(self.args.output_dir)}. Check these rows, lower learning_rate, or train "
            "in a wider dtype."
        )

    def training_step(self, model, inputs, num_items_in_batch=None) -> Tensor:
        """Forward and backward of one batch, micro-batch by micro-batch.

        The gradient is that of (1/n) * sum of the example losses over all n examples of the optimizer step:
        the processes' gradients are averaged, hence the factor world_size.
        """
        started = time.perf_counter()
        model.train()
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()
        batch = self._responses(inputs, model)
        if num_items_in_batch is None:
            num_items_in_batch = (
                batch.num_examples * self.args.gradient_accumulation_steps * self.args.world_size
            )
        parts = self._micro_batches(batch)
        total = torch.zeros((), device=self.args.device)
        losses = self._losses(model, parts)
        for index in range(len(parts)):
            with self._gradient_sync(model, is_last=index == len(parts) - 1):
                loss_B, metrics, num_tokens = next(losses)
                self._record("train", metrics)
                self._num_tokens += num_tokens
                loss = loss_B.sum() * (self.args.world_size / num_items_in_batch)
                kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
                self.accelerator.backward(loss, **kwargs)
            total += loss.detach()
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self._seconds += time.perf_counter() - started
        return total

    @contextlib.contextmanager
    def _gradient_sync(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Around a forward and its backward: gradients are reduced over the processes after the last only."""
        if is_last:
            yield
        elif self.is_deepspeed_enabled:
            # accelerate steps DeepSpeed's engine in every backward that is to synchronise.
            synchronises = self.accelerator.sync_gradients
            self.accelerator.gradient_state._set_sync_gradients(False)
            try:
                yield
            finally:
                self.accelerator.gradient_state._set_sync_gradients(synchronises)
        else:
            with self.accelerator.no_sync(model):
                yield

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(responses_of(batch).num_examples for batch in batches)
        if self.args.world_size > 1:
            count = int(self.accelerator.gather(torch.tensor([count], device=device)).sum())
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the batch's examples, in one graph."""
        parts = self._micro_batches(self._responses(inputs, model))
        loss_B = torch.cat([loss_B for loss_B, _, _ in self._losses(model, parts)])
        return (loss_B.mean(), {"loss": loss_B}) if return_outputs else loss_B.mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(mean loss, predictions, labels) of a batch.

        Predictions are the metrics of each example by name, "loss" among them, and labels the example ids:
        what compute_metrics gets, and predict() returns.
        """
        parts: dict[str, list[Tensor]] = defaultdict(list)
        with torch.no_grad():
            batch = self._responses(inputs, model)
            for loss_B, metrics, _ in self._losses(model, self._micro_batches(batch)):
                for key, value_B in {"loss": loss_B, **metrics}.items():
                    parts[key].append(value_B)
        values = {key: torch.cat(part) for key, part in parts.items()}
        # Ranks fill up their last batch with examples seen before; this gathers and drops them again.
        self._record("eval", self.accelerator.gather_for_metrics(values))
        if prediction_loss_only:
            return values["loss"].mean(), None, None
        example_B = batch.example_R[:: batch.num_sides].to(self.args.device)
        return values["loss"].mean(), values, example_B

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        self._sums["eval"].clear()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{key}": value for key, value in self._take("eval").items()})
        return output

    def _forget(self) -> None:
        """Drops what a run that broke off left unlogged."""
        for sums in self._sums.values():
            sums.clear()
        self._num_tokens, self._seconds = 0, 0.0

    def _record(self, mode: str, metrics: Metrics) -> None:
        sums = self._sums[mode]
        for key, value_B in metrics.items():
            sums[key] = sums[key] + value_B.detach().double().sum()
        sums["num_examples"] = sums["num_examples"] + len(value_B)

    def _take(self, mode: str) -> dict[str, float]:
        """Means over all examples of all processes since the last call."""
        sums = self._sums[mode]
        if not sums:
            return {}
        keys = sorted(sums)
        total = torch.stack([torch.as_tensor(sums[key], device=self.args.device).double() for key in keys])
        if mode == "train":  # evaluation metrics are gathered already
            total = self.accelerator.reduce(total, reduction="sum")
        mean = dict(zip(keys, total.tolist(), strict=True))
        sums.clear()
        num_examples = mean.pop("num_examples")
        return {key: value / num_examples for key, value in mean.items()}

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, **self._take("train")}
            if self._seconds:
                logs["vrpo/tokens_per_second"] = self._num_tokens * self.args.world_size / self._seconds
            self._num_tokens, self._seconds = 0, 0.0
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        """Not counted: the Trainer's formula reads a padded input_ids that does not exist here."""
        return 0
