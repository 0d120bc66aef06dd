"""Row weights that depend on masks only: what each (token, sample) cell of a draw counts.

A design gives every masked row of sample k the same base weight (L/l in the l-form). Tokens then carry
unequal total weight W_i = (1/K) sum over the samples that mask i of their weight; that inequality, not the
level, is most of the noise of a score with shared masks. The functions here spread the weights better. They
never look at a model, so the result is again rows and weights, the same for policy and reference.

When is a re-weighting exactly unbiased? Let omega_ki be the weight of token i in sample k, b_k the base
weight, M_k the mask. The estimate sum_ki omega_ki log p(y_i | M_k) keeps the expectation of the base design
for *every* function of (token, mask) if and only if E[omega_ki | M_k] = b_k. Call the set of samples that
mask i the *pattern* of i, and count the tokens of every pattern. All our masks are windows of uniform
permutations, so given those counts the patterns are spread over the tokens uniformly. Hence weights that are
functions of (k, pattern of i, pattern counts) are exact as soon as every sample keeps its total,

    sum over i in M_k of omega_ki = b_k * |M_k|        for every k,

because then E[omega_ki | M_k, counts] = b_k. It holds for any design drawn by rank, coupled or tiled, any K.
`balanced` keeps the totals; `leave_one_couple_out` is exact for another reason; `token_ratio` breaks the rule
on purpose. Tensors here are dense, padded to the longest response: masked_RKL is 1 where sample k of
response r masks position l.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from vrpo.batch import MaskDraw, ResponseBatch

RowWeights = Callable[[MaskDraw, Tensor], Tensor]
"""(draw with base weights, length_R) -> weight_N float32, the new weight of every row."""


def dense(draw: MaskDraw, length_R: Tensor, weight_N: Tensor) -> Tensor:
    """weight_N as (R, K, longest response) float64, 0 where nothing is masked."""
    num_responses, longest = len(length_R), int(length_R.max())
    segment_N = torch.arange(num_responses * draw.num_samples).repeat_interleave(draw.offsets_S1.diff())
    weight_SL = torch.zeros(num_responses * draw.num_samples, longest, dtype=torch.float64)
    weight_SL[segment_N, draw.position_N] = weight_N.double()
    return weight_SL.view(num_responses, draw.num_samples, longest)


def _rows(draw: MaskDraw, omega_RKL: Tensor) -> Tensor:
    segment_N = torch.arange(len(draw.offsets_S1) - 1).repeat_interleave(draw.offsets_S1.diff())
    return omega_RKL.flatten(0, 1)[segment_N, draw.position_N].float()


def solve_totals(precision_RKL: Tensor, shrink_RL: Tensor, total_RK: Tensor) -> Tensor:
    """Weights of least variance for given sample totals under a one-factor covariance, (R, K, L).

    Token i is seen in the samples k of its pattern as mu_i + noise_ki, the variance of mu_i being s and that
    of the noise v_k: Sigma_i = s 11' + diag(v). Minimising sum_i omega_i' Sigma_i omega_i with the totals
    held gives omega_i = Sigma_i^-1 lambda, with one multiplier per sample, and Sherman-Morrison

        omega_ki = z_ki (lambda_k - sum_j z_ji lambda_j * h_i),   z = 1/v,   h_i = 1 / (1/s + sum_j z_ji)

    so that lambda solves a K x K system, positive definite because the totals touch disjoint cells.

    Args: precision_RKL z, 0 where a token is not masked; shrink_RL h; total_RK, read where z is not all 0.
    """
    gram_RKK = -(precision_RKL * shrink_RL[:, None]) @ precision_RKL.transpose(1, 2)
    own_RK = precision_RKL.sum(2)
    gram_RKK = gram_RKK + torch.diag_embed(torch.where(own_RK > 0, own_RK, 1.0))
    multiplier_RK = torch.linalg.solve(gram_RKK, total_RK)
    common_RL = (precision_RKL * multiplier_RK[:, :, None]).sum(1) * shrink_RL
    return precision_RKL * (multiplier_RK[:, :, None] - common_RL[:, None])


def balanced(draw: MaskDraw, length_R: Tensor, *, signal: float = 1.0) -> Tensor:
    """Best linear unbiased weights: least variance among all that keep the total of every sample.

    Exact for every model and design, because the totals are kept (module docstring). The assumed covariance
    only decides how much is gained: the log-ratio of a token is its own mean, of variance `signal`, plus
    noise of variance 1 at every level. Tables by level, fitted on other pairs, gained 0 to 10 % more.
    """
    base_RKL = dense(draw, length_R, draw.weight_N)
    masked_RKL = (base_RKL > 0).double()
    shrink_RL = 1 / (1 / signal + masked_RKL.sum(1))
    return _rows(draw, solve_totals(masked_RKL, shrink_RL, base_RKL.sum(2)))


def leave_one_couple_out(draw: MaskDraw, length_R: Tensor, *, shrinkage: float = 2.0) -> Tensor:
    """Every couple measures against the tokens' mean over the *other* couples.

        B_hat = (1/n) sum_c [ sum_i w_ci (x_ci - m_i^(-c)) + wbar_c sum_i m_i^(-c) ]
        m_i^(-c) = sum_{c' != c} w_c'i x_c'i / (shrinkage + sum_{c' != c} w_c'i)

    w_ci is the weight of token i in couple c, x_ci what the couple says of it, wbar_c the mean of w_c over
    the tokens, which the level fixes. Exact if the couples have permutations of their own, since then
    E[w_ci - wbar_c | levels, other couples] = 0; centring over levels instead would be biased.
    """
    base_RKL = dense(draw, length_R, draw.weight_N)
    couple_K = torch.tensor(draw.replicate_K)
    num_couples = int(couple_K.max()) + 1
    member_CK = (couple_K == torch.arange(num_couples)[:, None]).double()
    weight_RCL = torch.einsum("ck,rkl->rcl", member_CK, base_RKL) * (num_couples / draw.num_samples)
    inside_RL = (torch.arange(base_RKL.shape[2]) < length_R[:, None]).double()
    mean_RC = weight_RCL.sum(2) / length_R[:, None]
    others_RCL = weight_RCL.sum(1, keepdim=True) - weight_RCL
    # What one unit of weight in another couple c' contributes to m^(-c), times the deficit of c.
    deficit_RCL = (mean_RC[:, :, None] - weight_RCL) * inside_RL[:, None] / (shrinkage + others_RCL)
    lent_RCL = deficit_RCL.sum(1, keepdim=True) - deficit_RCL
    factor_RKL = torch.einsum("ck,rcl->rkl", member_CK, 1 + lent_RCL)
    return _rows(draw, base_RKL * factor_RKL)


def _ratio(weight_RKL: Tensor, length_R: Tensor, ratio_lambda: float) -> Tensor:
    """omega = w [1/(W_i + lambda) + lambda H / sum_j W_j], W_i = sum_k w_ki, H = sum_j 1/(W_j + lambda)."""
    total_RL = weight_RKL.sum(1)
    inside_RL = (torch.arange(weight_RKL.shape[2]) < length_R[:, None]).double()
    inverse_RL = inside_RL / (total_RL + ratio_lambda)
    rest_R = ratio_lambda * inverse_RL.sum(1) / total_RL.sum(1)
    return weight_RKL * (inverse_RL + rest_R[:, None])[:, None]


def token_ratio(draw: MaskDraw, length_R: Tensor, *, ratio_lambda: float = 0.5) -> Tensor:
    """Token-ratio weights: the samples of a token are averaged rather than summed. Nearly unbiased.

    With lambda = 0 every token's total would be exactly 1. The rule E[omega_ki | M_k] = b_k is broken: rows
    of small levels count less than they should, so the estimate is smoothed over levels. Its bias vanishes
    when a token's expected log-ratio does not depend on the level. It is largest for very short answers: on
    the masks of `ratio`, at L = 2, up to 33 % of the ELBO with K = 2, 19 % with K = 4 and 1 % with K = 8,
    where a token masked alone costs nothing; 12 % with K = 4 where it costs a quarter of what both cost
    each.
    """
    base_RKL = dense(draw, length_R, draw.weight_N) / draw.num_samples
    return _rows(draw, draw.num_samples * _ratio(base_RKL, length_R, ratio_lambda))


def token_ratio_jackknife(draw: MaskDraw, length_R: Tensor, *, ratio_lambda: float = 0.5) -> Tensor:
    """token_ratio with its bias of order 1/n removed: n omega - ((n-1)/n) sum_c omega^(without couple c)."""
    base_RKL = dense(draw, length_R, draw.weight_N) / draw.num_samples
    couple_K = torch.tensor(draw.replicate_K)
    num_couples = int(couple_K.max()) + 1
    omega_RKL = _ratio(base_RKL, length_R, ratio_lambda)
    if num_couples > 1:
        omega_RKL = num_couples * omega_RKL
        for couple in range(num_couples):
            kept_K1 = (couple_K != couple).double()[:, None]
            scale = draw.num_samples / kept_K1.sum()
            part_RKL = _ratio(base_RKL * kept_K1 * scale, length_R, ratio_lambda)
            omega_RKL = omega_RKL - (num_couples - 1) / num_couples * part_RKL
    return _rows(draw, draw.num_samples * omega_RKL)


def desensitised(draw: MaskDraw, batch: ResponseBatch, ld_alpha: float) -> MaskDraw:
    """The draw with the weights of length-desensitised DPO: tokens beyond the common length count alpha.

        B_alpha(y) = sum over the tokens i < m of B_i + alpha * sum over the others,  m = min(L_w, L_l)

    where B(y) = sum_i B_i over the tokens. A draw that estimates B without bias estimates so each of its
    terms, and with them B_alpha; alpha = 1 is B itself. LD-DPO (arXiv 2409.06411) does so with the
    log-probabilities of an autoregressive model, for policy and reference alike.

    Args: ld_alpha in [0, 1].
    Errors: ValueError unless every example has two responses.
    """
    if batch.num_sides != 2:
        raise ValueError(f"ld_alpha compares two responses, got examples of {batch.num_sides}")
    common_B = batch.response_length_R.view(-1, 2).amin(dim=1)
    common_S = common_B.repeat_interleave(2 * draw.num_samples)
    common_N = common_S.repeat_interleave(draw.offsets_S1.diff())
    return replace(
        draw, weight_N=torch.where(draw.position_N < common_N, draw.weight_N, ld_alpha * draw.weight_N)
    )
