"""ReferenceTrainer: a DiffusionTrainer whose objective compares the policy with a frozen reference."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator.masking import has_replicates
from vrpo.gradient import StepResult
from vrpo.models import load_tokenizer
from vrpo.models.adapters import is_peft_model
from vrpo.models.checkpoint import load_policy
from vrpo.objectives.pairs import NOISE
from vrpo.step import NLL, Estimator
from vrpo.training.adapter_trainer import adapter_off
from vrpo.training.argument_types import check_config, check_reference_argument
from vrpo.training.checks import check_masked_diffusion
from vrpo.training.config import ReferenceConfig
from vrpo.training.known_reference import CheckEpochs, KnownReference
from vrpo.training.packed_trainer import Metrics, ModelNLL
from vrpo.training.precomputed import check_precompute, precompute
from vrpo.training.reference import build_reference
from vrpo.training.resume import digest_of_weights
from vrpo.training.sync_reference import SyncReference
from vrpo.training.trainer import DiffusionTrainer
from vrpo.training.trunk import shared_layers, with_trunk
from vrpo.training.used_rows import rows_of_training


class ReferenceTrainer(DiffusionTrainer):
    """What trainers with a reference share; not used by itself. VRPOTrainer explains the arguments."""

    args: ReferenceConfig
    config_class: type[ReferenceConfig]
    known_reference: KnownReference | None = None
    _sync: SyncReference | None = None

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
        ref_model: str | PreTrainedModel | None = None,
        args: ReferenceConfig | None = None,
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
        check_reference_argument(ref_model)
        args = self.config_class(output_dir=f"{self.method}_output") if args is None else args
        check_config(args, self.config_class)
        self.args = args
        if not self.needs_reference:
            if ref_model is not None:
                raise ValueError(f"ref_model is of no use to loss_type={args.loss_type}: leave it out")
            self.metric_names = tuple(name for name in self.metric_names if "/ref_" not in name)
        if getattr(args, "ld_alpha", None) is not None:
            self.metric_names = tuple(name for name in self.metric_names if name != "vrpo/sft_loss")
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_policy(model, dtype=torch.float32)
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model is the model itself and would move with it; pass None or a copy")
        if isinstance(ref_model, str):
            dtype = next(model.parameters()).dtype if model is not None else torch.float32
            attention = model.config._attn_implementation if model is not None else "vrpo"
            ref_model = load_policy(ref_model, dtype=dtype, attn_implementation=attention)
        if ref_model is not None:
            check_masked_diffusion(ref_model, "ref_model")
        self._given_reference = ref_model
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
            compute_metrics=compute_metrics,
            model_init=model_init,
        )
        self._set_reference()

    @property
    def needs_reference(self) -> bool:
        """Whether the objective looks at a reference; without one none is copied, kept or run."""
        return True

    def _metrics_of_evaluation(self, dataset):
        args, names = self.args, super()._metrics_of_evaluation(dataset)
        if has_replicates(args.mask_design, args.num_samples // args.masks_per_level, args.num_replicates):
            return names
        return [name for name in names if name.removeprefix("vrpo/") not in NOISE]

    def _set_reference(self) -> None:
        self._trunk_layers, self.ref_model = 0, None
        if self.args.precompute_ref_log_probs:
            known = (check_precompute if self.is_dry_run else precompute)(self, self._given_reference)
            self.known_reference = known
            self._given_reference = None  # nobody needs it any more
            self.add_callback(CheckEpochs(self.known_reference, lambda: rows_of_training(self)))
            return
        if self.needs_reference:
            self._trunk_layers = shared_layers(self.model, self._given_reference, self.args.share_trunk)
            self.ref_model = build_reference(self, self._given_reference)
        if self.args.sync_ref_model:
            if self._sync is not None:  # of an earlier trial
                self.remove_callback(self._sync)
            self._sync = SyncReference(self, self.ref_model)
            self.add_callback(self._sync)

    def _save_extras(self, folder: str) -> None:
        super()._save_extras(folder)
        if self._sync is not None:
            self._sync.save(folder, is_writer=self.args.should_save)

    def _load_extras(self, checkpoint: str | None) -> None:
        super()._load_extras(checkpoint)
        if self._sync is not None and checkpoint is not None:
            self._sync.load(checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        if self._sync is not None:  # the reference that it was the best against
            self._sync.load(self.state.best_model_checkpoint)

    @property
    def estimator(self) -> Estimator:
        return replace(super().estimator, num_replicates=self.args.num_replicates)

    def _digest_of_frozen_weights(self) -> str:
        """The reference: given, or the policy as it is before training, or the model under its adapter."""
        if not self.needs_reference:
            return super()._digest_of_frozen_weights()
        model = self.model if self._given_reference is None else self._given_reference
        is_base = self._given_reference is None and is_peft_model(model)
        return digest_of_weights(
            (name, p) for name, p in model.named_parameters() if not (is_base and p.requires_grad)
        )

    def call_model_init(self, trial=None) -> nn.Module:
        """A new policy; the reference that is a copy of it is copied again."""
        model = super().call_model_init(trial)
        if hasattr(self, "ref_model"):
            self.model = model
            self._set_reference()
        return model

    def train(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.precompute_only:
            raise ValueError("precompute_only=True trains nothing: the reference ELBOs are there already")
        return super().train(*args, **kwargs)

    def _run(self) -> dict[str, Any]:
        known = self.known_reference
        return super()._run() | ({} if known is None else {"reference_elbos": known.digest})

    def _known_reference(self, batch: ResponseBatch, epoch: int) -> Tensor | None:
        known = self.known_reference
        return None if known is None else known(batch, epoch, self.estimator)

    def _metrics_of(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        if self.known_reference is not None:
            self.known_reference.observe(result, self.state.global_step)
        return super()._metrics_of(batch, result)

    def _reference(self, model: nn.Module) -> NLL | None:
        if not self.needs_reference:
            return None
        if self.ref_model is not None:
            return ModelNLL(self.ref_model)

        def nll(pack: PackedBatch) -> Tensor:
            with adapter_off(self.accelerator.unwrap_model(model)):
                return model(**pack.model_inputs()).nll

        return nll

    def _prepare_pack(self, model: nn.Module, pack: PackedBatch) -> PackedBatch:
        pack = super()._prepare_pack(model, pack)
        return with_trunk(model, pack, self._trunk_layers) if self._trunk_layers else pack
