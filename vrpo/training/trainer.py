"""DiffusionTrainer: what the two trainers share of the pipeline under transformers.Trainer.

Optimizer, schedule, checkpoints, resume, distributed wrapping and logging are the Trainer's. This file adds
what it lacks for packs: micro-batches by token budget, metrics, evaluation, and a loss that is one mean over
all examples of the optimizer step, however they are spread over micro-batches, accumulation and processes.
"""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.utils import logging

from vrpo import data
from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.models import LLaDAForMaskedDiffusion, load_tokenizer, special_tokens
from vrpo.models.adapters import add_adapter, is_peft_model
from vrpo.models.checkpoint import load_policy
from vrpo.models.files import why_unsupported
from vrpo.step import NLL, Estimator, split_by_tokens
from vrpo.training.adapter_trainer import AdapterTrainer, check_adapters
from vrpo.training.config import DiffusionConfig
from vrpo.training.finite import StopAtBadGradients, check_weights, last_good_checkpoint
from vrpo.training.precision import keep_output_dtype, release

logger = logging.get_logger(__name__)

Metrics = dict[str, Tensor]
"""Name -> one value per example of the micro-batch."""


def as_nll(model: nn.Module) -> NLL:
    """The model as step.py sees it: a pack in, nll_N out."""

    def nll(pack: PackedBatch) -> Tensor:
        return model(**pack.model_inputs()).nll

    return nll


def switch_dropout_off(model: nn.Module) -> None:
    """Every nn.Dropout of the model, LoRA's too, drops nothing from now on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _check_model(model: nn.Module) -> None:
    base = model.get_base_model() if is_peft_model(model) else model
    if not isinstance(base, LLaDAForMaskedDiffusion):
        config = base.config.to_dict() if isinstance(base, PreTrainedModel) else {}
        raise ValueError(
            f"model must be a masked-diffusion model (LLaDAForMaskedDiffusion, or PEFT around one), got "
            f"{type(base).__name__}. {why_unsupported(config)}"
        )


class DiffusionTrainer(AdapterTrainer):
    """What the two trainers share; not used by itself.

    A subclass says how its dataset is prepared and collated, and what a micro-batch costs
    (`_micro_batch_loss`).
    """

    collator: Callable
    prepare_dataset: Callable

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        args: DiffusionConfig,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
    ):
        if args.n_gpu > 1:
            raise ValueError(
                "nn.DataParallel is not supported: launch one process per GPU with torchrun or accelerate"
            )
        if processing_class is None:
            if not isinstance(model, str):
                raise ValueError("processing_class is needed: pass the tokenizer of the model")
            processing_class = load_tokenizer(model)
        if isinstance(model, str):
            model = load_policy(model, dtype=torch.float32)
        _check_model(model)
        mask_token_id = args.mask_token_id
        if mask_token_id is None:
            mask_token_id = special_tokens(model.config, processing_class).mask
        self.adapter_is_new = peft_config is not None
        if peft_config is not None:
            model = add_adapter(model, peft_config, seed=args.seed)
        if is_peft_model(model):
            check_adapters(model)
        if args.disable_dropout:
            switch_dropout_off(model)
        self.estimator = Estimator(
            mask_token_id=mask_token_id,
            num_samples=args.num_samples,
            mask_design=args.mask_design,
            masks_per_level=args.masks_per_level,
            seed=args.seed,
        )
        self._sums: dict[str, dict[str, Tensor | float]] = {
            "train": defaultdict(float),
            "eval": defaultdict(float),
        }
        self._num_tokens = 0
        self._seconds = 0.0
        super().__init__(
            model=release(model),
            args=args,
            data_collator=data_collator or self.collator(),
            train_dataset=self._prepare(train_dataset, processing_class, args, model, "train"),
            eval_dataset=self._prepare(eval_dataset, processing_class, args, model, "eval"),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        # Our loss is already one mean over the optimizer step (see training_step).
        self.model_accepts_loss_kwargs = True
        self.add_callback(StopAtBadGradients(self.accelerator))
        keep_output_dtype(self.accelerator)

    def train(self, *args, **kwargs):
        if self.model is self.model_wrapped and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            release(self.model)  # an evaluation prepares the model too, without DistributedDataParallel
        return super().train(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_weights(
            self.model,
            self.accelerator,
            step=self.state.global_step,
            output_dir=output_dir or self.args.output_dir,
            run_dir=self.args.output_dir,
        )
        super().save_model(output_dir, _internal_call=_internal_call)

    def _prepare(self, dataset, tokenizer, args, model, split):
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {
                name: self._prepare(part, tokenizer, args, model, f"{split} {name}")
                for name, part in dataset.items()
            }
        prepared, report = self.prepare_dataset(
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            vocab_size=model.config.vocab_size,
            num_proc=args.dataset_num_proc,
        )
        self._check_prepared(prepared, tokenizer, args, model, split)
        (logger.warning if report.num_changed else logger.info)(f"{split} data: {report}")
        return prepared

    def _check_prepared(self, prepared, tokenizer, args, model, split) -> None:
        """ValueError unless every example of a prepared dataset fits into a pack."""
        data.check_token_budget(prepared, args.num_samples, args.max_tokens_per_pack)

    def _responses(self, inputs: dict[str, Any], model: nn.Module) -> ResponseBatch:
        """What a batch trains or evaluates on; the token budget cuts what this returns."""
        return inputs["responses"]

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
        self._seconds += time.perf_counter() - started
        return total

    def _gradient_sync(self, model: nn.Module, is_last: bool) -> contextlib.AbstractContextManager:
        if is_last or self.is_deepspeed_enabled:
            return contextlib.nullcontext()
        return self.accelerator.no_sync(model)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        count = sum(batch["responses"].num_examples for batch in batches)
        if self.args.world_size > 1:
            count = int(self.accelerator.gather(torch.tensor([count], device=device)).sum())
        return batches, count

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Mean loss of the batch's examples, in one graph."""
        parts = self._micro_batches(self._responses(inputs, model))
        loss_B = torch.cat([loss_B for loss_B, _, _ in self._losses(model, parts)])
        return (loss_B.mean(), {"loss": loss_B}) if return_outputs else loss_B.mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        parts: dict[str, list[Tensor]] = defaultdict(list)
        with torch.no_grad():
            batch = self._responses(inputs, model)
            for loss_B, metrics, _ in self._losses(model, self._micro_batches(batch)):
                for key, value_B in {"loss": loss_B, **metrics}.items():
                    parts[key].append(value_B)
        values = {key: torch.cat(part) for key, part in parts.items()}
        # Ranks fill up their last batch with examples seen before; this gathers and drops them again.
        self._record("eval", self.accelerator.gather_for_metrics(values))
        return values["loss"].mean(), None, None

    def evaluation_loop(self, dataloader, description, *args, **kwargs):
        self._sums["eval"].clear()
        output = super().evaluation_loop(dataloader, description, *args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        output.metrics.update({f"{prefix}_{key}": value for key, value in self._take("eval").items()})
        return output

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
