"""DiffusionTrainer: what the two trainers share of the pipeline under transformers.Trainer.

Optimizer, schedule, checkpoints, resume, distributed wrapping and logging are the Trainer's. This file adds
what it lacks for packs: micro-batches by token budget, metrics, evaluation, and a loss that is one mean over
all examples of the optimizer step, however they are spread over micro-batches, accumulation and processes.
"""

import contextlib
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate.utils.memory import clear_device_cache
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy
from transformers.utils import logging

from vrpo import data
from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator.masking import EVALUATION_EPOCH
from vrpo.models import load_tokenizer, max_positions, special_tokens
from vrpo.models.adapters import add_adapter, is_peft_model
from vrpo.models.checkpoint import load_policy
from vrpo.step import NLL, Estimator, split_by_tokens
from vrpo.training.adapter_trainer import AdapterTrainer, check_adapters
from vrpo.training.checks import (
    check_batches_exist,
    check_metric_for_best_model,
    check_model,
    check_optimizer,
)
from vrpo.training.config import DiffusionConfig
from vrpo.training.finite import StopAtBadGradients, check_weights, last_good_checkpoint
from vrpo.training.model_card import model_card
from vrpo.training.precision import keep_output_dtype, release
from vrpo.training.resume import (
    check_checkpoint,
    check_output_dir,
    checkpoint_to_resume,
    digest_of_weights,
    only_run_in,
    run_of,
    settings_of,
    write_run,
)
from vrpo.training.support import check_runnable

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


class LogTheLastStep(TrainerCallback):
    """A run shorter than logging_steps, and the end of every run, are logged too."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


class DiffusionTrainer(AdapterTrainer):
    """What the two trainers share; not used by itself.

    A subclass says how its dataset is prepared and collated, and what a micro-batch costs
    (`_micro_batch_loss`).
    """

    collator: Callable
    prepare_dataset: Callable
    metric_names: tuple[str, ...] = ()
    method: str | None = None
    dataset_name: str | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None,
        args: DiffusionConfig,
        data_collator: Callable | None = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        peft_config: Any = None,
        compute_metrics: Callable[[EvalPrediction], dict[str, float]] | None = None,
        model_init: Callable[..., PreTrainedModel] | None = None,
    ):
        if (model is None) == (model_init is None):
            raise ValueError("give either model or model_init")
        if model_init is not None and any(optimizers):
            raise ValueError("model_init makes a new model for each train(), so optimizers cannot be given")
        check_runnable(args)
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
        self.adapter_is_new = peft_config is not None
        self.args, self.peft_config, self.model_init = args, peft_config, model_init
        if model_init is not None:
            set_seed(args.seed)
            model = super().call_model_init()
        model = self._ready(model)
        check_optimizer(args, model)
        self.mask_token_id = args.mask_token_id
        if self.mask_token_id is None:
            self.mask_token_id = special_tokens(model.config, processing_class).mask
        if self.mask_token_id >= model.config.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}, outside the model's embedding of "
                f"{model.config.vocab_size} rows"
            )
        self._sums: dict[str, dict[str, Tensor | float]] = {
            "train": defaultdict(float),
            "eval": defaultdict(float),
        }
        self._num_tokens = 0
        self._seconds = 0.0
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator or self.collator(),
            train_dataset=self._prepare(train_dataset, processing_class, model, "train"),
            eval_dataset=self._prepare_each(eval_dataset, processing_class, model),
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            compute_metrics=compute_metrics,
        )
        self.model_init = model_init
        self._frozen = self._digest_of_frozen_weights()
        check_batches_exist(args, self.train_dataset, self.eval_dataset)
        if compute_metrics is None:
            check_metric_for_best_model(args, self.eval_dataset, self.metric_names)
        # Our loss is already one mean over the optimizer step (see training_step).
        self.model_accepts_loss_kwargs = True
        self.add_callback(StopAtBadGradients(self.accelerator))
        if args.logging_strategy != IntervalStrategy.NO:
            self.add_callback(LogTheLastStep())
        keep_output_dtype(self.accelerator)

    def _ready(self, model: nn.Module) -> nn.Module:
        """The model checked, with its adapter, and without what an earlier trainer left on it."""
        check_model(model, self.args)
        if self.peft_config is not None:
            model = add_adapter(model, self.peft_config, seed=self.args.seed)
        if is_peft_model(model):
            check_adapters(model)
        if self.args.disable_dropout:
            switch_dropout_off(model)
        return release(model)

    def call_model_init(self, trial=None) -> nn.Module:
        return self._ready(super().call_model_init(trial))

    @property
    def estimator(self) -> Estimator:
        """From the arguments as they are now; a hyperparameter search changes them between trials."""
        return Estimator(
            mask_token_id=self.mask_token_id,
            num_samples=self.args.num_samples,
            mask_design=self.args.mask_design,
            masks_per_level=self.args.masks_per_level,
            seed=self.args.seed,
        )

    def _digest_of_frozen_weights(self) -> str:
        """What training does not move and depends on: the base model under an adapter."""
        if not is_peft_model(self.model):
            return ""
        return digest_of_weights((n, p) for n, p in self.model.named_parameters() if not p.requires_grad)

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """Trains; `resume_from_checkpoint` is a folder, or True (or "true") for the last one in output_dir.

        Errors: ValueError for a checkpoint of another run or with a part missing, an output_dir that holds
            another run's checkpoints or is in use; FloatingPointError where a loss, a gradient or a weight to
            be saved is not finite.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if self.model is self.model_wrapped and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            release(self.model)  # an evaluation prepares the model too, without DistributedDataParallel
        for sums in self._sums.values():
            sums.clear()
        with only_run_in(self.args.output_dir, is_writer=self.args.should_save):
            self._check_run(checkpoint)
            return super().train(checkpoint, *args, **kwargs)

    def _run(self) -> dict[str, Any]:
        kind = type(self).__name__ if self.method is None else self.method
        return run_of(kind, self.args, self.train_dataset, self._frozen, self.mask_token_id)

    def _check_run(self, checkpoint: str | None) -> None:
        if not self.is_world_process_zero() or self.train_dataset is None:
            return
        if checkpoint is None:
            check_output_dir(self.args.output_dir, self._run(), self.args.save_strategy)
            return
        check_checkpoint(
            checkpoint,
            self._run(),
            save_only_model=self.args.save_only_model,
            is_plain=not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
            is_adapter=is_peft_model(self.model),
        )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_weights(
            self.model,
            self.accelerator,
            step=self.state.global_step,
            output_dir=output_dir or self.args.output_dir,
            run_dir=self.args.output_dir,
        )
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and self.args.should_save and self.train_dataset is not None:
            write_run(output_dir, self._run())
        if not _internal_call:
            self._write_card(output_dir or self.args.output_dir)

    def create_model_card(self, *args, dataset=None, model_name=None, **kwargs) -> None:
        """Writes README.md to output_dir: base model, dataset, settings, last evaluation, whom to cite."""
        self._write_card(self.args.output_dir, dataset=dataset, name=model_name, **kwargs)

    def _write_card(self, folder: str, dataset: str | None = None, name: str | None = None, **more) -> None:
        if not self.is_world_process_zero():
            return
        known = {key: more[key] for key in ("license", "language", "tags") if more.get(key)}
        what = "an adapter of it" if is_peft_model(self.model) else "all its weights"
        settings = {"trained": what, "optimizer steps": self.state.global_step, "seed": self.args.seed}
        card = model_card(
            method=self.method,
            name=name or os.path.basename(os.path.abspath(folder)),
            base_model=self.model.config.name_or_path or None,
            dataset=dataset or self.dataset_name,
            settings=settings | settings_of(self.args),
            metrics=self.last_evaluation() or {},
            **known,
        )
        card.save(os.path.join(folder, "README.md"))

    def last_evaluation(self) -> dict[str, float] | None:
        """The metrics of an evaluation of the model as it is now; None if there was none."""
        is_best = self.args.load_best_model_at_end and self.state.best_global_step != self.state.global_step
        found = {}
        for entry in self.state.log_history if not is_best else ():
            if entry.get("step") == self.state.global_step:
                found |= {key: value for key, value in entry.items() if key.startswith("eval_")}
        return found or None

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
        args = self.args
        prepared, report = self.prepare_dataset(
            dataset,
            tokenizer,
            max_length=args.max_length,
            max_prompt_length=args.max_prompt_length,
            max_positions=max_positions(model.config),
            vocab_size=model.config.vocab_size,
            mask_token_id=self.mask_token_id,
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

    def get_eval_dataloader(self, eval_dataset=None):
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare(eval_dataset, self.processing_class, self.model, "eval")
        return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return super().get_test_dataloader(
            self._prepare(test_dataset, self.processing_class, self.model, "test")
        )

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
