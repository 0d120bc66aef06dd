"""AdapterTrainer: EngineTrainer with adapters whose folders stay usable.

What it adds for PEFT models: saved adapters carry LLaDA's names (vrpo.models.adapters), resuming reads them
and misses no weight, and the base that the adapter was trained on is on disk before the first step. Where it
is not (an earlier adapter merged in, a new model, a resized embedding), it is written to
output_dir/base_model, and the adapter names that folder.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from vrpo.models.adapter_config import check_kind
from vrpo.models.adapters import is_peft_model, load_adapter_weights, rename_saved_adapters
from vrpo.models.base import keep_base
from vrpo.training.engine_trainer import EngineTrainer
from vrpo.training.together import on_main


def check_adapters(model: nn.Module) -> None:
    """ValueError for a PeftModel that trainers cannot hold: adapters of an unsupported kind, or merged."""
    for name, config in model.peft_config.items():
        check_kind(config, f"adapter {name!r}")
    if any(getattr(module, "merged", False) is True for module in model.modules()):
        raise ValueError("the model's adapter is merged into its weights: call model.unmerge_adapter() first")


@contextlib.contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """PEFT's disable_adapter, and what trains stays marked as such.

    FSDP2 reads at the first pass of a model, which may be the reference's, which dtype its gradients have;
    of weights that do not train it reads none, and bf16 gradients then meet float32 weights.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with model.disable_adapter():
        for parameter in trained:
            parameter.requires_grad_(True)
        yield


class AdapterTrainer(EngineTrainer):
    """What the trainers do beyond EngineTrainer if the model is a PeftModel; else nothing."""

    _base_is_kept = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            raise ValueError(
                "no weight of the model is trainable: load a PeftModel with is_trainable=True, or merge it "
                "(model.merge_and_unload()) and pass peft_config for a new adapter"
            )
        self._keep_base()
        return super().train(*args, **kwargs)

    def _keep_base(self) -> None:
        # Once, and before anything is sharded. Under ZeRO-3 it is sharded from the start.
        if self._base_is_kept or not is_peft_model(self.model) or is_deepspeed_zero3_enabled():
            return
        kept = on_main(
            self.accelerator, lambda: keep_base(self.model, self.processing_class, self.args.output_dir)
        )
        if kept is not None:
            for config in self.model.peft_config.values():
                config.base_model_name_or_path, config.revision = str(kept), None
        self._base_is_kept = True

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.world_size == 1:
            self._keep_base()  # saved without having been trained
        super()._save(output_dir, state_dict)
        if is_peft_model(self.model) and self.args.should_save:
            rename_saved_adapters(self.model, output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        model = self.model if model is None else model
        if is_peft_model(model) and not self.is_fsdp_enabled:
            self._load_adapters(model, resume_from_checkpoint)
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if is_peft_model(self.model) and not (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self._load_adapters(self.model, self.state.best_model_checkpoint)
        else:
            super()._load_best_model()

    @staticmethod
    def _load_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
        for name in model.peft_config:
            load_adapter_weights(model, Path(folder) / ("" if name == "default" else name), name)
