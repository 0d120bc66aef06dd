"""What the noise of an ELBO or a score is made of, and what every mask design would make of it.

A few draws of one design predict the variance of all of them: masks of another design cost no forward pass.
Let d_i(M) be what token i is worth under mask M (log p, or log p_theta - log p_ref), and omega_ki what its
row in sample k counts, so that B_hat = sum_ki omega_ki d_i(M_k). Masks are uniform given their level
t = |M| / L, so second moments of d depend on levels alone: of one token under two masks, A(t, t'), of two
tokens under two masks, A'(t, t'), and the same under one mask, own(t) and own'(t). With C = A - A' and
Abar = A / L + (1 - 1/L) A', the mean over all tokens, likewise ownbar, T_k = sum_i omega_ki, and
q_kk' = sum_i omega_ki omega_k'i,

    Var B_hat =  sum over t, t' of Cov[T_k at t, T_k' at t'] Abar(t, t')             levels
               + E sum over k, k' of (q_kk' - T_k T_k' / L) C(t_k, t_k')             tokens
               + E sum over k of (q_kk - T_k^2 / L) (own - own' - C)(t_k)            masks
               + E sum over k of T_k^2 (ownbar - Abar)(t_k)                          samples

*levels*: at which levels was masked. *tokens*: which tokens were masked, as far as a token is worth the same
under every mask of a level. *masks*: what else was masked beside a token. *samples*: what a mask does to all
its tokens at once. Designs differ in what they do to each: strata and antithetic levels lower the first,
balanced row weights the second, more samples of small levels the third, and the fourth is lowest for uniform
levels. The covariance of the two responses of a pair that share their positions has the same four parts.

Exact if the masks of a response are independent given their levels. Where they share a permutation, or the
weights of one sample depend on the masks of another, it is taken that what a mask does to a token beyond its
level says nothing of what another mask does: masks that avoid each other by design are treated like others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vrpo.batch import MaskDraw, PackedBatch, ResponseBatch
from vrpo.estimator.packing import pack
from vrpo.estimator.row_weights import dense
from vrpo.evaluation.moments import Moments, Seen, basis, fit
from vrpo.evaluation.variance import Scheme
from vrpo.step import split_by_tokens, split_segments

PARTS = ("levels", "tokens", "masks", "samples")

_MEASURED = Scheme("inverse-root", 8, pair_masks="positions")
"""Independent masks at every level, small ones more often: few rows, and most of the noise."""

_FEWEST_DRAWS = 8
_MOST_DRAWS = 1024
_MOST_CELLS = 2**23
"""Tokens times samples of the draws that are looked at together: they bound the memory."""

_ROUNDING = 1e-12
"""Below it, relative to the square of an estimate, a variance is what rounding leaves of none."""


@dataclass(frozen=True)
class Noise:
    """What `measure` found of B pairs: moments of chosen, of rejected and of one with the other.

    They are moments of differences of two models, or of one model's log p.
    """

    length_B2: Tensor
    chosen: Moments
    rejected: Moments
    both: Moments


def measure(policy: nn.Module, reference: nn.Module | None, batch: ResponseBatch, **options: Any) -> Noise:
    """`measure_all` of a single policy."""
    return measure_all([policy], reference, batch, **options)[0]


@torch.no_grad()
def measure_all(
    policies: Sequence[nn.Module],
    reference: nn.Module | None,
    batch: ResponseBatch,
    *,
    mask_token_id: int,
    num_repeats: int = 4,
    seed: int = 0,
    max_tokens_per_pack: int = 16_384,
    device: torch.device | str = "cpu",
) -> list[Noise]:
    """Second moments of log p_theta - log p_ref over masks, of every policy against one reference.

    Costs 8 num_repeats forward passes per response and model. Repeat q of the draw is epoch q, as in
    `variance.sample`.

    Args: reference: None for the moments of log p_theta itself. batch: pairs.
    Errors: ValueError without pairs or without repeats.
    """
    if batch.num_sides != 2:
        raise ValueError(f"batch must hold pairs, got examples of {batch.num_sides}")
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}")
    length_B2 = batch.response_length_R.view(-1, 2)
    masked: list[Tensor] = []
    values: list[list[Tensor]] = [[] for _ in policies]
    for repeat in range(num_repeats):
        for part in split_by_tokens(batch, _MEASURED.num_samples, max_tokens_per_pack):
            drawn = _MEASURED.draw(part, seed, repeat)
            packs = split_segments(pack(part, drawn, mask_token_id), max_tokens_per_pack)
            packs = [packed.to(device) for packed in packs]
            base_N = 0.0 if reference is None else _log_p(reference, packs)
            masked.append(_dense(drawn, part, torch.ones(len(drawn.position_N)), length_B2))
            for found, policy in zip(values, policies, strict=True):
                found.append(_dense(drawn, part, _log_p(policy, packs) - base_N, length_B2))
    masked_B2KL = _join(masked, num_repeats)
    return [_moments(_join(found, num_repeats), masked_B2KL, length_B2) for found in values]


def _log_p(model: nn.Module, packs: Sequence[PackedBatch]) -> Tensor:
    return -torch.cat([model(**packed.model_inputs()).nll.double().cpu() for packed in packs])


def _dense(drawn: MaskDraw, part: ResponseBatch, row_N: Tensor, length_B2: Tensor) -> Tensor:
    cell_RKL = dense(drawn, part.response_length_R, row_N)
    return pad(cell_RKL, (0, int(length_B2.max()) - cell_RKL.shape[2]))


def _join(parts: list[Tensor], num_repeats: int) -> Tensor:
    """Parts of the batch, repeat after repeat, as (B, 2, K of all repeats, L)."""
    cell_QRKL = torch.cat(parts).unflatten(0, (num_repeats, -1))
    return cell_QRKL.transpose(0, 1).flatten(1, 2).unflatten(0, (-1, 2))


def _moments(value_B2KL: Tensor, masked_B2KL: Tensor, length_B2: Tensor) -> Noise:
    chosen, rejected = (Seen(value_B2KL[:, s], masked_B2KL[:, s], length_B2[:, s]) for s in range(2))
    return Noise(length_B2, fit(chosen, chosen), fit(rejected, rejected), fit(chosen, rejected))


@dataclass(frozen=True)
class Weights:
    """Row weights omega / K of D draws of each of B responses, and the basis at the levels of the masks."""

    omega_BDKL: Tensor
    basis_BDKA: Tensor
    length_B: Tensor


Reweigh = Callable[[Weights, Weights], tuple[Weights, Weights]]


def predict(
    noise: Noise,
    scheme: Scheme,
    *,
    beta: float = 1.0,
    num_draws: int = 1024,
    seed: int = 0,
    reweigh: Reweigh | None = None,
) -> dict[str, float]:
    """Variances under a scheme, averaged over pairs; masks are drawn, no model is run.

    A biased design gives the variance about its own mean. Where few draws measured the moments, parts and
    totals may come out below 0.

    Args:
        scheme: shared, its sides independent or sharing positions.
        num_draws: draws of masks over all pairs, but at least 8 of each. The error of 1024 is a few percent,
            most of which designs have in common.
        reweigh: other row weights for the masks of the scheme, given those of chosen and of rejected.
    Returns: the PARTS of the score's variance and their sum, "total"; the variance of beta B_hat of a single
        response, either side alike, "response".
    Errors: ValueError for other schemes.
    """
    if not scheme.shared or scheme.pair_masks == "levels":
        raise ValueError(f"scheme must share masks, its sides independent or by positions, got {scheme}")
    num_pairs = len(noise.length_B2)
    num_draws = max(_FEWEST_DRAWS, -(-num_draws // num_pairs))
    cells = scheme.num_samples * int(noise.length_B2.max())
    most_draws = min(_MOST_DRAWS, _MOST_CELLS // cells)
    response_P, score_P = torch.zeros(2, len(PARTS), dtype=torch.float64)
    for part in torch.arange(num_pairs).split(max(1, most_draws // num_draws)):
        chosen, rejected = _simulate(noise.length_B2, part, scheme, num_draws, seed)
        if reweigh is not None:
            chosen, rejected = reweigh(chosen, rejected)
        alone_P = _covariance(noise.chosen.of(part), chosen, chosen)
        alone_P = alone_P + _covariance(noise.rejected.of(part), rejected, rejected)
        response_P += alone_P / 2
        score_P += alone_P
        if scheme.pair_masks == "positions":
            score_P -= 2 * _covariance(noise.both.of(part), chosen, rejected)
    rounding = _ROUNDING * _square(noise)
    score_P, response_P = (
        beta**2 / num_pairs * torch.where(x.abs() > rounding, x, 0.0) for x in (score_P, response_P)
    )
    told = dict(zip(PARTS, score_P.tolist(), strict=True))
    return told | {"total": float(score_P.sum()), "response": float(response_P.sum())}


def _square(noise: Noise) -> float:
    """About the sum of B_hat^2 over all responses: what variances are small differences of."""
    sides = zip((noise.chosen, noise.rejected), noise.length_B2.T, strict=True)
    return sum(float((length_B**2 * side.own_BA.abs().sum(1)).sum()) for side, length_B in sides)


def _simulate(
    length_B2: Tensor, part: Tensor, scheme: Scheme, num_draws: int, seed: int
) -> tuple[Weights, Weights]:
    """Row weights of the pairs `part`. A pair's draws are the same in any part."""
    length_B2 = length_B2[part]
    example_E = (part[:, None] * num_draws + torch.arange(num_draws)).flatten()
    length_R = length_B2.repeat_interleave(num_draws, dim=0).flatten()
    lengths = ResponseBatch(
        tokens_U=torch.zeros(0, dtype=torch.int64),
        prompt_length_R=torch.ones_like(length_R),
        response_length_R=length_R,
        example_R=example_E.repeat_interleave(2),
        side_R=torch.arange(2).repeat(len(example_E)),
        num_sides=2,
    )
    drawn = scheme.draw(lengths, seed, 0)
    omega_RKL = dense(drawn, length_R, drawn.weight_N) / scheme.num_samples
    size_RK = drawn.offsets_S1.diff().view(-1, scheme.num_samples)
    basis_RKA = basis(size_RK / length_R[:, None])
    sides = []
    for side in range(2):
        draws = (x[side::2].unflatten(0, (len(part), num_draws)) for x in (omega_RKL, basis_RKA))
        sides.append(Weights(*draws, length_B2[:, side]))
    return sides[0], sides[1]


def _covariance(moments: Moments, first: Weights, second: Weights) -> Tensor:
    """The PARTS of the covariance of two estimates by masks of one draw, summed over responses: (P,)."""
    # The chance that two positions are one, 1 / L in one response.
    chance_B = torch.minimum(first.length_B, second.length_B) / (first.length_B * second.length_B).double()
    chance_B11, chance_B111 = chance_B[:, None, None], chance_B[:, None, None, None]

    def at_levels(moment_BAA: Tensor) -> Tensor:
        return torch.einsum("bdka,bae,bdje->bdkj", first.basis_BDKA, moment_BAA, second.basis_BDKA)

    def at_level(moment_BA: Tensor) -> Tensor:
        return torch.einsum("bdka,ba->bdk", first.basis_BDKA, moment_BA)

    def by_sample(value_BDKK: Tensor) -> Tensor:
        return value_BDKK.diagonal(dim1=2, dim2=3)

    contrast_BAA = moments.same_BAA - moments.different_BAA
    contrast_BDKK = at_levels(contrast_BAA)
    mean_BDKK = at_levels(moments.different_BAA) + chance_B111 * contrast_BDKK
    own_contrast_BDK = at_level(moments.own_BA - moments.own_different_BA)
    own_mean_BDK = at_level(moments.own_different_BA) + chance_B11 * own_contrast_BDK

    total_BDK, other_total_BDK = first.omega_BDKL.sum(3), second.omega_BDKL.sum(3)
    product_BDKK = total_BDK[..., :, None] * other_total_BDK[..., None, :]
    excess_BDKK = first.omega_BDKL @ second.omega_BDKL.transpose(2, 3) - chance_B111 * product_BDKK

    level_BDA = (total_BDK[..., None] * first.basis_BDKA).sum(2)
    other_level_BDA = (other_total_BDK[..., None] * second.basis_BDKA).sum(2)
    level_BDA, other_level_BDA = (x - x.mean(1, keepdim=True) for x in (level_BDA, other_level_BDA))
    covariance_BAA = level_BDA.transpose(1, 2) @ other_level_BDA / (level_BDA.shape[1] - 1)
    mean_BAA = moments.different_BAA + chance_B11 * contrast_BAA
    own_excess_BDK, square_BDK = by_sample(excess_BDKK), by_sample(product_BDKK)
    tokens_BD = (excess_BDKK * contrast_BDKK).sum((2, 3))
    masks_BD = (own_excess_BDK * (own_contrast_BDK - by_sample(contrast_BDKK))).sum(2)
    samples_BD = (square_BDK * (own_mean_BDK - by_sample(mean_BDKK))).sum(2)
    by_draw = [x_BD.mean(1).sum() for x_BD in (tokens_BD, masks_BD, samples_BD)]
    return torch.stack([(covariance_BAA * mean_BAA).sum(), *by_draw])
