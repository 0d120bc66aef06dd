"""Mask draws: which tokens of which sample are masked, and what each masked row weighs.

A draw is made once, from integers (Philox4x32-10), and handed to the policy and to the reference; nothing
downstream draws random numbers or compares a token with the mask id. It is a pure function of
(seed, epoch, example, side, sample, position): batch order, micro-batches, world size and resume do not
appear in it.

A design is one function `(uniform, length_R, num_samples) -> Levels` and one line in DESIGNS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo.batch import MaskDraw, ResponseBatch
from vrpo_kernels import mask_select
from vrpo_kernels.philox import philox4x32

EVALUATION_EPOCH = 2**32 - 1
"""The epoch of evaluation draws: the same masks each time, and never those of training."""

T_FLOOR = 1e-3
"""Smallest masking probability of the t-form. Without one its variance is infinite (method: E[1/t])."""

_PURPOSE_POSITIONS = 0
_PURPOSE_LEVELS = 1
_WORD = 2**32
_MAX_STREAM = 2**24


def stream_counter(purpose: int, side: Tensor, stream: Tensor) -> Tensor:
    """Philox counter word c1: what a stream of random words is for. side < 16, stream < 2**24."""
    return (purpose << 28) | (side << 24) | stream


@dataclass(frozen=True)
class Levels:
    """What a design decides about each response before any position is drawn.

    stream_RK: the permutation (stream of Philox words) that sample k reads; samples with equal streams see
        the same permutation, which is how complementary masks are made.
    first_RK, count_RK: by_rank: the masked tokens are those whose rank r in the permutation satisfies
        (r - first) mod L < count; otherwise a token with word w is masked iff (w - first) mod 2**32 < count.
    weight_RK: float64, the ELBO weight of every masked row of the sample.
    replicate_K: as in MaskDraw.
    """

    stream_RK: Tensor
    first_RK: Tensor
    count_RK: Tensor
    weight_RK: Tensor
    replicate_K: tuple[int, ...]
    by_rank: bool = True


class Uniform:
    """Uniform integers of each response, keyed by (seed, epoch, example, side, index)."""

    def __init__(self, seed: int, epoch: int, example_R: Tensor, side_R: Tensor):
        self._seed = seed
        self._epoch = torch.tensor(epoch, dtype=torch.int64)
        self._example_R = example_R
        self._side_R = side_R

    def _words(self, index: int) -> tuple[Tensor, Tensor]:
        counter_R = stream_counter(_PURPOSE_LEVELS, self._side_R, torch.full_like(self._side_R, index))
        zero = torch.zeros_like(counter_R)
        high_R, low_R, _, _ = philox4x32(self._seed, zero, counter_R, self._example_R, self._epoch)
        return high_R, low_R

    def integers(self, index: int, bound_R: Tensor) -> Tensor:
        """The index-th integer of each response, uniform on 0 .. bound - 1 (bound <= 2**31).

        floor(word64 * bound / 2**64): the probability of a value is off by at most 2**-64.
        """
        high_R, low_R = self._words(index)
        return (high_R * bound_R + ((low_R * bound_R) >> 32)) >> 32


def _distinct_streams(length_R: Tensor, num_samples: int) -> Tensor:
    return torch.arange(num_samples).expand(len(length_R), num_samples)


def paper(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """The paper's l-form: l ~ U{1..L} independent, exactly l tokens masked, weight L/l.

    Unbiased: E[(L/l) * sum over masked of log p] = B. Source: arXiv 2505.19223 Eq. (14)-(15).
    """
    count_RK = torch.stack([1 + uniform.integers(k, length_R) for k in range(num_samples)], dim=1)
    return Levels(
        stream_RK=_distinct_streams(length_R, num_samples),
        first_RK=torch.zeros_like(count_RK),
        count_RK=count_RK,
        weight_RK=length_R[:, None] / count_RK.double(),
        replicate_K=tuple(range(num_samples)),
    )


def t_form(uniform: Uniform, length_R: Tensor, num_samples: int) -> Levels:
    """The t-form: t ~ U[T_FLOOR, 1), each token masked with probability t, weight 1/t.

    t is an integer multiple of 2**-32 and the weight is its exact inverse. A sample may mask nothing; its
    ELBO is then 0, as the formula says. Unbiased for the integral over [T_FLOOR, 1], which differs from the
    ELBO by the part below the floor. Source: arXiv 2505.19223 Eq. (12)-(13); floor as in LLaDA GUIDELINES.md.
    """
    floor = round(T_FLOOR * _WORD)
    span_R = torch.full_like(length_R, (_WORD - floor) // 2)
    # bound <= 2**31: draw half of the thresholds, every second integer.
    count_RK = torch.stack([floor + 2 * uniform.integers(k, span_R) for k in range(num_samples)], dim=1)
    return Levels(
        stream_RK=_distinct_streams(length_R, num_samples),
        first_RK=torch.zeros_like(count_RK),
        count_RK=count_RK,
        weight_RK=_WORD / count_RK.double(),
        replicate_K=tuple(range(num_samples)),
        by_rank=False,
    )


@dataclass(frozen=True)
class Design:
    """A line of the table: the function and what is true of it."""

    levels: Callable[[Uniform, Tensor, int], Levels]
    unbiased: bool
    iid: bool  # samples independent and identically distributed: masks_per_level may exceed 1


DESIGNS: dict[str, Design] = {
    "paper": Design(paper, unbiased=True, iid=True),
    "t": Design(t_form, unbiased=False, iid=True),
}


def _repeat_levels(levels: Levels, masks_per_level: int) -> Levels:
    """n_t levels with n_yt fresh masks each: the allocation n_t x n_yt of arXiv 2505.19223 Eq. (5)."""
    repeated = [
        tensor.repeat_interleave(masks_per_level, dim=1)
        for tensor in (levels.first_RK, levels.count_RK, levels.weight_RK)
    ]
    num_responses, num_levels = levels.count_RK.shape
    return Levels(
        torch.arange(num_levels * masks_per_level).expand(num_responses, -1),
        *repeated,
        replicate_K=tuple(j for j in levels.replicate_K for _ in range(masks_per_level)),
        by_rank=levels.by_rank,
    )


def check_design(design: str, num_samples: int, masks_per_level: int) -> None:
    """ValueError unless (design, K, n_yt) can be drawn."""
    if design not in DESIGNS:
        raise ValueError(f"mask_design must be one of {sorted(DESIGNS)}, got {design!r}")
    if not 1 <= num_samples < _MAX_STREAM:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if masks_per_level < 1 or num_samples % masks_per_level:
        raise ValueError(f"masks_per_level must divide num_samples = {num_samples}, got {masks_per_level}")
    if masks_per_level > 1 and not DESIGNS[design].iid:
        raise ValueError(f"masks_per_level = {masks_per_level} needs an iid mask_design, got {design!r}")


def draw(
    batch: ResponseBatch,
    *,
    design: str = "paper",
    num_samples: int = 8,
    masks_per_level: int = 1,
    seed: int,
    epoch: int,
) -> MaskDraw:
    """Draw the masks of every response of the batch: K samples each, levels first, then positions.

    Args:
        batch: only its lengths and identities are read, never a token.
        design: a key of DESIGNS.
        num_samples: K = n_t * n_yt, at least 1.
        masks_per_level: n_yt, masks drawn at each level; divides num_samples; iid designs only.
        seed: 64-bit key. epoch: in [0, 2**32), EVALUATION_EPOCH for evaluation.
    Returns: a MaskDraw on the CPU. The same object must go to the policy and to the reference.
    Errors: ValueError naming the argument.
    """
    check_design(design, num_samples, masks_per_level)
    if not 0 <= epoch < _WORD:
        raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
    uniform = Uniform(seed, epoch, batch.example_R, batch.side_R)
    levels = DESIGNS[design].levels(uniform, batch.response_length_R, num_samples // masks_per_level)
    if masks_per_level > 1:
        levels = _repeat_levels(levels, masks_per_level)
    return select(levels, batch, num_samples=num_samples, seed=seed, epoch=epoch)


def select(levels: Levels, batch: ResponseBatch, *, num_samples: int, seed: int, epoch: int) -> MaskDraw:
    """Turn levels into positions and row weights."""
    counter_RK = stream_counter(_PURPOSE_POSITIONS, batch.side_R[:, None], levels.stream_RK)
    example_RK = batch.example_R[:, None].expand_as(counter_RK)
    epoch_RK = torch.full_like(counter_RK, epoch)
    counter_S3 = torch.stack([counter_RK, example_RK, epoch_RK], dim=-1).reshape(-1, 3)
    position_N, offsets_S1 = mask_select(
        batch.response_length_R.repeat_interleave(num_samples),
        counter_S3,
        levels.first_RK.reshape(-1),
        levels.count_RK.reshape(-1),
        seed=seed,
        by_rank=levels.by_rank,
    )
    weight_S = levels.weight_RK.reshape(-1)
    return MaskDraw(
        position_N=position_N,
        weight_N=weight_S.repeat_interleave(offsets_S1.diff()).float(),
        offsets_S1=offsets_S1,
        num_samples=num_samples,
        replicate_K=levels.replicate_K,
    )
