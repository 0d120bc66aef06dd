"""DiffusionTrainer: what the trainers share of the pipeline under transformers.Trainer.

Optimizer, schedule, checkpoints, distributed wrapping and logging are the Trainer's, the loop over packs is
packed_trainer.py's. This file prepares and checks model and data, and says which run a checkpoint is of.
"""

import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from torch import nn
from transformers import (
    EvalPrediction,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

from vrpo.models import load_tokenizer, special_tokens
from vrpo.models.adapters import add_adapter, is_peft_model
from vrpo.models.checkpoint import load_policy
from vrpo.models.quantized import keep_differentiable
from vrpo.step import Estimator
from vrpo.training.adapter_trainer import check_adapters
from vrpo.training.advice import Advise
from vrpo.training.argument_types import check_arguments, check_early_stopping
from vrpo.training.changed import apply_changes, groups_of
from vrpo.training.checkpoints import checkpoints, remove_incomplete
from vrpo.training.checks import (
    check_batches_exist,
    check_metric_for_best_model,
    check_model,
    check_optimizer,
)
from vrpo.training.compiled import check_compiler, compile_layers, leave_compilation_to_us
from vrpo.training.config import DiffusionConfig
from vrpo.training.data_trainer import DataTrainer
from vrpo.training.dropped import DroppedRows
from vrpo.training.finite import StopAtBadGradients, check_weights
from vrpo.training.memory import peak_memory_gb
from vrpo.training.model_card import model_card
from vrpo.training.precision import keep_output_dtype, leave_adapter_inputs_to_autocast, release
from vrpo.training.report import REPORT_FILE, write_report
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
from vrpo.training.together import on_main
from vrpo.training.trunk import adapter_on_top_layers, train_top_layers

logger = logging.get_logger(__name__)


def switch_dropout_off(model: nn.Module) -> None:
    """Every nn.Dropout of the model, LoRA's too, drops nothing from now on."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def gradient_mode_of(model: nn.Module, args: DiffusionConfig, *, is_linear: bool) -> str:
    """gradient_mode; "auto" is "joint" where a second pass would drop other activations than the first.

    Errors: ValueError for "replay" in that case.
    """
    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    if not drops or is_linear:  # a linear objective is not passed twice
        return args.gradient_mode
    if args.gradient_mode == "replay":
        raise ValueError(
            "gradient_mode='replay' passes every pack twice and needs the same values both times, but the "
            "model has dropout: leave disable_dropout=True, or use gradient_mode='joint'"
        )
    return "joint"


class LogTheLastStep(TrainerCallback):
    """A run shorter than logging_steps, and the end of every run, are logged too."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_log = True


class DiffusionTrainer(DataTrainer):
    """What the trainers share; not used by itself.

    A subclass says how its dataset is prepared and collated, and gives an objective and metrics
    (`PackedTrainer`).
    """

    collator: Callable
    prepare_dataset: Callable
    metric_names: tuple[str, ...] = ()
    method: str | None = None
    dataset_name: str | None = None
    is_dry_run = False
    """Whether the trainer is made to be looked at: no model runs and nothing is written when it is made."""

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
        check_arguments(
            {
                "data_collator": data_collator,
                "eval_dataset": eval_dataset,
                "processing_class": processing_class,
                "callbacks": callbacks,
                "optimizers": optimizers,
                "peft_config": peft_config,
                "compute_metrics": compute_metrics,
                "model_init": model_init,
            }
        )
        check_early_stopping(args, callbacks or ())
        check_runnable(args)
        check_compiler(args)
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
        self.dropped_rows = DroppedRows(args.output_dir, is_writer=args.process_index == 0)
        self.data_reports = {}
        self.args, self.peft_config, self.model_init = args, peft_config, model_init
        if model_init is not None:
            set_seed(args.seed)
            model = self._model_of_init()
        model = self._ready(model)
        self.gradient_mode = gradient_mode_of(model, args, is_linear=self.linear_objective)
        check_optimizer(args, model)
        self.mask_token_id = args.mask_token_id
        if self.mask_token_id is None:
            self.mask_token_id = special_tokens(model.config, processing_class).mask
        if self.mask_token_id >= model.config.vocab_size:
            raise ValueError(
                f"mask_token_id is {self.mask_token_id}, outside the model's embedding of "
                f"{model.config.vocab_size} rows"
            )
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
            check_metric_for_best_model(args, self.eval_dataset, self._metrics_of_evaluation)
        self.add_callback(StopAtBadGradients(self.accelerator))
        self.add_callback(Advise(self.train_dataset))
        if args.logging_strategy != IntervalStrategy.NO:
            self.add_callback(LogTheLastStep())
        keep_output_dtype(self.accelerator)
        leave_compilation_to_us(self.accelerator)

    def _metrics_of_evaluation(self, dataset: Dataset) -> Collection[str]:
        """What an evaluation of this dataset reports beside the loss."""
        return self.metric_names

    def _ready(self, model: nn.Module) -> nn.Module:
        """The model checked, with its adapter, and without what an earlier trainer left on it."""
        check_model(model, self.args, gets_adapter=self.peft_config is not None)
        if self.args.mask_token_id is not None:  # what is saved must be asked with the mask it was trained on
            model.config.mask_token_id = self.args.mask_token_id
        number = self.args.train_top_layers
        if self.peft_config is not None:
            config = self.peft_config
            if number is not None:
                config = adapter_on_top_layers(config, number, model.config.num_hidden_layers)
            model = add_adapter(model, config, seed=self.args.seed)
        elif number is not None:
            if is_peft_model(model):
                raise ValueError("train_top_layers cannot move the adapter of a PeftModel: pass peft_config")
            train_top_layers(model, number)
        keep_differentiable(model)
        if is_peft_model(model):
            check_adapters(model)
            leave_adapter_inputs_to_autocast(model)
        if self.args.disable_dropout:
            switch_dropout_off(model)
            if rate := getattr(self.peft_config, "lora_dropout", 0):
                logger.warning(
                    f"lora_dropout={rate} does nothing: disable_dropout=True, the default as in TRL's DPO, "
                    "switches every dropout off; set disable_dropout=False to train with it"
                )
        return compile_layers(release(model), self.args)

    def call_model_init(self, trial=None) -> nn.Module:
        return self._ready(self._model_of_init(trial))

    def _model_of_init(self, trial: Any = None) -> nn.Module:
        try:
            return super().call_model_init(trial)
        except RuntimeError as error:
            if "model_init should" not in str(error):  # transformers' own words, and not the function's
                raise
            raise ValueError(f"model_init must be a function of no argument or one: {error}") from error

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
        """Trains; `resume_from_checkpoint` is a folder, True (or "true") for the last whole checkpoint in
        output_dir, or "auto" for the same if there is one.

        Errors: ValueError for a checkpoint of another run or with a part missing, an output_dir that holds
            another run's checkpoints or is in use, a second call that would overwrite the first one's
            checkpoints; FloatingPointError where a loss, a gradient or a weight to be saved is not finite;
            OSError where a checkpoint cannot be written; TrainingInterrupted, a SystemExit, after SIGTERM or
            Ctrl-C (args.enable_jit_checkpoint).
        """
        if self.model is self.model_wrapped and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            release(self.model)  # an evaluation prepares the model too, without DistributedDataParallel
        self._forget()
        check_early_stopping(self.args, self.callback_handler.callbacks)
        with only_run_in(self.args.output_dir, is_writer=self.args.should_save):
            checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
            if self.args.should_save:
                remove_incomplete(self.args.output_dir)
            self._check_run(checkpoint)
            self._load_extras(checkpoint)
            with self._stopping_on_signals(), self._evaluating_at_start_once(checkpoint):
                return super().train(checkpoint, *args, **kwargs)

    def _checkpoint_to_resume(self, value: str | bool | None) -> str | None:
        """The same in every process: whole for each that has a copy of the files to save to."""
        found = [checkpoints(self.args.output_dir)]
        if self.args.world_size > 1:
            broadcast_object_list(found)
        checked = set()

        def fault(folder: Path) -> str | None:
            checked.add(str(folder))
            return self._fault_of(folder)

        checkpoint = checkpoint_to_resume(
            value, self.args.output_dir, found=found[0], fault=fault, is_told=self.is_world_process_zero()
        )
        if checkpoint not in (None, *checked) and (clause := fault(Path(checkpoint))):
            raise ValueError(f"resume_from_checkpoint: {checkpoint} {clause}")
        if checkpoint is None and found[0] and self.args.save_strategy != SaveStrategy.NO:
            self._check_first_call()
        return checkpoint

    def _check_first_call(self) -> None:
        if self.state.global_step and self.model_init is None:
            raise ValueError(
                "train() was called before on this trainer and its weights are where that run ended, whose "
                f"checkpoints in output_dir {self.args.output_dir!r} those of another run would "
                "overwrite. Go on with resume_from_checkpoint=True, make a new trainer to start again, or "
                "set save_strategy='no'"
            )

    def _run(self) -> dict[str, Any]:
        kind = type(self).__name__ if self.method is None else self.method
        adapters = self.model.peft_config if is_peft_model(self.model) else None
        return run_of(kind, self.args, self.train_dataset, self._frozen, self.mask_token_id, adapters)

    def check_start(self, resume_from_checkpoint: str | bool | None = None) -> None:
        """ValueError for what `train` refuses of checkpoints and output_dir; changes nothing."""
        self._check_run(self._checkpoint_to_resume(resume_from_checkpoint))

    def _check_run(self, checkpoint: str | None) -> None:
        self._changed: list[str] = []
        if self.train_dataset is not None:
            self._changed = on_main(self.accelerator, lambda: self._check_run_here(checkpoint))

    def _check_run_here(self, checkpoint: str | None) -> list[str]:
        """The settings that the checkpoint was written with others of."""
        if checkpoint is None:
            check_output_dir(self.args.output_dir, self._run(), self.args.save_strategy)
            return []
        self._check_engine_of(Path(checkpoint))
        return check_checkpoint(
            checkpoint,
            self._run(),
            is_plain=not (self.is_fsdp_enabled or self.is_deepspeed_enabled),
            is_adapter=is_peft_model(self.model),
            is_deepspeed=self.is_deepspeed_enabled,
        )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._changed or self.is_deepspeed_enabled:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        as_made = groups_of(self.optimizer)
        super()._load_optimizer_and_scheduler(checkpoint)
        apply_changes(self.optimizer, self.lr_scheduler, as_made, self._changed, self.args)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        check_weights(
            self.model,
            self.accelerator,
            step=self.state.global_step,
            output_dir=self._final_name(output_dir or self.args.output_dir),
            run_dir=self.args.output_dir,
        )
        super().save_model(output_dir, _internal_call=_internal_call)
        if _internal_call and self.args.should_save and self.train_dataset is not None:
            write_run(output_dir, self._run())
        if not _internal_call:
            self._write_report(output_dir or self.args.output_dir)
            self._write_card(output_dir or self.args.output_dir)

    def _write_report(self, folder: str) -> None:
        """What a report fails by must not take the run with it, whose model is written already."""
        if not (self.args.training_report and self.is_world_process_zero()):
            return
        try:
            write_report(folder, self.state.log_history, os.path.basename(os.path.abspath(folder)))
        except Exception as error:
            logger.warning(f"no {REPORT_FILE} in {folder}: {type(error).__name__}: {error}")

    def log(self, logs, start_time=None):
        if "loss" in logs:
            logs = {**logs, "vrpo/peak_memory_gb": peak_memory_gb(self.args.device)}
        super().log(logs, start_time)

    def create_model_card(self, *args, dataset=None, model_name=None, dataset_name=None, **kwargs) -> None:
        """Writes README.md to output_dir: base model, dataset, settings, last evaluation, whom to cite; and
        the report of the run as far as it is now.

        The dataset is called `dataset` by transformers and `dataset_name` by TRL; push_to_hub passes both on.
        """
        self._write_report(self.args.output_dir)  # an evaluation after save_model is in both
        self._write_card(self.args.output_dir, dataset=dataset or dataset_name, name=model_name, **kwargs)

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
            report=REPORT_FILE if os.path.isfile(os.path.join(folder, REPORT_FILE)) else None,
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
