"""From ELBO estimates to the preference score and its loss. Pure functions without tokens or models."""

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus


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


def score_std(policy_RK: Tensor, reference_RK: Tensor, beta: float, replicate_K: tuple[int, ...]) -> Tensor:
    """Standard error of each pair's score, estimated from the replicates of its own K samples.

        std = sqrt( sum_g (s_g - mean_g s_g)^2 / (G (G - 1)) ),  s_g = score of replicate g, G replicates

    Its square is an unbiased estimate of the score's variance when replicates are independent.
    Returns: (B,); NaN when the design has a single replicate, since nothing can be said then.
    """
    num_replicates = max(replicate_K) + 1
    difference_RK = policy_RK - reference_RK
    if num_replicates == 1:
        return difference_RK.new_full((len(difference_RK) // 2,), math.nan)
    replicate = torch.tensor(replicate_K, device=difference_RK.device)
    size_G = torch.zeros(num_replicates, device=difference_RK.device, dtype=difference_RK.dtype)
    size_G.index_add_(0, replicate, torch.ones_like(difference_RK[0]))
    mean_RG = difference_RK.new_zeros(len(difference_RK), num_replicates)
    mean_RG = mean_RG.index_add(1, replicate, difference_RK) / size_G
    score_BG = beta * (mean_RG[0::2] - mean_RG[1::2])
    return score_BG.std(dim=1, correction=1) / math.sqrt(num_replicates)


def denoising_loss(elbo_RK: Tensor, response_length_R: Tensor) -> Tensor:
    """Masked-diffusion SFT loss of each response: -B / L, mean over samples, (R, K) -> (R,), nats per token.

    Source: LLaDA (arXiv 2502.09992) Eq. (5) with its per-answer normalisation.
    """
    return -elbo_RK.mean(dim=1) / response_length_R.to(elbo_RK)
