"""EOS fill: responses of SFT continued by end-of-text tokens, so that the number of masks tells no length.

A masked-diffusion model decodes into as many masks as it is given. Trained on bare responses, it learns that
an answer has exactly as many tokens as there are masks, and fills all of them. LLaDA (arXiv 2502.09992
section 2.3) therefore pads each response with EOS to the longest of its batch and trains on the padding. Here
the length of the fill is a pure function of (seed, epoch, example) instead: batches, accumulation, world size
and resume do not appear in it. Scores and preference losses know no fill.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vrpo.batch import ResponseBatch
from vrpo.estimator.levels import WORD, stream_counter
from vrpo_kernels.philox import philox4x32

# Of Philox: 0 and 1 draw masks (levels.py), 2 and 3 decode (generation/predict.py).
PURPOSE_EOS_FILL = 4


def fill_lengths(seed: int, epoch: int, example_R: Tensor, side_R: Tensor, bound_R: Tensor) -> Tensor:
    """How many EOS tokens to append to each response: every doubling up to the bound is equally likely.

        f + 1 = 2^j + i,   j ~ U{0 .. J - 1},   i ~ U{0 .. min(2^j, bound + 2 - 2^j) - 1}

    J = bits(bound + 1). So the lengths 0 | 1, 2 | 3 .. 6 | 7 .. 14 | ... have one chance each (the last group
    ends at the bound): a log-uniform law in integers.

    Args: example_R, side_R as in ResponseBatch; bound_R int64 in [0, 2**30).
        seed: 64-bit key; epoch: in [0, 2**32).
    Returns: (R,) int64, 0 <= f <= bound. Exact integers, the same on every machine.
    """
    zero_R = torch.zeros_like(example_R)
    counter_R = stream_counter(PURPOSE_EOS_FILL, side_R, zero_R)
    octave_word_R, word_R, _, _ = philox4x32(
        seed, zero_R, counter_R, example_R, torch.full_like(zero_R, epoch)
    )
    # bits(bound + 1): how many powers of two are not above it.
    powers = torch.ones(31, dtype=torch.int64) << torch.arange(31)
    num_octaves_R = (powers <= bound_R[:, None] + 1).sum(dim=1)
    start_R = torch.ones_like(bound_R) << ((octave_word_R * num_octaves_R) >> 32)
    size_R = torch.minimum(start_R, bound_R + 2 - start_R)
    return start_R - 1 + ((word_R * size_R) >> 32)


def mean_fill(bound: int) -> float:
    """Expectation of `fill_lengths` for one bound, tokens."""
    starts = [1 << j for j in range((bound + 1).bit_length())]
    ends = [min(2 * start - 1, bound + 1) for start in starts]
    return sum((start + end) / 2 for start, end in zip(starts, ends, strict=True)) / len(starts) - 1


@dataclass(frozen=True)
class EosFill:
    """What is appended to the responses of a run, and to which.

    eos_token_id: the token of the fill; after an end of turn too, as in LLaDA.
    endings: token sequences that end a whole response. One that ends otherwise lost its end by truncation;
        filling it would teach a wrong stop, so it stays as it is.
    max_fill: the largest fill, tokens.
    max_length: of prompt + response + fill, tokens; it lowers the bound of long examples.
    seed: 64-bit key.
    """

    eos_token_id: int
    endings: tuple[tuple[int, ...], ...]
    max_fill: int
    max_length: int
    seed: int

    @property
    def longest_ending(self) -> int:
        return max(len(ending) for ending in self.endings)

    def is_whole(self, response: list[int]) -> bool:
        """Whether the response has its end."""
        return any(tuple(response[-len(ending) :]) == ending for ending in self.endings)

    def lengths(self, batch: ResponseBatch, epoch: int) -> Tensor:
        """(R,) int64 EOS tokens to append to each response."""
        end_R = batch.length_R.cumsum(0)
        whole_R = torch.zeros(len(end_R), dtype=torch.bool)
        for ending in self.endings:
            size = len(ending)
            # Of a shorter response some of these are another's tokens; it cannot have this ending.
            place_RE = (end_R[:, None] + torch.arange(-size, 0)).clamp(min=0)
            is_same_R = (batch.tokens_U[place_RE] == torch.tensor(ending)).all(dim=1)
            whole_R |= is_same_R & (batch.response_length_R >= size)
        room_R = (self.max_length - batch.length_R).clamp(min=0, max=self.max_fill)
        return self.draw(epoch, batch, torch.where(whole_R, room_R, 0))

    def draw(self, epoch: int, batch: ResponseBatch, bound_R: Tensor) -> Tensor:
        """The law: (R,) int64 in [0, bound_R]."""
        return fill_lengths(self.seed, epoch, batch.example_R, batch.side_R, bound_R)

    def __call__(self, batch: ResponseBatch, epoch: int) -> ResponseBatch:
        """The batch with its fill, counted in response_length_R and, by itself, in fill_R."""
        if not 0 <= epoch < WORD:
            raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
        fill_R = self.lengths(batch, epoch)
        tokens_U = batch.tokens_U.new_full((len(batch.tokens_U) + int(fill_R.sum()),), self.eos_token_id)
        shift_R = fill_R.cumsum(0) - fill_R
        old_U = torch.arange(len(batch.tokens_U))
        tokens_U[old_U + shift_R.repeat_interleave(batch.length_R)] = batch.tokens_U
        return replace(
            batch,
            tokens_U=tokens_U,
            response_length_R=batch.response_length_R + fill_R,
            fill_R=fill_R,
        )
