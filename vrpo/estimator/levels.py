"""What a mask design is made of: uniform integers in, levels out. No positions, no tokens, no models."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo_kernels.philox import philox4x32

WORD = 2**32
PURPOSE_POSITIONS = 0
PURPOSE_LEVELS = 1


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
    replicate_K: as in MaskDraw. Independent replicates in different strata are allowed: their spread then
        overstates the variance of the mean, by the spread between strata.
    """

    stream_RK: Tensor
    first_RK: Tensor
    count_RK: Tensor
    weight_RK: Tensor
    replicate_K: tuple[int, ...]
    by_rank: bool = True


class Uniform:
    """Uniform integers of each response, keyed by (seed, epoch, example, side, first_index + index).

    Give side_R = 0 for every response and the two sides of a pair get the same words: their levels are then
    the same fraction of their lengths. Independent replicates of a design start at different first_index.
    """

    def __init__(self, seed: int, epoch: int, example_R: Tensor, side_R: Tensor, first_index: int = 0):
        self._first_index = first_index
        self._seed = seed
        self._epoch = torch.tensor(epoch, dtype=torch.int64)
        self._example_R = example_R
        self._side_R = side_R

    def _words(self, index: int) -> tuple[Tensor, Tensor]:
        index_R = torch.full_like(self._side_R, self._first_index + index)
        counter_R = stream_counter(PURPOSE_LEVELS, self._side_R, index_R)
        zero = torch.zeros_like(counter_R)
        high_R, low_R, _, _ = philox4x32(self._seed, zero, counter_R, self._example_R, self._epoch)
        return high_R, low_R

    def integers(self, index: int, bound_R: Tensor) -> Tensor:
        """The index-th integer of each response, uniform on 0 .. bound - 1 (bound <= 2**31).

        floor(word64 * bound / 2**64): the probability of a value is off by at most 2**-64.
        """
        high_R, low_R = self._words(index)
        return (high_R * bound_R + ((low_R * bound_R) >> 32)) >> 32
