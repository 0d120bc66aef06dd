"""EngineTrainer: transformers.Trainer on DDP, FSDP2 and DeepSpeed alike.

What it adds: `save_model` writes whole weights under every engine, also where each process holds a part of
them; a checkpoint of parts has the configuration and the tokenizer beside them; the processes of a run have
equally long batches (balance.py); and FSDP2 reduces gradients after every pack.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.utils.data import RandomSampler, Sampler
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME

from vrpo.models.adapters import is_peft_model
from vrpo.training.balance import BalancedSampler
from vrpo.training.engine_checkpoints import check_engine_of, check_zero_checkpoint, engine_of
from vrpo.training.zero import loads_universal, zero_stage


class SetEpoch(TrainerCallback):
    """Tells the sampler of the training set its epoch.

    Resumed inside an epoch, accelerate's DataLoaders wrap the sampler three times and reach through two, so
    that several processes would go on in the order of the first epoch.
    """

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        sampler = getattr(train_dataloader, "batch_sampler", None)
        while sampler is not None and not isinstance(sampler, BalancedSampler):
            sampler = getattr(sampler, "batch_sampler", None) or getattr(sampler, "sampler", None)
        if sampler is not None:
            sampler.set_epoch(int(state.epoch or 0))


class MendUniversal(TrainerCallback):
    """What DeepSpeed's loading of a universal checkpoint leaves wrong under ZeRO-3, before the first step.

    It gives all groups of the optimizer the settings of the first one, so that norms decay too, and all
    states one step counter, which each then counts up; small weights, which stay gathered, keep the values
    that they had.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._settings: list[dict[str, Any]] = []

    def remember(self, optimizer: torch.optim.Optimizer) -> None:
        """The settings of an optimizer's groups, but for the rate, which is the schedule's."""
        self._settings = [
            {name: value for name, value in group.items() if name not in ("params", "lr", "initial_lr")}
            for group in optimizer.param_groups
        ]

    def on_train_begin(self, args, state, control, **kwargs):
        if zero_stage(self.accelerator) != 3 or not loads_universal(self.accelerator):
            return
        engine = self.accelerator.deepspeed_engine_wrapped.engine
        if self._settings:  # else DeepSpeed made the optimizer, with one group
            for group, settings in zip(engine.optimizer.param_groups, self._settings, strict=True):
                group.update(settings)
        for state in engine.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].clone()
        engine.empty_partition_cache()


class EngineTrainer(Trainer):
    """The same files and the same batches, whatever engine holds the model."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.add_callback(SetEpoch())
        self._mend_universal = MendUniversal(self.accelerator)
        self.add_callback(self._mend_universal)
        if self.is_fsdp_enabled and self.accelerator.is_fsdp2:
            self._sync_each_batch_by_default()

    def _sync_each_batch_by_default(self) -> None:
        """FSDP2 adds up whole gradients until it may reduce them, 16 GB for 8 B weights in 16 bits.

        Reduced after every pack, a process holds its part of them only, added up in the dtype of the weights.
        """
        asked = dict(self.args.accelerator_config.gradient_accumulation_kwargs or {})
        settings = self.accelerator.gradient_state.plugin_kwargs
        self.accelerator.gradient_state.plugin_kwargs = {"sync_each_batch": True} | settings
        if asked.get("sync_each_batch") is False:
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = False

    @property
    def _syncs_each_batch(self) -> bool:
        return self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*args, **kwargs)
        self._mend_universal.remember(optimizer)
        return optimizer

    def _check_engine_of(self, checkpoint: Path) -> None:
        """ValueError where this engine, with so many processes, cannot go on from the checkpoint."""
        stage = zero_stage(self.accelerator)
        sharded = "fsdp" if self.is_fsdp_enabled else "plain"
        check_engine_of(checkpoint, "deepspeed" if stage is not None else sharded)
        if stage is not None and engine_of(checkpoint) is not None:
            check_zero_checkpoint(
                checkpoint,
                world_size=self.args.world_size,
                stage=stage,
                is_universal=loads_universal(self.accelerator),
                loads_best=self.args.load_best_model_at_end,
            )

    @property
    def _holds_parts(self) -> bool:
        """Whether no process has the whole weights when they are saved."""
        if self.is_fsdp_enabled:
            return "FULL_STATE_DICT" not in str(self.accelerator.state.fsdp_plugin.state_dict_type)
        return zero_stage(self.accelerator) == 3

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Writes weights (of a PeftModel its adapters), configuration and tokenizer; all processes call it.

        Under FSDP with SHARDED_STATE_DICT and under ZeRO-3 the weights are gathered in the memory of the
        first process. Checkpoints keep them in parts, but for adapters and save_only_model.
        """
        if not self._holds_parts:
            super().save_model(output_dir, _internal_call=_internal_call)
            return
        folder = self.args.output_dir if output_dir is None else output_dir
        if _internal_call and not self.args.save_only_model and not is_peft_model(self.model):
            if self.args.should_save:
                self._save_description(folder)
            return
        weights = self._gather()
        if self.args.should_save:
            self._save(folder, state_dict=weights)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _gather(self) -> dict[str, Tensor]:
        """The weights, of a PeftModel those that train, whole and on the CPU; empty but in one process."""
        trained_only = is_peft_model(self.model)
        if self.is_deepspeed_enabled:
            if self.deepspeed is None:
                raise ValueError(
                    "under DeepSpeed ZeRO-3 a model is saved after train() has started its engine"
                )
            return self.deepspeed._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=trained_only)
        if not self.accelerator.is_fsdp2:
            return self.accelerator.get_state_dict(self.model)
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_only)
        return get_model_state_dict(self.model, options=options)

    def _save_description(self, folder: str) -> None:
        """All of a model's folder but its weights."""
        os.makedirs(folder, exist_ok=True)
        self.model.config.save_pretrained(folder)
        if self.model.can_generate():
            self.model.generation_config.save_pretrained(folder)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, os.path.join(folder, TRAINING_ARGS_NAME))

    def _costs_of_epoch(self, dataset: Any, epoch: int) -> Sequence[int]:
        """Tokens of each example of the training set in an epoch."""
        raise NotImplementedError

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        args, sampler = self.args, super()._get_train_sampler(train_dataset)
        if sampler is None or args.world_size == 1:
            return sampler
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if isinstance(sampler, RandomSampler):
            # What accelerate would put in its place, which it cannot see inside another sampler.
            sampler = SeedableRandomSampler(dataset, data_seed=args.data_seed)
        return BalancedSampler(
            sampler,
            lambda epoch: self._costs_of_epoch(dataset, epoch),
            batch_size=args.train_batch_size,
            num_processes=args.world_size,
            num_batches=args.gradient_accumulation_steps,
            drop_last=args.dataloader_drop_last,
        )
