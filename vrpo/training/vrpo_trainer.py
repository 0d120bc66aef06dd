"""VRPOTrainer: preference training on pairs, with a reference that sees the same masks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from vrpo import data
from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.gradient import StepResult
from vrpo.models import load_tokenizer
from vrpo.models.adapters import is_peft_model
from vrpo.models.checkpoint import load_policy
from vrpo.objectives import preference
from vrpo.step import NLL, Estimator, Objective, preference_objective
from vrpo.training.config import VRPOConfig
from vrpo.training.packed_trainer import Metrics, ModelNLL
from vrpo.training.reference import build_reference
from vrpo.training.resume import digest_of_weights
from vrpo.training.trainer import DiffusionTrainer
from vrpo.training.trunk import shared_layers, with_trunk


class VRPOTrainer(DiffusionTrainer):
    """Variance-reduced preference optimisation of a masked-diffusion LM (arXiv 2505.19223).

    Args:
        model: a path or hub name (of an adapter: it is merged into its base), a LLaDAForMaskedDiffusion, or
            a PeftModel of one.
        ref_model: the reference policy. None: with PEFT the model with its adapter switched off, else a
            frozen copy of the model as it is now.
        args: VRPOConfig.
        train_dataset, eval_dataset: TRL's preference format, `prompt`, `chosen`, `rejected` as text or
            messages, or token ids in `prompt_ids`, `chosen_ids`, `rejected_ids`.
        processing_class: the tokenizer; loaded from the model's path when the model is a string.
        peft_config: a peft.LoraConfig; the model is wrapped with it, drawn from args.seed. If the base is not
            at the path it came from, it is written to output_dir/base_model.
        data_collator, callbacks, optimizers: as in transformers.Trainer.

    Metrics, means over pairs: `rewards/{chosen,rejected,margins,accuracies}` (a tie counts as 0, so the
    first step logs 0), `logps/{chosen,rejected}` and `elbo/ref_{chosen,rejected}` (ELBO estimates of policy
    and reference, nats), `elbo/{chosen,rejected}_per_token`, `vrpo/sft_loss`, `vrpo/tokens_per_second`
    (packed policy tokens). Where the draw has independent replicates (num_replicates, or the design's own),
    also `vrpo/score_std` (standard error of the score, from the spread between replicates) and what follows
    from it, see `preference.noise_diagnostics`: `vrpo/{loss_bias,loss_bias_bound,sign_flips,gradient_noise}`.
    """

    args: VRPOConfig
    collator = data.PairCollator
    prepare_dataset = staticmethod(data.prepare_pairs)
    method = "vrpo"
    metric_names = (
        "rewards/accuracies",
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "logps/chosen",
        "logps/rejected",
        "elbo/ref_chosen",
        "elbo/ref_rejected",
        "elbo/chosen_per_token",
        "elbo/rejected_per_token",
        "vrpo/sft_loss",
        "vrpo/score_std",
        "vrpo/loss_bias",
        "vrpo/loss_bias_bound",
        "vrpo/sign_flips",
        "vrpo/gradient_noise",
    )

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module | None = None,
        ref_model: str | PreTrainedModel | None = None,
        args: VRPOConfig | None = None,
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
        args = args or VRPOConfig(output_dir="vrpo_output")
        if isinstance(model, str):
            processing_class = processing_class or load_tokenizer(model)
            model = load_policy(model, dtype=torch.float32)
        if ref_model is not None and ref_model is model:
            raise ValueError("ref_model is the model itself and would move with it; pass None or a copy")
        if isinstance(ref_model, str):
            dtype = next(model.parameters()).dtype if model is not None else torch.float32
            attention = model.config._attn_implementation if model is not None else "vrpo"
            ref_model = load_policy(ref_model, dtype=dtype, attn_implementation=attention)
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

    def _set_reference(self) -> None:
        self._trunk_layers = shared_layers(self.model, self._given_reference, self.args.share_trunk)
        self.ref_model = build_reference(self, self._given_reference)

    @property
    def estimator(self) -> Estimator:
        args = self.args
        return replace(super().estimator, num_replicates=args.num_replicates, pair_masks=args.pair_masks)

    def _digest_of_frozen_weights(self) -> str:
        """The reference: given, or the policy as it is before training, or the model under its adapter."""
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

    def _reference(self, model: nn.Module) -> NLL | None:
        if self.ref_model is not None:
            return ModelNLL(self.ref_model)

        def nll(pack: PackedBatch) -> Tensor:
            with self.accelerator.unwrap_model(model).disable_adapter():
                return model(**pack.model_inputs()).nll

        return nll

    def _prepare_pack(self, model: nn.Module, pack: PackedBatch) -> PackedBatch:
        pack = super()._prepare_pack(model, pack)
        return with_trunk(model, pack, self._trunk_layers) if self._trunk_layers else pack

    def _objective(self, batch: ResponseBatch, replicate_K: tuple[int, ...]) -> Objective:
        args = self.args
        return preference_objective(
            batch, replicate_K, beta=args.beta, sft_weight=args.sft_weight, loss_type=args.loss_type
        )

    def _metrics(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        beta, policy_RK, reference_RK = self.args.beta, result.policy_RK, result.reference_RK
        policy_B2 = policy_RK.mean(dim=1).view(-1, 2)
        reference_B2 = reference_RK.mean(dim=1).view(-1, 2)
        reward_B2 = beta * (policy_B2 - reference_B2)
        score_B = preference.preference_score(policy_RK, reference_RK, beta)
        length_B2 = batch.response_length_R.view(-1, 2).to(reward_B2)
        metrics = {
            "rewards/accuracies": (score_B > 0).float(),
            "rewards/margins": score_B,
            "vrpo/sft_loss": preference.denoising_loss(policy_RK[0::2], batch.response_length_R[0::2]),
        }
        score_std_B = preference.score_std(policy_RK, reference_RK, beta, result.replicate_K)
        if not score_std_B.isnan().any():
            noise = preference.noise_diagnostics(score_B, score_std_B)
            metrics["vrpo/score_std"] = score_std_B
            metrics |= {f"vrpo/{name}": value_B for name, value_B in noise.items()}
        for side, name in enumerate(("chosen", "rejected")):
            metrics[f"rewards/{name}"] = reward_B2[:, side]
            metrics[f"logps/{name}"] = policy_B2[:, side]
            metrics[f"elbo/ref_{name}"] = reference_B2[:, side]
            metrics[f"elbo/{name}_per_token"] = policy_B2[:, side] / length_B2[:, side]
        return metrics
