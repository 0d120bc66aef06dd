"""What the noise of an ELBO or a score is made of, and what every mask design would make of it.

From a few draws of one design this predicts the variance of all of them: masks of another design cost no
forward pass. Let d_i(M) be what token i is worth under mask M (log p, or log p_theta - log p_ref), and omega_ki
what its row in sample k counts, so that B_hat = sum_ki omega_ki d_i(M_k). Masks are uniform given their level
t = |M| / L, so second moments of d depend on levels alone: of one token under two masks, A(t, t'), of two
tokens under two masks, A'(t, t'), and the same under one mask, own(t) and own'(t). With C = A - A' and
Abar = A / L + (1 - 1/L) A', the mean over all tokens, likewise for own, T_k = sum_i omega_ki, and
q_kk' = sum_i omega_ki omega_k'i,

    Var B_hat =  sum over t, t' of Cov[T_k at t, T_k' at t'] Abar(t, t')             levels
               + E sum over k, k' of (q_kk' - T_k T_k' / L) C(t_k, t_k')             tokens
               + E sum over k of (q_kk - T_k^2 / L) (own - own' - C)(t_k)            masks
               + E sum over k of T_k^2 (ownbar - Abar)(t_k)                          samples

*levels*: at which levels was masked. *tokens*: which tokens were masked, as far as a token is worth the same
under every mask. *masks*: what else was masked beside a token. *samples*: what a mask does to all its tokens at
once. Designs differ in what they do to each: strata and antithetic levels lower the first, balanced row weights
the second, more samples of small levels the third, and the fourth is lowest for uniform levels. The covariance
of the two responses of a pair that share their positions has the same four parts.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vrpo.batch import ResponseBatch
from vrpo.estimator.packing import pack
from vrpo.estimator.row_weights import dense
from vrpo.evaluation.variance import Scheme
from vrpo.step import split_by_tokens

PARTS = ("levels", "tokens", "masks", "samples")
DEGREE = 3
"""Moments are polynomials of this degree in the levels: smooth, as what a level is worth is, and few numbers."""

_MEASURED = Scheme("inverse-root", 8, pair_masks="positions")
"""Independent masks at every level, small ones more often: few rows, and most of the noise."""

_RIDGE = 1e-6
_PAIRS_PER_GROUP = 12
_MAX_GROUPS = 4
_SIMULATED = 384


@dataclass(frozen=True)
class Moments:
    """Second moments of two responses' values at NODES (a, b): the four of the module docstring, raw.

    same_AB, different_AB: one or two positions, two masks. own_A, own_different_A: the same under one mask.
    """

    same_AB: Tensor
    different_AB: Tensor
    own_A: Tensor
    own_different_A: Tensor


@dataclass(frozen=True)
class Group:
    """Pairs of similar lengths: length_B2, and moments of chosen, of rejected and of one with the other."""

    length_B2: Tensor
    chosen: Moments
    rejected: Moments
    both: Moments


@dataclass(frozen=True)
class Noise:
    """What `measure` found: moments of differences of two models (or of one model's log p), per length."""

    groups: tuple[Group, ...]


@torch.no_grad()
def measure(
    policy: nn.Module,
    reference: nn.Module | None,
    batch: ResponseBatch,
    *,
    mask_token_id: int,
    num_repeats: int = 4,
    seed: int = 0,
    max_tokens_per_pack: int = 16_384,
    device: torch.device | str = "cpu",
) -> Noise:
    """Second moments of log p_theta - log p_ref over masks, or of log p_theta alone without a reference.

    Costs 8 num_repeats forward passes per response and model. Repeat q of the draw is epoch q, as in
    `variance.sample`. batch: pairs. Errors: ValueError without pairs, or with fewer than two masks.
    """
    if batch.num_sides != 2:
        raise ValueError(f"noise is measured on pairs, got examples of {batch.num_sides}")
    if num_repeats < 1:
        raise ValueError(f"num_repeats must be at least 1, got {num_repeats}")
    length_B2 = batch.response_length_R.view(-1, 2)
    longest = int(length_B2.max())
    values, masks = [], []
    for repeat in range(num_repeats):
        value_parts, mask_parts = [], []
        for part in split_by_tokens(batch, _MEASURED.num_samples, max_tokens_per_pack):
            drawn = _MEASURED.draw(part, seed, repeat)
            packed = pack(part, drawn, mask_token_id).to(device)
            value_N = -policy(**packed.model_inputs()).nll.double().cpu()
            if reference is not None:
                value_N += reference(**packed.model_inputs()).nll.double().cpu()
            for parts, row_N in ((value_parts, value_N), (mask_parts, torch.ones_like(value_N))):
                cells_RKL = dense(drawn, part.response_length_R, row_N)
                padding = longest - cells_RKL.shape[2]
                parts.append(torch.nn.functional.pad(cells_RKL, (0, padding)))
        values.append(torch.cat(value_parts))
        masks.append(torch.cat(mask_parts))
    value_B2KL = torch.cat(values, dim=1).unflatten(0, (-1, 2))
    mask_B2KL = torch.cat(masks, dim=1).unflatten(0, (-1, 2))
    return Noise(tuple(_group(value_B2KL, mask_B2KL, length_B2, rows) for rows in _by_length(length_B2)))


def _by_length(length_B2: Tensor) -> Sequence[Tensor]:
    order_B = length_B2.sum(1).argsort(stable=True)
    return order_B.tensor_split(max(1, min(_MAX_GROUPS, len(order_B) // _PAIRS_PER_GROUP)))


def _group(value_B2KL: Tensor, mask_B2KL: Tensor, length_B2: Tensor, rows: Tensor) -> Group:
    length_B2, value_2BKL, mask_2BKL = length_B2[rows], value_B2KL[rows], mask_B2KL[rows]
    sides = [(value_2BKL[:, side], mask_2BKL[:, side], length_B2[:, side]) for side in range(2)]
    return Group(
        length_B2, _moments(sides[0], sides[0]), _moments(sides[1], sides[1]), _moments(sides[0], sides[1])
    )


def basis(level: Tensor) -> Tensor:
    """Shifted Legendre polynomials of levels in [0, 1], degrees 0 .. DEGREE: (..., A)."""
    x = 2 * level.double() - 1
    values = [torch.ones_like(x), x]
    for n in range(1, DEGREE):
        values.append(((2 * n + 1) * x * values[n] - n * values[n - 1]) / (n + 1))
    return torch.stack(values[: DEGREE + 1], dim=-1)


Responses = tuple[Tensor, Tensor, Tensor]
"""value_BKL, mask_BKL and length_B of one side."""


def _moments(first: Responses, second: Responses) -> Moments:
    """Least squares of all products on the interpolation weights of their levels, every response alike."""
    (value_BKL, mask_BKL, length_B), (other_BKL, other_mask_BKL, other_length_B) = first, second
    count_BK, other_count_BK = mask_BKL.sum(2), other_mask_BKL.sum(2)
    basis_BKA = basis(count_BK / length_B[:, None])
    other_basis_BKA = basis(other_count_BK / other_length_B[:, None])
    size_B11 = (length_B * other_length_B).double()[:, None, None]
    # Sums over pairs of positions, and how many there are: at one position, and at two.
    same_BKK = value_BKL @ other_BKL.transpose(1, 2) / size_B11
    num_same_BKK = mask_BKL @ other_mask_BKL.transpose(1, 2) / size_B11
    all_BKK = value_BKL.sum(2)[:, :, None] * other_BKL.sum(2)[:, None] / size_B11
    num_all_BKK = count_BK[:, :, None] * other_count_BK[:, None] / size_B11
    apart_KK = ~torch.eye(mask_BKL.shape[1], dtype=torch.bool)
    feature_NF = (basis_BKA[:, :, None, :, None] * other_basis_BKA[:, None, :, None]).flatten(3)[:, apart_KK]

    def apart(sum_BKK: Tensor, number_BKK: Tensor) -> Tensor:
        fitted = _fit(feature_NF.flatten(0, 1), sum_BKK[:, apart_KK], number_BKK[:, apart_KK])
        return fitted.view(DEGREE + 1, DEGREE + 1)

    def own(sum_BKK: Tensor, number_BKK: Tensor) -> Tensor:
        return _fit(basis_BKA.flatten(0, 1), *(x.diagonal(dim1=1, dim2=2) for x in (sum_BKK, number_BKK)))

    different = (all_BKK - same_BKK, num_all_BKK - num_same_BKK)
    return Moments(
        same_AB=apart(same_BKK, num_same_BKK),
        different_AB=apart(*different),
        own_A=own(same_BKK, num_same_BKK),
        own_different_A=own(*different),
    )


def _fit(feature_NF: Tensor, sum_N: Tensor, number_N: Tensor) -> Tensor:
    """Weighted least squares of the means sum / number, weighted by number; nearly 0 where nothing was seen."""
    gram = feature_NF.T @ (feature_NF * number_N.flatten()[:, None])
    ridge = _RIDGE * gram.diagonal().mean().clamp(min=1e-30) * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, feature_NF.T @ sum_N.flatten())


@dataclass(frozen=True)
class _Weights:
    """Row weights of simulated draws, D draws of each of B pairs, one side: omega_BDKL and levels as hats."""

    omega_BDKL: Tensor
    basis_BDKA: Tensor
    length_B: Tensor


def predict(noise: Noise, scheme: Scheme, *, beta: float = 1.0, seed: int = 0) -> dict[str, float]:
    """Mean variance of the score over pairs under a scheme, by its parts (PARTS) and in all ("total").

    Masks are drawn, no model is run. scheme: shared, with independent sides or shared positions; a biased
    design gives the variance about its own mean. Errors: ValueError for other schemes.
    """
    if not scheme.shared or scheme.pair_masks == "levels":
        raise ValueError(f"only shared masks, independent or by positions, can be predicted, got {scheme}")
    totals = dict.fromkeys(PARTS, 0.0)
    num_pairs = sum(len(group.length_B2) for group in noise.groups)
    for group in noise.groups:
        chosen, rejected = _simulate(group.length_B2, scheme, seed)
        found = [(1, _covariance(group.chosen, chosen, chosen))]
        found.append((1, _covariance(group.rejected, rejected, rejected)))
        if scheme.pair_masks == "positions":
            found.append((-2, _covariance(group.both, chosen, rejected)))
        for factor, part_of in found:
            for name, value in part_of.items():
                totals[name] += factor * beta**2 * value * len(group.length_B2) / num_pairs
    return totals | {"total": sum(totals.values())}


def _simulate(length_B2: Tensor, scheme: Scheme, seed: int) -> tuple[_Weights, _Weights]:
    num_pairs = len(length_B2)
    num_draws = max(8, -(-_SIMULATED // num_pairs))
    length_R = length_B2.repeat_interleave(num_draws, dim=0).flatten()
    num_examples = num_pairs * num_draws
    lengths = ResponseBatch(
        tokens_U=torch.zeros(0, dtype=torch.int64),
        prompt_length_R=torch.ones_like(length_R),
        response_length_R=length_R,
        example_R=torch.arange(num_examples).repeat_interleave(2),
        side_R=torch.arange(2).repeat(num_examples),
        num_sides=2,
    )
    drawn = scheme.draw(lengths, seed, 0)
    omega_RKL = dense(drawn, length_R, drawn.weight_N) / scheme.num_samples
    masked_RKL = dense(drawn, length_R, torch.ones_like(drawn.weight_N))
    basis_RKA = basis(masked_RKL.sum(2) / length_R[:, None])
    sides = []
    for side in range(2):
        omega_BDKL, basis_BDKA = (
            x[side::2].unflatten(0, (num_pairs, num_draws)) for x in (omega_RKL, basis_RKA)
        )
        sides.append(_Weights(omega_BDKL, basis_BDKA, length_B2[:, side]))
    return sides[0], sides[1]


def _covariance(moments: Moments, first: _Weights, second: _Weights) -> dict[str, float]:
    """Covariance of two estimates from masks of one draw by its parts, mean over pairs and draws."""
    size_B = (first.length_B * second.length_B).double()
    # The chance that a position of one is the same position of the other, 1 / L in one response.
    same_B = torch.minimum(first.length_B, second.length_B) / size_B
    basis_BDKA, other_basis_BDKA = first.basis_BDKA, second.basis_BDKA

    def at_levels(table_AB: Tensor) -> Tensor:
        return torch.einsum("bdka,ac,bdjc->bdkj", basis_BDKA, table_AB, other_basis_BDKA)

    token_AB = moments.same_AB - moments.different_AB
    token_A = moments.own_A - moments.own_different_A
    total_BDK, other_total_BDK = first.omega_BDKL.sum(3), second.omega_BDKL.sum(3)
    product_BDKK = total_BDK[..., :, None] * other_total_BDK[..., None, :]
    overlap_BDKK = first.omega_BDKL @ second.omega_BDKL.transpose(2, 3)
    excess_BDKK = overlap_BDKK - product_BDKK * same_B[:, None, None, None]
    token_BDKK = at_levels(token_AB)
    tokens = (excess_BDKK * token_BDKK).sum((2, 3)).mean()
    own_BDK = basis_BDKA @ token_A - token_BDKK.diagonal(dim1=2, dim2=3)
    masks = (excess_BDKK.diagonal(dim1=2, dim2=3) * own_BDK).sum(2).mean()
    ownbar_BDK = basis_BDKA @ moments.own_different_A + (basis_BDKA @ token_A) * same_B[:, None, None]
    abar_BDKK = at_levels(moments.different_AB) + token_BDKK * same_B[:, None, None, None]
    square_BDK = product_BDKK.diagonal(dim1=2, dim2=3)
    samples = (square_BDK * (ownbar_BDK - abar_BDKK.diagonal(dim1=2, dim2=3))).sum(2).mean()
    level_BDA, other_level_BDA = (
        torch.einsum("bdk,bdka->bda", x, y)
        for x, y in ((total_BDK, basis_BDKA), (other_total_BDK, other_basis_BDKA))
    )
    level_BDA, other_level_BDA = (x - x.mean(1, keepdim=True) for x in (level_BDA, other_level_BDA))
    covariance_BAC = level_BDA.transpose(1, 2) @ other_level_BDA / (level_BDA.shape[1] - 1)
    mean_BAC = moments.different_AB + token_AB * same_B[:, None, None]
    levels = (covariance_BAC * mean_BAC).sum((1, 2)).mean()
    return {name: float(x) for name, x in zip(PARTS, (levels, tokens, masks, samples), strict=True)}
