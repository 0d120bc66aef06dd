"""RowMetrics: what a row's distribution looks like, from numbers that the pass over the vocabulary leaves."""

from typing import NamedTuple

import torch
from torch import Tensor


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


def softplus(log_odds: Tensor) -> Tensor:
    """log(1 + exp(log_odds)) of float64, also where exp overflows: above 40 it is log_odds itself."""
    return torch.nn.functional.softplus(log_odds, threshold=40.0)


def _weighted(probability: Tensor, nats: Tensor) -> Tensor:
    """probability * nats, 0 where the probability is: a class that is out has infinitely many nats."""
    return torch.where(probability == 0, 0.0, probability * nats)


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
    highest, spread = metrics[0], metrics[1].double()
    target_logit = capped(target_logit, softcap)
    alone = total == 0  # V = 1, or all other classes out: the target is the only one
    log_others = torch.where(alone, float("-inf"), shift + total.log())
    log_odds = torch.where(alone, float("-inf"), (shift - target_logit) + total.log())
    others = torch.where(alone, 0.0, total.log() - spread / total).clamp(min=0.0)
    entropy = _weighted(torch.sigmoid(-log_odds), softplus(log_odds))
    entropy += _weighted(torch.sigmoid(log_odds), softplus(-log_odds) + others)
    none = alone & (target_logit == float("-inf"))  # no class at all: no distribution either
    return RowMetrics(
        entropy=torch.where(none, torch.nan, entropy).float(),
        log_sum_exp=torch.logaddexp(target_logit, log_others).float(),
        top1=alone | (target_logit.float() >= highest),  # both in fp32: at the cap they are equal
    )
