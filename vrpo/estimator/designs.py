"""Mask designs: at which levels the K samples of a response are masked, and what a masked row then weighs.

A design is one function `(uniform, length_R, num_samples) -> Levels` and one line in DESIGNS. It decides
numbers of masked tokens (levels) and which samples read the same permutation; positions are drawn afterwards
(masking.py), and weights may then be refined row by row (row_weights.py). L is the response length, K the
number of samples, a level l the number of masked tokens; the target is

    B = E over l ~ U{1..L} and subsets M of size l of (L / l) * sum over i in M of log p(y_i | M masked).

A *couple* is a mask and its complement. With l ~ U{0..L} its value (1/2) [(L+1)/l S(M) + (L+1)/(L-l)
S(M^c)], an empty side counting 0, has expectation B, and it is symmetric under l <-> L - l, so that couples
need only the folded levels min(l, L - l). The empty side takes half of the weight out of one draw in (L +
1) / 2, so that even a constant log p has noise: of no account in a difference of two models, where
constants cancel, but not in an ELBO by itself. *Mirrored* levels l and L + 1 - l, the antithetic pair of
U{1..L}, have no empty side: the second mask is the complement and one token more, (1/2) [L/l S(M) +
L/(L+1-l) S(M')] has expectation B as each of its halves has, and its total weight is L in every draw.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from vrpo.estimator.levels import WORD, Levels, Uniform
from vrpo.estimator.row_weights import (
    RowWeights,
    balanced,
    leave_one_couple_out,
    token_ratio,
    token_ratio_jackknife,
)

T_FLOOR = 1e-3
"""Smallest masking probability of the t-form. Without one its variance is infinite (method: E[1/t])."""

_GRID = 2**31
_COUPLES_PER_CIRCLE = 4
_SAMPLES_PER_CIRCLE = 8


def _streams(length_R: Tensor, num_samples: int) -> Tensor:
    """A permutation of its own for every sample."""
    return torch.arange(num_samples).expand(len(length_R), num_samples)


def _counts(length_R: Tensor, count_RK: Tensor, weight_RK: Tensor, replicate_K: tuple[int, ...]) -> Levels:
    """Independent permutations, the first count positions of each."""
    return Levels(
        stream_RK=_streams(length_R, count_RK.shape[1]),
        first_RK=torch.zeros_like(count_RK),
        count_RK=count_RK,
        weight_RK=weight_RK,
        replicate_K=replicate_K,
    )


def _l_form(length_R: Tensor, count_RK: Tensor, replicate_K: tuple[int, ...]) -> Levels:
    return _counts(length_R, count_RK, length_R[:, None] / count_RK.double(), replicate_K)


def paper(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """The paper's l-form: l ~ U{1..L} independent, exactly l tokens masked, weight L/l.

    Unbiased: E[(L/l) * sum over masked of log p] = B. Source: arXiv 2505.19223 Eq. (14)-(15).
    """
    count_RK = torch.stack([1 + uniform.integers(k, length_R) for k in range(num_samples)], dim=1)
    return _l_form(length_R, count_RK, tuple(range(num_samples)))


def t_form(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """The t-form: t ~ U[T_FLOOR, 1), each token masked with probability t, weight 1/t.

    t is an integer multiple of 2**-32 and the weight is its exact inverse. A sample may mask nothing; its
    ELBO is then 0, as the formula says. Unbiased for the integral over [T_FLOOR, 1], which differs from the
    ELBO by the part below the floor. Source: arXiv 2505.19223 Eq. (12)-(13); floor as in LLaDA GUIDELINES.md.
    """
    floor = round(T_FLOOR * WORD)
    span_R = torch.full_like(length_R, (WORD - floor) // 2)
    # bound <= 2**31: draw half of the thresholds, every second integer.
    count_RK = torch.stack([floor + 2 * uniform.integers(k, span_R) for k in range(num_samples)], dim=1)
    return Levels(
        stream_RK=_streams(length_R, num_samples),
        first_RK=torch.zeros_like(count_RK),
        count_RK=count_RK,
        weight_RK=WORD / count_RK.double(),
        replicate_K=tuple(range(num_samples)),
        by_rank=False,
    )


def _jittered(uniform: Uniform, bound_R: Tensor, num_strata: int) -> Tensor:
    """floor((j * bound + r_j) / n), r_j ~ U{0..bound-1}: pooled over the strata j exactly uniform, (R, n)."""
    strata = [
        (j * bound_R + uniform.integers(j, bound_R)).div(num_strata, rounding_mode="floor")
        for j in range(num_strata)
    ]
    return torch.stack(strata, dim=1)


def stratified(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """The l-form with one level in each of K equal strata: l_j = 1 + floor((j*L + r_j) / K).

    The K levels pooled are exactly uniform on 1..L for every L and K, so the mean over samples is unbiased;
    a single sample is not. The usual round(k + j*L/K) is biased where j*L/K ends in exactly 1/2.
    """
    return _l_form(length_R, 1 + _jittered(uniform, length_R, num_samples), tuple(range(num_samples)))


def cyclic(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """The l-form with levels spaced evenly on the circle: l_j = 1 + (r + floor(j*L/K)) mod L, r ~ U{0..L-1}.

    Every level is uniform by itself, but one random integer moves all K: their spread says nothing of the
    variance, hence a single replicate.
    """
    offset_R = uniform.integers(0, length_R)
    steps_RK = (torch.arange(num_samples) * length_R[:, None]).div(num_samples, rounding_mode="floor")
    return _l_form(length_R, 1 + (offset_R[:, None] + steps_RK) % length_R[:, None], (0,) * num_samples)


def _circles(length_R: Tensor, count_RK: Tensor, circle_K: Tensor) -> Tensor:
    """Where each window starts if the samples of a circle lie one after the other on its permutation."""
    first_RK = torch.zeros_like(count_RK)
    for circle in circle_K.unique().tolist():
        members = (circle_K == circle).nonzero().flatten()
        count = count_RK[:, members]
        first_RK[:, members] = (count.cumsum(1) - count) % length_R[:, None]
    return first_RK


def tiled(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Stratified levels whose masks tile a permutation: each begins where the one before it ended.

    Four samples of evenly spaced levels mask about 2 L tokens, so a permutation serves at most four and
    every token is masked almost equally often. Given its level each mask is a uniform subset: unbiased.
    """
    base = stratified(uniform, length_R, num_samples)
    circle_K = torch.arange(num_samples) % math.ceil(num_samples / 4)
    return Levels(
        stream_RK=circle_K.expand_as(base.count_RK),
        first_RK=_circles(length_R, base.count_RK, circle_K),
        count_RK=base.count_RK,
        weight_RK=base.weight_RK,
        replicate_K=tuple(circle_K.tolist()),
    )


def _couples(
    uniform: Uniform,
    length_R: Tensor,
    num_samples: int,
    small_RC: Tensor,
    share_RC: Tensor,
    *,
    tiled: bool = False,
    mirrored: bool = False,
) -> Levels:
    """Samples 2c and 2c + 1 are couple c: `small` tokens masked, then all the others.

    share_RC: the part of B that couple c stands for: its expectation is share * B or, with strata, the sum
    over couples of share * E[couple value] is B. An odd K has one independent l-form sample as its last.
    mirrored: the second mask has one token more than the complement (module docstring).
    """
    num_couples = small_RC.shape[1]
    couple_C = torch.arange(num_couples)
    circle_C = couple_C % math.ceil(num_couples / _COUPLES_PER_CIRCLE) if tiled else couple_C
    first_RC = _circles(length_R, small_RC, circle_C) if tiled else torch.zeros_like(small_RC)
    length_R1 = length_R[:, None]

    def interleave(first: Tensor, second: Tensor) -> Tensor:
        return torch.stack([first, second], dim=2).flatten(1)

    count_RK = interleave(small_RC, length_R1 + int(mirrored) - small_RC)
    share_RK = share_RC.repeat_interleave(2, dim=1)
    stream_K = circle_C.repeat_interleave(2)
    first_RK = interleave(first_RC, (first_RC + small_RC) % length_R1)
    # An empty side has no rows, so its weight is never read; 1 avoids the division by zero.
    num_values_R1 = length_R1 if mirrored else length_R1 + 1
    weight_RK = num_couples * share_RK * num_values_R1 / count_RK.clamp(min=1).double()
    replicate_K = couple_C.repeat_interleave(2)
    if num_samples % 2:
        single_R1 = 1 + uniform.integers(num_samples, length_R)[:, None]
        count_RK = torch.cat([count_RK, single_R1], dim=1)
        first_RK = torch.cat([first_RK, torch.zeros_like(single_R1)], dim=1)
        weight_RK = torch.cat([weight_RK, length_R1 / single_R1.double()], dim=1)
        stream_K = torch.cat([stream_K, torch.tensor([num_samples])])
        replicate_K = torch.cat([replicate_K, torch.tensor([num_couples])])
    return Levels(
        stream_RK=stream_K.expand_as(count_RK),
        first_RK=first_RK,
        count_RK=count_RK,
        weight_RK=weight_RK,
        # Tiled couples share a permutation, and unequal shares of B are no estimates of the same thing.
        replicate_K=(0,) * num_samples if tiled else tuple(replicate_K.tolist()),
    )


def _folded(
    uniform: Uniform, length_R: Tensor, bounds: tuple[int, ...], grid: int, *, mirrored: bool = False
) -> Tensor:
    """One folded level per stratum [bounds_c, bounds_c+1) / grid of [0, 1), (R, C) in 0 .. L/2.

    With x uniform on the stratum, v = floor(x * (L + 1)) and the folded level is floor(v / 2): over all
    strata, weighted by their widths, v is exactly uniform on 0..L, so that levels 0 .. (L-1)/2 have chance
    2 / (L+1) each and L/2, which is its own mirror image, 1 / (L+1). mirrored: v = floor(x * L) and the level
    is 1 + floor(v / 2), in 1 .. (L+1)/2, likewise with L in place of L + 1. Integers only: exact for every L.
    """
    num_values_R = length_R if mirrored else length_R + 1
    levels = []
    for c, (low, high) in enumerate(pairwise(bounds)):
        point_R = low * num_values_R + uniform.integers(c, (high - low) * num_values_R)
        levels.append(point_R.div(2 * grid, rounding_mode="floor") + int(mirrored))
    return torch.stack(levels, dim=1)


def coupled(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Independent couples, l ~ U{0..L}: a mask with weight (L+1)/l, its complement with (L+1)/(L-l).

    Every token is masked once per couple. Source: ESPO's coupled l-form. K = 1 is the paper's design.
    """
    if num_samples == 1:
        return paper(uniform, length_R, 1)
    level_RC = torch.stack([uniform.integers(c, length_R + 1) for c in range(num_samples // 2)], dim=1)
    share_RC = torch.full(level_RC.shape, 1 / level_RC.shape[1], dtype=torch.float64)
    return _couples(uniform, length_R, num_samples, level_RC, share_RC)


def folded(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Couples whose folded levels min(l, L-l) lie one in each of K/2 equal strata of [0, L/2].

    K = 1 is the paper's design; an odd K has one independent l-form sample besides the couples.
    """
    if num_samples == 1:
        return paper(uniform, length_R, 1)
    num_couples = num_samples // 2
    small_RC = _folded(uniform, length_R, tuple(range(num_couples + 1)), num_couples)
    share_RC = torch.full(small_RC.shape, 1 / num_couples, dtype=torch.float64)
    return _couples(uniform, length_R, num_samples, small_RC, share_RC)


def _spaced_bounds(num_strata: int) -> tuple[tuple[int, ...], int]:
    """Strata of [0, 1) in steps of 1 / grid, bounded by about (c / C)**1.5, none of them empty."""
    grid = max(2**12, 16 * num_strata)
    bounds = [max(c, round(grid * (c / num_strata) ** 1.5)) for c in range(num_strata + 1)]
    return tuple(bounds), grid


def spaced(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Couples in strata that are narrow at small levels, tiled.

    Stratum c is [c^1.5, (c+1)^1.5) / C^1.5 of [0, L/2], its couple stands for the stratum's width, and the
    level is uniform inside. So the rows of small levels, which weigh L/l, weigh less and come more often,
    while every sample keeps a fixed total: no level noise is added. The small sides of up to four couples
    lie one after the other on one permutation, so that few tokens meet a large weight twice.
    """
    if num_samples == 1:
        return paper(uniform, length_R, 1)
    bounds, grid = _spaced_bounds(num_samples // 2)
    small_RC = _folded(uniform, length_R, bounds, grid)
    width_C = torch.tensor(bounds, dtype=torch.float64).diff() / grid
    return _couples(uniform, length_R, num_samples, small_RC, width_C.expand(small_RC.shape), tiled=True)


def mirrored(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """`spaced` with mirrored levels: the strata and tiles of `spaced`, and no noise for constant log p."""
    if num_samples == 1:
        return paper(uniform, length_R, 1)
    bounds, grid = _spaced_bounds(num_samples // 2)
    small_RC = _folded(uniform, length_R, bounds, grid, mirrored=True)
    width_C = torch.tensor(bounds, dtype=torch.float64).diff() / grid
    share_RC = width_C.expand(small_RC.shape)
    return _couples(uniform, length_R, num_samples, small_RC, share_RC, tiled=True, mirrored=True)


def _antithetic_signs(squares: list[int]) -> list[int]:
    """Signs under which the squares of the strata's widths nearly cancel: largest first, against the sum."""
    signs, total = [0] * len(squares), 0
    for k in sorted(range(len(squares)), key=lambda k: -squares[k]):
        signs[k] = -1 if total > 0 else 1
        total += signs[k] * squares[k]
    return signs


def graded(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """One level in each of K strata that are narrow at small levels; antithetic inside them, tiled.

    Stratum k is [k^1.5, (k+1)^1.5) / K^1.5 of the levels 1..L. Its sample stands for the stratum's width w_k
    and masks a number of tokens that is uniform inside it. Rows of small levels, which weigh L/l, so weigh
    less and come more often, as in `inverse-root`, but every sample keeps a fixed total: constant log p has
    no noise. One random number places all levels, from below in some strata and from above in the others. A
    log p that is linear in the level then errs by (u - 1/2) sum_k +-w_k^2, and signs make that sum small.
    Masks lie one after the other on a permutation, as in `tiled`, up to eight on one. K = 1 is `paper`.
    """
    if num_samples == 1:
        return paper(uniform, length_R, 1)
    bounds, grid = _spaced_bounds(num_samples)
    strata = list(pairwise(bounds))
    width_K = [high - low for low, high in strata]
    levels = []
    for (low, high), sign in zip(strata, _antithetic_signs([w * w for w in width_K]), strict=True):
        size_R = (high - low) * length_R
        point_R = uniform.integers(0, size_R)
        point_R = low * length_R + (point_R if sign > 0 else size_R - 1 - point_R)
        levels.append(1 + point_R.div(grid, rounding_mode="floor"))
    count_RK = torch.stack(levels, dim=1)
    share_K = torch.tensor(width_K, dtype=torch.float64) / grid
    circle_K = torch.arange(num_samples) % math.ceil(num_samples / _SAMPLES_PER_CIRCLE)
    return Levels(
        stream_RK=circle_K.expand_as(count_RK),
        first_RK=_circles(length_R, count_RK, circle_K),
        count_RK=count_RK,
        weight_RK=num_samples * share_K * length_R[:, None] / count_RK.double(),
        replicate_K=(0,) * num_samples,
    )


def _inverse_cdf(chance_RV: Tensor, point_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Index drawn from unnormalised chances (R, V) by points in [0, 2**31), and its exact probability."""
    cumulative_RV = (chance_RV.cumsum(1) / chance_RV.sum(1, keepdim=True) * _GRID).round().long()
    index_RK = torch.searchsorted(cumulative_RV, point_RK, right=True)
    before_RV = torch.cat([torch.zeros_like(cumulative_RV[:, :1]), cumulative_RV[:, :-1]], dim=1)
    probability_RK = (cumulative_RV - before_RV).gather(1, index_RK).double() / _GRID
    return index_RK, probability_RK


def _stratified_points(uniform: Uniform, length_R: Tensor, num_strata: int) -> Tensor:
    return _jittered(uniform, torch.full_like(length_R, _GRID), num_strata)


def _importance(power: float, uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Stratified l-form with P(l) ~ l**-power and weight 1 / (l * P(l)), P as drawn, on a grid of 2**-31."""
    level_V = torch.arange(1, int(length_R.max()) + 1)
    chance_RV = torch.where(level_V <= length_R[:, None], level_V.double() ** -power, 0.0)
    points_RK = _stratified_points(uniform, length_R, num_samples)
    index_RK, probability_RK = _inverse_cdf(chance_RV, points_RK)
    count_RK = 1 + index_RK
    return _counts(length_R, count_RK, 1 / (count_RK * probability_RK), tuple(range(num_samples)))


def inverse_root(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Levels drawn with P(l) ~ l**-1/2, one per stratum of that distribution; weight 1 / (l P(l)).

    The optimum for token noise that does not depend on the level; it favours gradients over scores.
    """
    return _importance(0.5, uniform, length_R, num_samples)


def time_free(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Levels drawn with P(l) ~ 1/l, so that every row weighs about H_L, the harmonic number.

    Source: Information-Theoretic Discrete Diffusion (NeurIPS 2025). For constant log p its relative variance
    is H_L / 2 - 1 where uniform levels have none: kept for comparison.
    """
    return _importance(1.0, uniform, length_R, num_samples)


def arcsine(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Couples with folded levels m drawn with p(m) ~ ((m + 1/2)(L - m + 1/2))**-1/2, one per stratum of p.

    A couple stands for P(m) / p(m) of B, P the folded chance 2/(L+1), or 1/(L+1) at m = L/2.
    """
    if num_samples == 1:
        return paper(uniform, length_R, 1)
    length_R1 = length_R[:, None]
    level_V = torch.arange(int(length_R.max()) // 2 + 1)
    chance_RV = ((level_V + 0.5) * (length_R1 - level_V + 0.5).clamp(min=0.5)) ** -0.5
    chance_RV = torch.where(2 * level_V <= length_R1, chance_RV, 0.0).double()
    points_RC = _stratified_points(uniform, length_R, num_samples // 2)
    small_RC, probability_RC = _inverse_cdf(chance_RV, points_RC)
    target_RC = torch.where(2 * small_RC == length_R1, 1.0, 2.0).double() / (length_R1 + 1)
    share_RC = target_RC / probability_RC / small_RC.shape[1]
    return _couples(uniform, length_R, num_samples, small_RC, share_RC)


def gauss_legendre(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """Fixed levels: K Gauss-Legendre nodes t_k, round(t_k L) >= 1 tokens masked, quadrature weights.

    Biased: the integral over levels is replaced by a rule of degree 2 K - 1, the node by a whole number of
    tokens. Its samples estimate different things, hence a single replicate. Source: GDPO (SDMC).
    """
    node_K, width_K = (torch.from_numpy(x) for x in np.polynomial.legendre.leggauss(num_samples))
    count_RK = ((node_K + 1) / 2 * length_R[:, None]).round().long().clamp(min=1)
    weight_RK = num_samples * (width_K / 2) * length_R[:, None] / count_RK.double()
    return _counts(length_R, count_RK, weight_RK, (0,) * num_samples)


@dataclass(frozen=True)
class Design:
    """A line of the table: the function and what is true of it.

    levels: the design. row_weights: refines the weights of a draw, None for none.
    unbiased: the expectation is B for every model and every length.
    iid: samples independent and identically distributed: masks_per_level may exceed 1.
    samples_per_replicate: how many samples make one of the independent, identically distributed parts of
        the draw; None if there are none.
    """

    levels: Callable[[Uniform, Tensor, int], Levels]
    row_weights: RowWeights | None = None
    unbiased: bool = True
    iid: bool = False
    samples_per_replicate: int | None = None


DESIGNS: dict[str, Design] = {
    "paper": Design(paper, iid=True, samples_per_replicate=1),
    "t": Design(t_form, unbiased=False, iid=True, samples_per_replicate=1),
    "stratified": Design(stratified),
    "cyclic": Design(cyclic),
    "tiled": Design(tiled),
    "inverse-root": Design(inverse_root),
    "time-free": Design(time_free),
    "gauss-legendre": Design(gauss_legendre, unbiased=False),
    "coupled": Design(coupled, samples_per_replicate=2),
    "folded": Design(folded),
    "arcsine": Design(arcsine),
    "spaced": Design(spaced),
    "folded-loo": Design(folded, leave_one_couple_out),
    "folded-balanced": Design(folded, balanced),
    "folded-ratio": Design(folded, token_ratio, unbiased=False),
    "folded-jackknife": Design(folded, token_ratio_jackknife, unbiased=False),
    "balanced": Design(spaced, balanced),
    "mirrored": Design(mirrored),
    "mirrored-balanced": Design(mirrored, balanced),
    "graded": Design(graded),
    "graded-balanced": Design(graded, balanced),
    "ratio": Design(spaced, token_ratio, unbiased=False),
}
