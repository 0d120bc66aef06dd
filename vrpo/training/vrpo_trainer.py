"""VRPOTrainer: preference training on pairs, with a reference that sees the same masks."""

from dataclasses import replace

from vrpo import data
from vrpo.batch import ResponseBatch
from vrpo.gradient import StepResult
from vrpo.objectives.losses import needs_reference
from vrpo.objectives.pairs import NOISE, PairObjective
from vrpo.step import Estimator
from vrpo.training.config import VRPOConfig
from vrpo.training.packed_trainer import Metrics
from vrpo.training.reference_trainer import ReferenceTrainer

_METRICS = (
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
)


class VRPOTrainer(ReferenceTrainer):
    """Variance-reduced preference optimisation of a masked-diffusion LM (arXiv 2505.19223).

    Args:
        model: a path or hub name (of an adapter: it is merged into its base), a LLaDAForMaskedDiffusion, or
            a PeftModel of one.
        ref_model: the reference policy. None: with PEFT the model with its adapter switched off, else a
            frozen copy of the model as it is now. Not to be given to losses that need none.
        args: VRPOConfig.
        train_dataset, eval_dataset: TRL's preference format, `prompt`, `chosen`, `rejected` as text or
            messages, or token ids in `prompt_ids`, `chosen_ids`, `rejected_ids`.
        processing_class: the tokenizer; loaded from the model's path when the model is a string.
        peft_config: a peft.LoraConfig; the model is wrapped with it, drawn from args.seed. If the base is not
            at the path it came from, it is written to output_dir/base_model.
        data_collator, callbacks, optimizers: as in transformers.Trainer.

    Metrics, means over pairs: `rewards/{chosen,rejected,margins,accuracies}` (beta times the log-ratios, for
    every loss; a tie counts as 0, so the first step logs 0), `logps/{chosen,rejected}` and
    `elbo/ref_{chosen,rejected}` (ELBO estimates of policy and reference, nats),
    `elbo/{chosen,rejected}_per_token`, `vrpo/sft_loss`, `vrpo/tokens_per_second` (packed policy tokens),
    `vrpo/peak_memory_gb` (of the main process).
    Where the draw has independent replicates (num_replicates, or the design's own), also `vrpo/score_std`
    (standard error of the score, from the spread between replicates) and what follows from it for the losses
    in use, see `PairObjective.noise`: `vrpo/{loss_bias,loss_bias_bound,sign_flips,gradient_noise}`.

    Losses without a reference (loss_type "simpo" alone) copy, keep and run none: `elbo/ref_*` are not there,
    and rewards are beta times the ELBO per token. With ld_alpha every ELBO is that of LD-DPO, in which tokens
    beyond the shorter response count ld_alpha, and `vrpo/sft_loss` is not there.
    """

    args: VRPOConfig
    config_class = VRPOConfig
    collator = data.PairCollator
    stream_sides = data.PAIR_SIDES
    prepare_dataset = staticmethod(data.prepare_pairs)
    method = "vrpo"
    metric_names = (*_METRICS, *(f"vrpo/{name}" for name in NOISE))

    @property
    def estimator(self) -> Estimator:
        return replace(super().estimator, pair_masks=self.args.pair_masks, ld_alpha=self.args.ld_alpha)

    @property
    def needs_reference(self) -> bool:
        return needs_reference(self.args.loss_type)

    def _objective(self, batch: ResponseBatch, replicate_K: tuple[int, ...]) -> PairObjective:
        args = self.args
        return PairObjective(
            batch.response_length_R,
            replicate_K,
            loss_type=tuple(args.loss_type),
            loss_weights=None if args.loss_weights is None else tuple(args.loss_weights),
            beta=args.beta,
            label_smoothing=args.label_smoothing,
            simpo_gamma=args.simpo_gamma,
            sft_weight=args.sft_weight,
        )

    def _metrics(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        objective = self._objective(batch, result.replicate_K)
        policy_RK, reference_RK = result.policy_RK, result.reference_RK
        policy_B2 = policy_RK.mean(dim=1).view(-1, 2)
        reward_B2 = objective.rewards(policy_RK, reference_RK)
        score_B = objective.score(policy_RK, reference_RK)
        length_B2 = batch.response_length_R.view(-1, 2).to(policy_B2)
        metrics = {
            "rewards/accuracies": (score_B > 0).float(),
            "rewards/margins": score_B,
        }
        if self.args.ld_alpha is None:
            metrics["vrpo/sft_loss"] = objective.sft_loss(policy_RK)
        noise = objective.noise(policy_RK, reference_RK)
        metrics |= {f"vrpo/{name}": value_B for name, value_B in noise.items()}
        for side, name in enumerate(("chosen", "rejected")):
            metrics[f"rewards/{name}"] = reward_B2[:, side]
            metrics[f"logps/{name}"] = policy_B2[:, side]
            if reference_RK is not None:
                metrics[f"elbo/ref_{name}"] = reference_RK.mean(dim=1).view(-1, 2)[:, side]
            metrics[f"elbo/{name}_per_token"] = policy_B2[:, side] / length_B2[:, side]
        return metrics
