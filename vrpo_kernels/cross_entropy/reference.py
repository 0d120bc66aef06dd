"""The formula of `cross_entropy` and of its gradient, in whatever dtype it is given."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _log_odds(logits_NV: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits without the target's, their logsumexp, and the log-odds of "not the target"."""
    others_NV = logits_NV.scatter(1, target_N[:, None], float("-inf"))
    # The clamp gives the vocabulary of one class, where no other class exists, its nll of 0.
    lowest = torch.finfo(logits_NV.dtype).min
    log_rest_N = others_NV.logsumexp(dim=1).clamp(min=lowest)
    return others_NV, log_rest_N, log_rest_N - logits_NV.gather(1, target_N[:, None])[:, 0]


def cross_entropy(logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """nll_n = softplus(log sum over v != target of exp(z_nv) - z_n,target) = -log softmax(z_n)[target].

    The target stays out of the sum, so that rows with a probability near 1 keep their relative accuracy.

    Args: logits_NV (N, V) floating; target_N (N,) int64 in [0, V).
    Returns: nll_N (N,) in the dtype of the logits, nats.
    """
    return F.softplus(_log_odds(logits_NV, target_N)[2])


def gradient(dnll_N: Tensor, logits_NV: Tensor, target_N: Tensor) -> Tensor:
    """dlogits_nv = dnll_n * (softmax(z_n)_v - [v = target_n]), (N, V)."""
    others_NV, log_rest_N, log_odds_N = _log_odds(logits_NV, target_N)
    scale_N = dnll_N * torch.sigmoid(log_odds_N)  # sigmoid(log-odds) = 1 - p(target), no cancellation
    dlogits_NV = scale_N[:, None] * (others_NV - log_rest_N[:, None]).exp()
    return dlogits_NV.scatter(1, target_N[:, None], -scale_N[:, None])
