"""The scalar functions that preference losses are made of, and what a noisy score does to each.

Every loss is a sum of f(s) with s linear in the ELBOs (losses.py). Estimated ELBOs are unbiased, so s is, and
f(s) is not: E f(s) - f(E s) is the bias that a finite number of samples K puts into the loss. A curve reports
it from the score and its standard error std, v = std^2:

    bias(s, std)     its estimate: f''(s) v / 2, the second order of a Taylor series at E s, where f is smooth
    bound(s, std)    what its magnitude never exceeds, whatever the distribution of the score:
                     min(h std, c v / 2), h = (sup f' - inf f') / 2, c = sup |f''|

The first bound holds because a linear function has no bias, so that f may be tilted until |f'| <= h.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

_TINY = 1e-12  # for a std of 0 below a fraction whose numerator is then 0, or that a zero multiplies


class Curve:
    """A loss as a function of one score, (..., ) -> (..., ), in the dtype of the score; finite where that is.

    slope: f'(s). curvature: f''(s), or what takes its place where f has a kink.
    half_range: h, or infinity. max_curvature: c.
    """

    half_range: float
    max_curvature: float

    def __call__(self, score: Tensor) -> Tensor:
        raise NotImplementedError

    def slope(self, score: Tensor, std: Tensor) -> Tensor:
        raise NotImplementedError

    def curvature(self, score: Tensor, std: Tensor) -> Tensor:
        raise NotImplementedError

    def bias(self, score: Tensor, std: Tensor) -> Tensor:
        """E f(s) - f(E s) to second order in std."""
        return self.curvature(score, std) * std.square() / 2

    def bound(self, score: Tensor, std: Tensor) -> Tensor:
        """An upper bound of |E f(s) - f(E s)|; std must be exact for it to be one."""
        second = std.square() * (self.max_curvature / 2)
        return second if math.isinf(self.half_range) else torch.minimum(std * self.half_range, second)


@dataclass(frozen=True)
class Softplus(Curve):
    """f(s) = softplus(-s) + tilt s = -log sigmoid(s) + tilt s.

    Label smoothing is a tilt, since softplus(s) = s + softplus(-s): cDPO's
    (1 - e) softplus(-s) + e softplus(s) has tilt e, robust DPO's
    ((1 - e) softplus(-s) - e softplus(s)) / (1 - 2 e) has tilt -e / (1 - 2 e). A tilt has no bias.
    """

    tilt: float = 0.0
    half_range: ClassVar[float] = 1 / 2
    max_curvature: ClassVar[float] = 1 / 4

    def __call__(self, score):
        loss = softplus(-score)
        return loss + self.tilt * score if self.tilt else loss

    def slope(self, score, std):
        return self.tilt - torch.sigmoid(-score)

    def curvature(self, score, std):
        return torch.sigmoid(score) * torch.sigmoid(-score)

    def jackknife_bias(self, score: Tensor, std: Tensor, num_replicates: int) -> Tensor:
        """The bias that the jackknife of f leaves, to fourth order: -f''''(s) G v^2 / (8 (G - 1)).

        For Gaussian replicates, whose third cumulant is 0. std is an estimate from G replicates, of which
        E v_hat^2 = v^2 (G + 1) / (G - 1); hence the G + 1 below.
        """
        product = self.curvature(score, std)
        fourth_derivative = product * (1 - 6 * product)
        return -fourth_derivative * std.square().square() * (num_replicates / (8 * (num_replicates + 1)))

    def jackknife_bound(self, score: Tensor, std: Tensor, num_replicates: int) -> Tensor:
        """min(sqrt(G - 1) std / 2, v / 8): with J = f(s) - (G - 1) d, d = mean_g f(s^(-g)) - f(s),

        convexity gives 0 <= d <= c v_hat / (2 (G - 1)) and d <= h sqrt(v_hat / (G - 1)), so that the bias of
        J lies between that of f and the negative of (G - 1) E d.
        """
        return torch.minimum(std * (math.sqrt(num_replicates - 1) / 2), std.square() / 8)


@dataclass(frozen=True)
class Sigmoid(Curve):
    """f(s) = sigmoid(s), in [0, 1]; neither convex nor concave, so its bias has either sign."""

    half_range: ClassVar[float] = 1 / 8
    max_curvature: ClassVar[float] = 1 / (6 * math.sqrt(3))

    def __call__(self, score):
        return torch.sigmoid(score)

    def slope(self, score, std):
        return torch.sigmoid(score) * torch.sigmoid(-score)

    def curvature(self, score, std):
        return self.slope(score, std) * (torch.sigmoid(-score) - torch.sigmoid(score))


@dataclass(frozen=True)
class Square(Curve):
    """f(s) = (s - target)^2; its bias is exactly v, whatever the distribution."""

    target: float = 0.0
    half_range: ClassVar[float] = math.inf
    max_curvature: ClassVar[float] = 2.0

    def __call__(self, score):
        return (score - self.target).square()

    def slope(self, score, std):
        return 2 * (score - self.target)

    def curvature(self, score, std):
        return torch.full_like(score, 2.0)


@dataclass(frozen=True)
class Hinge(Curve):
    """f(s) = max(0, 1 - s). No second derivative: bias, slope and curvature are those of a Gaussian score.

    slope: -p, p = Phi((1 - s) / std) the chance that the score is on the falling side.
    curvature: sqrt(p (1 - p)) / std, the standard deviation of f'(s) per unit of std.
    """

    half_range: ClassVar[float] = 1 / 2
    max_curvature: ClassVar[float] = math.inf

    def __call__(self, score):
        return torch.relu(1 - score)

    def slope(self, score, std):
        return -torch.special.ndtr(_ratio(1 - score, std))

    def curvature(self, score, std):
        ratio = _ratio(1 - score, std)
        spread = (torch.special.ndtr(ratio) * torch.special.ndtr(-ratio)).sqrt()
        return spread / std.clamp(min=_TINY)

    def bias(self, score, std):
        """std (phi(a) - |a| Phi(-|a|)), a = (1 - s) / std: exact for a Gaussian score."""
        distance = _ratio(1 - score, std).abs().clamp(max=1e3)  # both terms are 0 there, and infinity none
        density = torch.exp(-distance.square() / 2) / math.sqrt(2 * math.pi)
        return std * (density - distance * torch.special.ndtr(-distance)).clamp(min=0)

    def bound(self, score, std):
        """(sqrt(v + (1 - s)^2) - |1 - s|) / 2, which two points attain (Scarf 1958)."""
        distance = (1 - score).abs()
        return std.square() / (2 * (torch.hypot(std, distance) + distance)).clamp(min=_TINY)


@dataclass(frozen=True)
class ReverseKL(Curve):
    """f(s) = KL(Bernoulli(sigmoid(s)) || Bernoulli(1 - e)), 0 < e < 1/2; smallest at s = log((1 - e) / e).

    Source: EXO-pref with two responses, arXiv 2402.00856 Eq. (16).
    """

    epsilon: float = 1e-3

    @property
    def best(self) -> float:
        return math.log1p(-self.epsilon) - math.log(self.epsilon)

    # f' = (s - best) p q and f'' = p q (1 + (s - best) (q - p)), p = sigmoid(s), q = 1 - p, are at most what
    # their parts in s and in best are: |s p q| <= 0.22388, p q <= 1/4, |p q (q - p)| <= 1 / (6 sqrt 3).
    @property
    def half_range(self) -> float:
        return 0.22388 + self.best / 8

    @property
    def max_curvature(self) -> float:
        return 1 / 4 + self.best / (6 * math.sqrt(3))

    def __call__(self, score):
        win = torch.sigmoid(score) * (logsigmoid(score) - math.log1p(-self.epsilon))
        return win + torch.sigmoid(-score) * (logsigmoid(-score) - math.log(self.epsilon))

    def slope(self, score, std):
        return (score - self.best) * torch.sigmoid(score) * torch.sigmoid(-score)

    def curvature(self, score, std):
        win, lose = torch.sigmoid(score), torch.sigmoid(-score)
        return win * lose * (1 + (score - self.best) * (lose - win))


def jackknife(curve: Curve, score_BG: Tensor) -> Tensor:
    """f of the mean score with most of its bias from a noisy score removed, (B, G) -> (B,).

        J = G f(s) - ((G - 1) / G) sum_g f(s^(-g))

    s is the mean of the G replicate scores, s^(-g) the mean without replicate g. For f smooth,
    E f(s) - f(E s) = a / G + O(1 / G^2), a = f''(E s) Var(replicate) / 2 (method: Taylor at E s). The same
    expansion holds for f(s^(-g)) with G - 1, and G (a / G) - (G - 1) (a / (G - 1)) = 0: what is left is
    O(1 / G^2). Unlike the delta method, f(s) - f''(s) v / 2, whose v is unbounded, the result grows linearly
    in the scores if f does, so that a model cannot lower its loss by making its samples disagree.

    Needs replicates that are independent and identically distributed, at least two (G >= 2). The gradient is
    the jackknife of the gradient; it differs from that of f(s) by what noise of the score puts into f'(s).
    """
    num_replicates = score_BG.shape[1]
    if num_replicates < 2:
        raise ValueError("the jackknife loss needs at least 2 independent replicates, got 1")
    total_B1 = score_BG.sum(dim=1, keepdim=True)
    left_out_BG = (total_B1 - score_BG) / (num_replicates - 1)
    left_out_B = curve(left_out_BG).mean(dim=1)
    return num_replicates * curve(score_BG.mean(dim=1)) - (num_replicates - 1) * left_out_B


def _ratio(distance: Tensor, std: Tensor) -> Tensor:
    return distance / std.clamp(min=_TINY)
