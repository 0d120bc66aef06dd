"""The formula of `cross_entropy` and of its gradient, in whatever dtype it is given."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _log_odds(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(z - m) of every class but the target, its sum, and the log-odds of "not the target"."""
    others_NV = logits_NV.scatter(1, target_N[:, None], float("-inf"))
    # The clamps give rows without another class (V = 1, or all others -inf) an nll and a gradient of 0.
    numbers = torch.finfo(logits_NV.dtype)
    maximum_N1 = others_NV.detach().amax(dim=1, keepdim=True).clamp(min=numbers.min)
    share_NV = (others_NV - maximum_N1).exp()
    total_N = share_NV.sum(dim=1).clamp(min=numbers.tiny)
    log_odds_N1 = maximum_N1 - logits_NV.gather(1, target_N[:, None])
    return share_NV, total_N, log_odds_N1[:, 0] + total_N.log()


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """nll_n = softplus(log sum over v != target of exp(z_nv) - z_n,target) = -log softmax(z_n)[target].

    The target stays out of the sum, so that rows with a probability near 1 keep their relative accuracy.

    Args: logits_NV (N, V) floating; target_N (N,) int64 in [0, V).
    Returns: nll_N (N,) in the dtype of the logits, nats.
    """
    return F.softplus(_log_odds(logits_NV, target_N)[2])


def gradient(dnll_N: Tensor, logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """dlogits_nv = dnll_n * (softmax(z_n)_v - [v = target_n]), (N, V)."""
    share_NV, total_N, log_odds_N = _log_odds(logits_NV, target_N)
    scale_N = dnll_N * torch.sigmoid(log_odds_N)  # sigmoid(log-odds) = 1 - p(target), no cancellation
    return ((scale_N / total_N)[:, None] * share_NV).scatter(1, target_N[:, None], -scale_N[:, None])
