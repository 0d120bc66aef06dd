"""DiffusionKTOTrainer: preference training on single labelled responses (ELBO-KTO)."""

from vrpo import data
from vrpo.batch import ResponseBatch
from vrpo.gradient import StepResult
from vrpo.objectives.pairs import NOISE
from vrpo.objectives.preference import log_ratio
from vrpo.objectives.unpaired import KTOObjective
from vrpo.training.kto_config import DiffusionKTOConfig
from vrpo.training.packed_trainer import Metrics
from vrpo.training.reference_trainer import ReferenceTrainer


class DiffusionKTOTrainer(ReferenceTrainer):
    """KTO (arXiv 2402.01306) of a masked-diffusion LM: ELBOs in the place of log-probabilities.

    A batch, of all processes, is one micro-batch: z0 is its mean, however it is cut into packs. Where it does
    not fit max_tokens_per_pack it is replayed pack by pack.

    Args: as VRPOTrainer, with DiffusionKTOConfig; datasets in TRL's unpaired format `prompt`, `completion`,
        `label` (true: desirable), text or messages, or `prompt_ids`, `completion_ids`, `label`; pairs
        without a label are taken apart.

    Metrics, means over responses: `rewards/{chosen,rejected}` (beta times the log-ratio, over the desirable
    and over the undesirable ones), `rewards/margins` (their difference), `kl` (z0, nats), `logps/completion`,
    `elbo/ref_completion` (nats), `elbo/completion_per_token`, `vrpo/tokens_per_second`. With independent
    replicates also `vrpo/{score_std,loss_bias,loss_bias_bound,sign_flips,gradient_noise}`, of the score of
    one response and not of a pair: see `KTOObjective.noise`.
    """

    args: DiffusionKTOConfig
    config_class = DiffusionKTOConfig
    collator = data.LabelledCollator
    prepare_dataset = staticmethod(data.prepare_labelled)
    method = "kto"
    whole_batches = True
    metric_names = (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "kl",
        "logps/completion",
        "elbo/ref_completion",
        "elbo/completion_per_token",
        *(f"vrpo/{name}" for name in NOISE),
    )

    def _objective(self, batch: ResponseBatch, replicate_K: tuple[int, ...]) -> KTOObjective:
        args = self.args
        return KTOObjective(
            batch.side_R == 0,
            replicate_K,
            loss_type=args.loss_type,
            beta=args.beta,
            desirable_weight=args.desirable_weight,
            undesirable_weight=args.undesirable_weight,
            sum_over_processes=lambda total: self.accelerator.reduce(total, reduction="sum"),
        )

    def _metrics(self, batch: ResponseBatch, result: StepResult) -> Metrics:
        objective = self._objective(batch, result.replicate_K)
        policy_RK, reference_RK = result.policy_RK, result.reference_RK
        ratio_R = log_ratio(policy_RK, reference_RK)
        center, reward_R = objective.center(ratio_R), self.args.beta * ratio_R
        policy_R = policy_RK.mean(dim=1)
        is_desirable_R = (batch.side_R == 0).to(ratio_R)
        noise = objective.noise(policy_RK, reference_RK, center)
        return {
            # Over all responses; `_means_of_kinds` divides by the share of their kind.
            "rewards/chosen": reward_R * is_desirable_R,
            "rewards/rejected": reward_R * (1 - is_desirable_R),
            "label": is_desirable_R,
            "kl": center.expand_as(ratio_R),
            "logps/completion": policy_R,
            "elbo/ref_completion": reference_RK.mean(dim=1),
            "elbo/completion_per_token": policy_R / batch.response_length_R.to(policy_R),
            **{f"vrpo/{name}": value_R for name, value_R in noise.items()},
        }

    def _take(self, mode: str) -> dict[str, float]:
        return _means_of_kinds(super()._take(mode))


def _means_of_kinds(means: dict[str, float]) -> dict[str, float]:
    """Rewards as means over the responses of their kind; those of a kind that did not occur are left out."""
    if "label" not in means:
        return means
    share = means.pop("label")
    chosen, rejected = means.pop("rewards/chosen"), means.pop("rewards/rejected")
    if share > 0:
        means["rewards/chosen"] = chosen / share
    if share < 1:
        means["rewards/rejected"] = rejected / (1 - share)
    if 0 < share < 1:
        means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
    return means
