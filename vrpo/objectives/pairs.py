"""PairObjective: a weighted list of preference losses as one function of ELBO estimates, with its noise.

Axes as in vrpo/batch.py: R = 2B responses in the order (pair, side), K samples, G independent replicates.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vrpo.objectives.curves import jackknife
from vrpo.objectives.losses import LOSSES, Score, Settings, Term, check_losses, needs_reference
from vrpo.objectives.preference import denoising_loss, replicate_means, standard_error

NOISE = ("score_std", "loss_bias", "loss_bias_bound", "sign_flips", "gradient_noise")
"""What `PairObjective.noise` reports."""


@dataclass(frozen=True, eq=False)
class PairObjective:
    """The loss of each pair: sum_i loss_weights_i * loss_i + sft_weight * (-B_policy(y_w) / L_w).

    The last term is the masked-diffusion SFT loss of the chosen response (arXiv 2505.19223 App. D), nats per
    token; linear in the ELBO, it has no finite-K bias.

    response_length_R: L of each response, in tokens. replicate_K: as in MaskDraw.
    loss_type: names of losses.LOSSES. loss_weights: None for 1 each.
    beta, label_smoothing, simpo_gamma: see losses.py for what they are in each loss.
    """

    response_length_R: Tensor
    replicate_K: tuple[int, ...]
    loss_type: tuple[str, ...] = ("sigmoid",)
    loss_weights: tuple[float, ...] | None = None
    beta: float = 0.2
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        check_losses(
            self.loss_type,
            self.loss_weights,
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            simpo_gamma=self.simpo_gamma,
            sft_weight=self.sft_weight,
        )

    @property
    def uses_reference(self) -> bool:
        return needs_reference(self.loss_type)

    @cached_property
    def terms(self) -> list[tuple[float, Term]]:
        """(weight, term): the weight of its loss times its own."""
        given = Settings(self.beta, self.label_smoothing, self.simpo_gamma)
        weights = self.loss_weights or (1.0,) * len(self.loss_type)
        losses = zip(weights, self.loss_type, strict=True)
        return [(weight * term.weight, term) for weight, name in losses for term in LOSSES[name](given)]

    @cached_property
    def margin(self) -> Score:
        """What is reported as the preference score: that of DPO; of reference-free losses that of SimPO."""
        return Score(1, -1, self.beta, not self.uses_reference, self.uses_reference)

    def __call__(self, policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
        """loss_B (B,), differentiable in policy_RK (R, K); both in nats, float32 or float64.

        reference_RK may be None where no loss needs one. Averages over samples stay inside the curves.
        """
        total_B = 0.0
        for weight, term in self.terms:
            if term.is_jackknife:
                loss_B = jackknife(term.curve, self._scores(term.score, policy_RK, reference_RK))
            else:
                loss_B = term.curve(self._score(term.score, policy_RK, reference_RK))
            total_B = total_B + (loss_B if weight == 1 else weight * loss_B)
        if self.sft_weight:
            total_B = total_B + self.sft_weight * self.sft_loss(policy_RK)
        return total_B

    def sft_loss(self, policy_RK: Tensor) -> Tensor:
        """-B / L of the chosen response, (B,), nats per token."""
        return denoising_loss(policy_RK[0::2], self.response_length_R[0::2].to(policy_RK.device))

    def score(self, policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
        """The preference score of each pair (B,), dimensionless: exactly 0 where policy equals reference."""
        return self._score(self.margin, policy_RK, reference_RK)

    def rewards(self, policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
        """(B, 2): beta times the log-ratio of each response; of reference-free losses beta B / L."""
        value_R = self._values(self.margin, policy_RK, reference_RK).mean(dim=1)
        if self.margin.per_token:
            value_R = value_R / self.response_length_R.to(value_R)
        return self.beta * value_R.view(-1, 2)

    @torch.no_grad()
    def noise(self, policy_RK: Tensor, reference_RK: Tensor | None) -> dict[str, Tensor]:
        """What the noise of the estimated ELBOs does to each pair, (B,) each; {} with a single replicate.

        score_std: standard error of the preference score, from the spread between its G replicates
            (preference.standard_error).
        loss_bias: E loss - loss(E score) of the actual losses, their weights included; signed (curves.py).
        loss_bias_bound: what its magnitude does not exceed, were the standard errors exact.
        sign_flips: Phi(-|s| / std), the chance that a Gaussian score of this mean and std has the other sign.
        gradient_noise: share of noise in the root mean square of the gradient's coefficients dloss/dB_w and
            dloss/dB_l, std / sqrt(mean^2 + std^2), to first order; for sigmoid about sigmoid(s) std.
        """
        num_replicates = max(self.replicate_K) + 1
        if num_replicates == 1:
            return {}
        score_B = self.score(policy_RK, reference_RK)
        std_B = standard_error(self._scores(self.margin, policy_RK, reference_RK))
        bias_B = bound_B = 0.0
        slope_B2 = change_B2G = 0.0
        for weight, term in self.terms:
            score_BG = self._scores(term.score, policy_RK, reference_RK)
            mean_B, term_std_B = score_BG.mean(dim=1), standard_error(score_BG)
            if term.is_jackknife:
                bias = term.curve.jackknife_bias(mean_B, term_std_B, num_replicates)
                bound = term.curve.jackknife_bound(mean_B, term_std_B, num_replicates)
            else:
                bias, bound = term.curve.bias(mean_B, term_std_B), term.curve.bound(mean_B, term_std_B)
            bias_B, bound_B = bias_B + weight * bias, bound_B + weight * bound
            per_nat_B2 = weight * self._per_nat(term.score, policy_RK)
            slope_B2 = slope_B2 + per_nat_B2 * term.curve.slope(mean_B, term_std_B)[:, None]
            curvature_B = term.curve.curvature(mean_B, term_std_B)
            change_BG = curvature_B[:, None] * (score_BG - mean_B[:, None])
            change_B2G = change_B2G + per_nat_B2[:, :, None] * change_BG[:, None, :]
        variance_B = change_B2G.square().sum(dim=(1, 2)) / (num_replicates * (num_replicates - 1))
        mean_square_B = slope_B2.square().sum(dim=1) + variance_B
        return {
            "score_std": std_B,
            "loss_bias": bias_B,
            "loss_bias_bound": bound_B,
            "sign_flips": torch.special.ndtr(-score_B.abs() / std_B.clamp(min=1e-12)),
            "gradient_noise": (variance_B / mean_square_B.clamp(min=1e-30)).sqrt(),
        }

    def _values(self, score: Score, policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
        """The log-ratio that a score is made of, or the ELBO of the policy alone, (R, K)."""
        if not score.uses_reference:
            return policy_RK
        if reference_RK is None:
            raise ValueError(f"loss_type={list(self.loss_type)} needs the reference's ELBOs, got None")
        return policy_RK - reference_RK

    def _score(self, score: Score, policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
        value_R = self._values(score, policy_RK, reference_RK).mean(dim=1)
        return score(value_R, self.response_length_R)

    def _scores(self, score: Score, policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
        """The score from each replicate's samples alone, (B, G)."""
        value_RG = replicate_means(self._values(score, policy_RK, reference_RK), self.replicate_K)
        return score(value_RG, self.response_length_R)

    def _per_nat(self, score: Score, like: Tensor) -> Tensor:
        """What one nat of each response's ELBO adds to the score, (B, 2)."""
        per_nat_B2 = like.new_tensor([score.chosen, score.rejected]).mul(score.scale)
        per_nat_B2 = per_nat_B2.expand(len(like) // 2, 2)
        return per_nat_B2 / self.response_length_R.to(like).view(-1, 2) if score.per_token else per_nat_B2
