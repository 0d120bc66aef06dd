"""From ELBO estimates to the preference score and its loss. Pure functions without tokens or models."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vrpo.objectives.curves import Softplus, jackknife


def log_ratio(policy_RK: Tensor, reference_RK: Tensor) -> Tensor:
    """B_policy - B_reference of every response, mean over the K samples: (R, K) x 2 -> (R,), nats."""
    return (policy_RK - reference_RK).mean(dim=1)


def preference_score(policy_RK: Tensor, reference_RK: Tensor, beta: float) -> Tensor:
    """The preference score of each pair.

        s = beta * (B_policy(y_w) - B_ref(y_w)) - beta * (B_policy(y_l) - B_ref(y_l))

    Args: ELBO estimates (R, K) in nats with R = 2B in the order (pair, side); beta > 0, per nat.
    Returns: score_B (B,), dimensionless. Exactly 0 when policy and reference agree bit for bit.
    Source: arXiv 2505.19223 Eq. (7)-(8).
    """
    ratio_B2 = log_ratio(policy_RK, reference_RK).view(-1, 2)
    return beta * (ratio_B2[:, 0] - ratio_B2[:, 1])


def dpo_loss(score_B: Tensor) -> Tensor:
    """-log sigmoid(s) = softplus(-s) of each pair, (B,) -> (B,), nats; finite for any finite score.

    The averages over samples stay inside the sigmoid. Source: arXiv 2505.19223 Eq. (6).
    """
    return softplus(-score_B)


def jackknife_dpo_loss(
    policy_RK: Tensor, reference_RK: Tensor, beta: float, replicate_K: tuple[int, ...]
) -> Tensor:
    """softplus(-s) of each pair with most of its bias removed, (B,), nats: curves.jackknife."""
    return jackknife(Softplus(), replicate_scores(policy_RK, reference_RK, beta, replicate_K))


def replicate_means(elbo_RK: Tensor, replicate_K: tuple[int, ...]) -> Tensor:
    """Mean over the samples of each replicate, (R, K) -> (R, G); replicate_K as in MaskDraw."""
    num_replicates = max(replicate_K) + 1
    replicate = torch.tensor(replicate_K, device=elbo_RK.device)
    size_G = torch.zeros(num_replicates, device=elbo_RK.device, dtype=elbo_RK.dtype)
    size_G.index_add_(0, replicate, torch.ones_like(elbo_RK[0]))
    sum_RG = elbo_RK.new_zeros(len(elbo_RK), num_replicates)
    return sum_RG.index_add(1, replicate, elbo_RK) / size_G


def standard_error(score_BG: Tensor) -> Tensor:
    """Standard error of the mean of G replicates, (B, G) -> (B,).

        std = sqrt( sum_g (s_g - mean_g s_g)^2 / (G (G - 1)) )

    Its square is an unbiased estimate of the variance of the mean when replicates are independent and
    identically distributed, and on average too large when they come from different strata. NaN for G = 1.
    """
    num_replicates = score_BG.shape[1]
    if num_replicates == 1:
        return score_BG.new_full((len(score_BG),), math.nan)
    return score_BG.std(dim=1, correction=1) / math.sqrt(num_replicates)


def replicate_scores(
    policy_RK: Tensor, reference_RK: Tensor, beta: float, replicate_K: tuple[int, ...]
) -> Tensor:
    """The score of each pair from each replicate's samples alone, (B, G)."""
    mean_RG = replicate_means(policy_RK - reference_RK, replicate_K)
    return beta * (mean_RG[0::2] - mean_RG[1::2])


def score_std(policy_RK: Tensor, reference_RK: Tensor, beta: float, replicate_K: tuple[int, ...]) -> Tensor:
    """Standard error of each pair's score, from the replicates of its own K samples: `standard_error`, (B,).

    NaN when the design has a single replicate, since nothing can be said then.
    """
    return standard_error(replicate_scores(policy_RK, reference_RK, beta, replicate_K))


def denoising_loss(elbo_RK: Tensor, response_length_R: Tensor) -> Tensor:
    """Masked-diffusion SFT loss of each response: -B / L, mean over samples, (R, K) -> (R,), nats per token.

    Source: LLaDA (arXiv 2502.09992) Eq. (5) with its per-answer normalisation.
    """
    return -elbo_RK.mean(dim=1) / response_length_R.to(elbo_RK)
