"""RowMetrics: what a row's distribution looks like, from numbers that the pass over the vocabulary leaves."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus


class RowMetrics(NamedTuple):
    """Of every row's distribution p = softmax(logits): for logs and rewards, never differentiable.

    Attributes:
        entropy: (N,) float32, nats: -sum_v p_v log p_v, in [0, log V].
        log_sum_exp: (N,) float32, nats: the logarithm of the softmax's denominator.
        top1: (N,) bool: no class has a larger logit than the target (up to the rounding of the logits).
    """

    entropy: Tensor
    log_sum_exp: Tensor
    top1: Tensor


def capped(logit: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logit / softcap); 0 stands for no soft-cap."""
    return softcap * torch.tanh(logit / softcap) if softcap else logit


def cap_slope(logit: Tensor, softcap: float) -> Tensor:
    """Derivative of `capped`: sech^2(logit / softcap), without cancellation where it is small."""
    if not softcap:
        return torch.ones_like(logit)
    t = torch.exp(-2 * (logit / softcap).abs())
    return 4 * t / (1 + t) ** 2


def row_metrics(statistics: Tensor, metrics: Tensor, softcap: float) -> RowMetrics:
    """RowMetrics from what `op._forward` returns.

    With q = 1 - p_target, and p' = p / q the distribution of the other classes:

        entropy = -(1 - q) log(1 - q) - q log q + q H(p'),   H(p') = log s - sum exp(z - m) (z - m) / s

    which adds up terms that are all >= 0: no difference of large numbers.

    Args:
        statistics: (3, N): the target's logit before the soft-cap, shift m, s; see `op._forward`.
        metrics: (2, N): largest other logit; sum over the other classes of exp(z - m) (z - m).
        softcap: 0 for none.
    """
    target_logit, shift, total = statistics.double()
    highest, spread = metrics.double()
    target_logit = capped(target_logit, softcap)
    alone = total == 0  # V = 1: the target is the only class
    log_total = torch.where(alone, 0.0, total.log())
    log_odds = torch.where(alone, float("-inf"), (shift - target_logit) + log_total)
    nll, rest = softplus(log_odds, threshold=1e9), softplus(-log_odds, threshold=1e9)
    others = (log_total - spread / total).clamp(min=0.0)
    entropy = torch.sigmoid(-log_odds) * nll + torch.sigmoid(log_odds) * (rest + others)
    return RowMetrics(
        entropy=torch.where(alone, 0.0, entropy).float(),
        log_sum_exp=(target_logit + nll).float(),
        top1=alone | (target_logit >= highest),
    )
