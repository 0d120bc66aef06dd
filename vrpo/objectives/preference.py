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


def jackknife_dpo_loss(
    policy_RK: Tensor, reference_RK: Tensor, beta: float, replicate_K: tuple[int, ...]
) -> Tensor:
    """softplus(-s) of each pair with most of its bias from a noisy score removed, (B,), nats.

        loss = G f(s) - ((G - 1) / G) sum_g f(s^(-g)),    f(s) = softplus(-s)

    s is the mean of the G replicate scores, s^(-g) the mean without replicate g. f is convex, so f(s) is too
    high by E f(s) - f(E s) = a / G + O(1 / G^2), a = f''(E s) Var(replicate) / 2 (method: Taylor at E s). The
    same expansion holds for f(s^(-g)) with G - 1, and G (a / G) - (G - 1) (a / (G - 1)) = 0: what is left is
    O(1 / G^2). Unlike the delta method, f(s) - f''(s) v / 2, whose v is unbounded, the result grows linearly
    in the scores, so that a model cannot lower its loss by making its samples disagree.

    Needs replicates that are independent and identically distributed, at least two (G >= 2). The gradient is
    the jackknife of the gradient; it differs from that of f(s) by what the noise of the score puts into the
    coefficient sigmoid(-s).
    """
    score_BG = replicate_scores(policy_RK, reference_RK, beta, replicate_K)
    num_replicates = score_BG.shape[1]
    if num_replicates < 2:
        raise ValueError("the jackknife loss needs at least 2 independent replicates, got 1")
    total_B1 = score_BG.sum(dim=1, keepdim=True)
    left_out_BG = (total_B1 - score_BG) / (num_replicates - 1)
    left_out_B = dpo_loss(left_out_BG).mean(dim=1)
    return num_replicates * dpo_loss(score_BG.mean(dim=1)) - (num_replicates - 1) * left_out_B


def replicate_scores(
    policy_RK: Tensor, reference_RK: Tensor, beta: float, replicate_K: tuple[int, ...]
) -> Tensor:
    """The score of each pair from each replicate's samples alone, (B, G)."""
    num_replicates = max(replicate_K) + 1
    difference_RK = policy_RK - reference_RK
    replicate = torch.tensor(replicate_K, device=difference_RK.device)
    size_G = torch.zeros(num_replicates, device=difference_RK.device, dtype=difference_RK.dtype)
    size_G.index_add_(0, replicate, torch.ones_like(difference_RK[0]))
    sum_RG = difference_RK.new_zeros(len(difference_RK), num_replicates)
    mean_RG = sum_RG.index_add(1, replicate, difference_RK) / size_G
    return beta * (mean_RG[0::2] - mean_RG[1::2])


def score_std(policy_RK: Tensor, reference_RK: Tensor, beta: float, replicate_K: tuple[int, ...]) -> Tensor:
    """Standard error of each pair's score, estimated from the replicates of its own K samples.

        std = sqrt( sum_g (s_g - mean_g s_g)^2 / (G (G - 1)) ),  s_g = score of replicate g, G replicates

    Its square is an unbiased estimate of the score's variance when replicates are independent and identically
    distributed, and on average too large when they come from different strata.
    Returns: (B,); NaN when the design has a single replicate, since nothing can be said then.
    """
    num_replicates = max(replicate_K) + 1
    if num_replicates == 1:
        return policy_RK.new_full((len(policy_RK) // 2,), math.nan)
    score_BG = replicate_scores(policy_RK, reference_RK, beta, replicate_K)
    return score_BG.std(dim=1, correction=1) / math.sqrt(num_replicates)


def noise_diagnostics(score_B: Tensor, score_std_B: Tensor) -> dict[str, Tensor]:
    """What the estimated noise of each pair's score does to its loss and gradient, (B,) each.

    loss_bias: sigmoid(s) sigmoid(-s) v / 2, the upward bias of softplus(-s) to second order, v = std^2.
    loss_bias_bound: min(std, v / 8), which no distribution of the score exceeds (softplus is 1-Lipschitz and
        its second derivative at most 1/4).
    sign_flips: Phi(-|s| / std), the chance that a Gaussian score of this mean and std has the other sign.
    gradient_noise: sigmoid(s) std, the relative error of the gradient's coefficient sigmoid(-s).
    """
    variance_B = score_std_B.square()
    slope_B = torch.sigmoid(score_B)
    return {
        "loss_bias": slope_B * torch.sigmoid(-score_B) * variance_B / 2,
        "loss_bias_bound": torch.minimum(score_std_B, variance_B / 8),
        "sign_flips": torch.special.ndtr(-score_B.abs() / score_std_B.clamp(min=1e-12)),
        "gradient_noise": slope_B * score_std_B,
    }


def denoising_loss(elbo_RK: Tensor, response_length_R: Tensor) -> Tensor:
    """Masked-diffusion SFT loss of each response: -B / L, mean over samples, (R, K) -> (R,), nats per token.

    Source: LLaDA (arXiv 2502.09992) Eq. (5) with its per-answer normalisation.
    """
    return -elbo_RK.mean(dim=1) / response_length_R.to(elbo_RK)
