"""PackedTrainer: the loop over micro-batches of packs, under transformers.Trainer.

What the Trainer lacks for packs: micro-batches by token budget, metrics as means over examples, evaluation,
and a loss that is one mean over all examples of the optimizer step, however they are spread over
micro-batches, accumulation and processes.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from torch import Tensor, nn

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.gradient import JointStep, LinearStep, Parts, ReplayStep, StepResult, evaluate
from vrpo.step import NLL, Estimator, Objective, num_cuts, split_by_tokens, split_segments
from vrpo.training.adapter_trainer import AdapterTrainer
from vrpo.training.checks import responses_of
from vrpo.training.finite import last_good_checkpoint
from vrpo.training.offload import offloading_of
from vrpo.training.together import raise_together

Metrics = dict[str, Tensor]
"""Name -> one value per example of the micro-batch."""


class ModelNLL:
    """A model as step.py and gradient.py see it: a pack in, nll_N out."""

    def __init__(self, model: nn.Module):
        self.model = model

    def __call__(self, pack: PackedBatch) -> Tensor:
        return self.model(**pack.model_inputs()).nll

    def first(self, pack: PackedBatch) -> tuple[Tensor, Tensor]:
        output = self.model(**pack.model_inputs(), return_statistics=True)
        return output.nll, output.statistics

    def again(self, pack: PackedBatch, nll_N: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        output = self.model(**pack.model_inputs(), known=(nll_N, statistics))
        return output.nll, output.drift


class PackedTrainer(AdapterTrainer):
    """Trains and evaluates on packs; a subclass gives the estimator, the objective and the metrics.

    linear_objective: it is linear in the policy's ELBOs and needs no reference.
    whole_batches: the loss of an example depends on the others of its batch, which is cut into packs only.
    gradient_mode: see DiffusionConfig.
    """

    linear_objective = False
    whole_batches = False
    gradient_mode = "joint"

    def __init__(self, *args: Any, **kwargs: Any):
        self._sums: dict[str, dict[str, Tensor | float]] = {
            "train": defaultdict(float),
            "eval": defaultdict(float),
        }
        self._num_tokens = 0
        self._seconds = 0.0
        self._bad_loss: FloatingPointError | None = None
        super().__init__(*args, **kwargs)
        # Our loss is already one mean over the optimizer step (see training_step).
        self.model_accepts_loss_kwargs = True
        self._offloading = offloading_of(self.model, self.args)

    def _responses(self, inputs: dict[str, Any], model: nn.Module) -> ResponseBatch:
        """What a batch trains or evaluates on; the token budget cuts what this returns."""
        return responses_of(inputs)

    @property
    def estimator(self) -> Estimator:
        raise NotImplementedError

    def _objective(self, batch: ResponseBatch, replicate_K: tuple[int, ...]) -> Objective:
        """The loss of each example of a micro-batch."""
        raise NotImplementedError

    def _metrics(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        """What is logged of a micro-batch beside the loss."""
        raise NotImplementedError

    def _reference(self, model: nn.Module) -> NLL | None:
        """The reference; None where the objective needs none."""
        return None

    def _known_reference(self, batch: ResponseBatch, epoch: int) -> Tensor | None:
        """The reference's ELBOs (R, K) in nats, float32, where they need not be computed."""
        return None

    def _prepare_pack(self, model: nn.Module, pack: PackedBatch) -> PackedBatch:
        """A pack from the CPU, as the models take it."""
        return pack.to(self.args.device)

    def _draw_epoch(self, model: nn.Module) -> int:
        # Keyed by epoch and not by step, so that an example's masks do not depend on the batch size.
        return int(self.state.epoch or 0) if model.training else EVALUATION_EPOCH

    def _micro_batches(self, batch: ResponseBatch) -> list[tuple[ResponseBatch, int]]:
        """(examples, number of packs) of each micro-batch.

        Sharded models run collectives in every pass, so all processes make the same number of micro-batches,
        and of packs in each.
        """
        args = self.args
        mode, parts = self.gradient_mode, [batch]
        if mode != "replay" and not self.whole_batches:

            def split(at_least: int) -> list[ResponseBatch]:
                return list(split_by_tokens(batch, args.num_samples, args.max_tokens_per_pack, at_least))

            parts = split(at_least=1)
            if args.world_size > 1:
                parts = split(at_least=self._largest([len(parts)])[0])
        counts = [1] * len(parts)
        if mode != "joint":
            counts = [num_cuts(part, args.num_samples, args.max_tokens_per_pack) for part in parts]
            if args.world_size > 1:
                counts = self._largest(counts)
        return list(zip(parts, counts, strict=True))

    def _largest(self, numbers: list[int]) -> list[int]:
        """The elementwise maximum over the processes."""
        local = torch.tensor([numbers], device=self.args.device)
        return self.accelerator.gather(local).max(dim=0).values.tolist()

    def _parts(self, model: nn.Module, batch: ResponseBatch, pack: PackedBatch, epoch: int) -> Parts:
        known_RK = self._known_reference(batch, epoch)
        return Parts(
            policy=ModelNLL(model),
            reference=None if known_RK is not None else self._reference(model),
            objective=self._objective(batch, pack.replicate_K),
            prepare=partial(self._prepare_pack, model),
            reference_RK=known_RK,
        )

    def _steps(
        self, model: nn.Module, micro_batches: list[tuple[ResponseBatch, int]]
    ) -> Iterator[tuple[ResponseBatch, JointStep | ReplayStep]]:
        """Each micro-batch with the step that takes its gradient."""
        epoch, args = self._draw_epoch(model), self.args
        for batch, count in micro_batches:
            pack = self.estimator.pack(batch, epoch, "cpu")
            parts = self._parts(model, batch, pack, epoch)
            if count == 1 and self.gradient_mode != "replay":
                yield batch, JointStep(parts, pack)
                continue
            packs = split_segments(pack, args.max_tokens_per_pack, at_least=count)
            kind = LinearStep if self.linear_objective else ReplayStep
            yield batch, kind(parts, packs, num_shares=count)

    def _not_finite(self, step: JointStep | ReplayStep, batch: ResponseBatch) -> FloatingPointError | None:
        """The error where a loss is not finite, naming the examples."""
        result = getattr(step, "result", None)
        losses = [] if result is None else result.loss_B.cpu()
        bad = ~torch.isfinite(torch.as_tensor(losses))
        if result is not None and not bad.any():
            return None
        examples = batch.example_R[:: batch.num_sides]
        values = "" if result is None else f"{losses[bad].tolist()} for "
        named = (examples if result is None else examples[bad]).tolist()
        return FloatingPointError(
            f"loss is not finite at step {self.state.global_step}: {values}the examples {named} (rows of the "
            f"dataset). Stopped before another optimizer step; {last_good_checkpoint(self.args.output_dir)}. "
            "Check these rows, lower learning_rate, or train in a wider dtype."
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
        factor = self.args.world_size / num_items_in_batch
        micro_batches = self._micro_batches(batch)
        total, self._bad_loss = torch.zeros((), device=self.args.device), None
        for number, (part, step) in enumerate(self._steps(model, micro_batches), start=1):
            for index in range(step.num_shares):
                is_last = number == len(micro_batches) and index == step.num_shares - 1
                self._backward(model, part, step, index, factor, is_last)
            self._record("train", self._metrics_of(part, step.result))
            self._num_tokens += step.result.num_tokens
            total += step.result.loss_B.sum() * factor
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        self._seconds += time.perf_counter() - started
        return total

    def _backward(self, model, batch, step, index: int, factor: float, is_last: bool) -> None:
        """Forward and backward of one share of a step."""
        with self._gradient_sync(model, is_last=is_last):
            with self.compute_loss_context_manager(), self._offloading():
                share = step.share(index)
            if not torch.isfinite(share.detach()):
                self._bad_loss = self._bad_loss or self._not_finite(step, batch)
            if is_last or self.args.world_size == 1:
                # Before the last backward, which may be the optimizer step, and with all processes here.
                raise_together(self._bad_loss, self.accelerator)
            kwargs = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
            self.accelerator.backward(share * factor, **kwargs)

    def _metrics_of(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        metrics = self._metrics(batch, result)
        if result.drift is not None:
            metrics["vrpo/replay_drift"] = result.drift.expand(batch.num_examples)
        return metrics

    @contextlib.contextmanager
    def _gradient_sync(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Around a forward and its backward: gradients are reduced over the processes after the last only.

        After every one with `sync_each_batch`, which under FSDP2 is the default (see EngineTrainer).
        """
        if is_last or (self._syncs_each_batch and not self.is_deepspeed_enabled):
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
        losses, epoch = [], self._draw_epoch(model)
        for batch, _ in self._micro_batches(self._responses(inputs, model)):
            pack = self.estimator.pack(batch, epoch, "cpu")
            step = JointStep(self._parts(model, batch, pack, epoch), pack)
            with self.compute_loss_context_manager():
                losses.append(step.losses())
            if error := self._not_finite(step, batch):
                raise error
        loss_B = torch.cat(losses)
        return (loss_B.mean(), {"loss": loss_B}) if return_outputs else loss_B.mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(mean loss, predictions, labels) of a batch.

        Predictions are the metrics of each example by name, "loss" among them, and labels the example ids:
        what compute_metrics gets, and predict() returns.
        """
        parts: dict[str, list[Tensor]] = defaultdict(list)
        batch, error = self._responses(inputs, model), None
        for part, step in self._steps(model, self._micro_batches(batch)):
            with torch.no_grad(), self.compute_loss_context_manager():
                step.result = evaluate(step.parts, step.packs, num_passes=step.num_shares)
            error = error or self._not_finite(step, part)
            for key, value_B in {"loss": step.result.loss_B, **self._metrics(part, step.result)}.items():
                parts[key].append(value_B)
        raise_together(error, self.accelerator)
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
