"""KTOObjective: losses of single responses that are labelled desirable or undesirable.

Axes as in vrpo/batch.py: one response per example, so R = B; K samples, G independent replicates.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo.objectives.curves import Sigmoid
from vrpo.objectives.preference import log_ratio, replicate_means, standard_error

LOSSES = ("kto", "apo_zero_unpaired")


@dataclass(frozen=True, eq=False)
class KTOObjective:
    """The loss of each response.

        d = B_policy(y) - B_ref(y)                             log-ratio, nats, a sum over the response
        kto: weight * (1 - sigmoid(+-beta (d - z0)))           + desirable, - undesirable
        z0 = max(0, mean of d over the batch of all processes), without gradient

    apo_zero_unpaired has no z0: it is 0. Where the KTO paper (arXiv 2402.01306 Eq. 7) and TRL estimate z0
    from prompts with completions of other rows, which costs another pass of both models, ELBO-KTO takes the
    batch itself: the responses at hand, with the same masks in policy and reference.

    is_desirable_R: bool. replicate_K: as in MaskDraw.
    desirable_weight, undesirable_weight: factors of the two kinds, for data that have more of one.
    sum_over_processes: of a tensor; the identity for one process.
    """

    is_desirable_R: Tensor
    replicate_K: tuple[int, ...]
    loss_type: str = "kto"
    beta: float = 0.1
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0
    sum_over_processes: Callable[[Tensor], Tensor] = lambda total: total

    def __call__(self, policy_RK: Tensor, reference_RK: Tensor | None) -> Tensor:
        """loss_B (B,), differentiable in policy_RK (R, K); in [0, weight]."""
        ratio_R = log_ratio(policy_RK, reference_RK)
        return self.losses(ratio_R, self.center(ratio_R))

    def losses(self, ratio_R: Tensor, center: Tensor) -> Tensor:
        return self._weight(ratio_R) * Sigmoid()(self._sign(ratio_R) * self.beta * (ratio_R - center))

    @torch.no_grad()
    def center(self, ratio_R: Tensor) -> Tensor:
        """z0, 0-dim, nats. All processes must call it: it sums over them."""
        if self.loss_type == "apo_zero_unpaired":
            return ratio_R.new_zeros(())
        total = torch.stack([ratio_R.double().sum(), ratio_R.new_tensor(len(ratio_R), dtype=torch.float64)])
        total, count = self.sum_over_processes(total).unbind()
        return (total / count).clamp(min=0).to(ratio_R.dtype)

    @torch.no_grad()
    def noise(self, policy_RK: Tensor, reference_RK: Tensor, center: Tensor) -> dict[str, Tensor]:
        """What the noise of the ELBOs does to each response, (B,) each; {} with a single replicate.

        The score beta (d - z0) of one response is not a difference of two: nothing of its noise cancels but
        what policy and reference share. z0, a mean over the batch, is taken as exact.

        score_std: standard error of beta d, from the spread between its G replicates.
        loss_bias, loss_bias_bound: f'' v / 2 of this loss, and min(std / 8, v / (12 sqrt 3)), times weight.
        sign_flips: Phi(-|s| / std) of s = beta (d - z0).
        gradient_noise: share of noise in the root mean square of dloss/dB, as in PairObjective.noise.
        """
        if max(self.replicate_K) == 0:
            return {}
        score_RG = self.beta * replicate_means(policy_RK - reference_RK, self.replicate_K)
        return self.noise_of(log_ratio(policy_RK, reference_RK), standard_error(score_RG), center)

    def noise_of(self, ratio_R: Tensor, std_R: Tensor, center: Tensor) -> dict[str, Tensor]:
        """The same from log-ratios d, nats, and the standard errors of their scores beta d."""
        score_R = self.beta * (ratio_R - center)
        side_R, weight_R, curve = self._sign(score_R) * score_R, self._weight(score_R), Sigmoid()
        slope_R = curve.slope(side_R, std_R)
        change_R = curve.curvature(side_R, std_R) * std_R
        mean_square_R = slope_R.square() + change_R.square()
        return {
            "score_std": std_R,
            "loss_bias": weight_R * curve.bias(side_R, std_R),
            "loss_bias_bound": weight_R * curve.bound(side_R, std_R),
            "sign_flips": torch.special.ndtr(-score_R.abs() / std_R.clamp(min=1e-12)),
            "gradient_noise": change_R.abs() / mean_square_R.clamp(min=1e-30).sqrt(),
        }

    def _sign(self, like: Tensor) -> Tensor:
        """Of the score inside the sigmoid that the loss is: 1 - sigmoid(x) = sigmoid(-x)."""
        return 1 - 2 * self.is_desirable_R.to(like)

    def _weight(self, like: Tensor) -> Tensor:
        is_desirable_R = self.is_desirable_R.to(like)
        return self.desirable_weight * is_desirable_R + self.undesirable_weight * (1 - is_desirable_R)
