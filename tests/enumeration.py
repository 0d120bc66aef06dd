"""Every outcome of a mask draw for a short response, and the exact ELBO of an arbitrary function of masks."""

import itertools
import math
from dataclasses import replace

import torch

from vrpo.batch import MaskDraw
from vrpo.estimator.designs import DESIGNS


class EveryInteger:
    """Stands in for Uniform: response r sees the r-th point of the product of all ranges of random words.

    bounds: of every index the ranges of the integers asked for. All come from the same word, as floor(word *
    bound / number of words): with a multiple of all bounds every integer of each range is equally likely.
    """

    def __init__(self, bounds, num_permutations):
        self.num_words = [math.lcm(*asked) for asked in bounds]
        points = list(itertools.product(*map(range, self.num_words)))
        self.num_levels = len(points)
        self.table_RI = torch.tensor(points).reshape(len(points), len(bounds))
        self.table_RI = self.table_RI.repeat_interleave(num_permutations, dim=0)
        self.bounds = bounds

    def integers(self, index, bound_R):
        bound = int(bound_R[0])
        assert bound in self.bounds[index], "the test enumerates another range than the design draws"
        return self.table_RI[:, index] * bound // self.num_words[index]


def random_table(length, seed=0):
    """Values (2**L, L, 4): of token i under the mask with bits M; channel 0 is log p, 1..3 its gradient."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2**length, length, 4, generator=generator, dtype=torch.float64) - 2.0


def exact_elbo(table):
    """B = mean over l = 1..L of the mean over subsets M of size l of (L/l) sum over i in M, enumerated."""
    length = table.shape[1]
    total = torch.zeros(table.shape[2], dtype=torch.float64)
    for size in range(1, length + 1):
        for subset in itertools.combinations(range(length), size):
            bits = sum(1 << i for i in subset)
            total += table[bits, list(subset)].sum(0) / (size * math.comb(length, size))
    return total


def level_bounds(design, length, num_samples):
    """The ranges of the integers a design draws, by recording what it asks for."""
    bounds = {}

    class Recorder:
        def integers(self, index, bound_R):
            bounds.setdefault(index, set()).add(int(bound_R[0]))
            return torch.zeros_like(bound_R)

    levels = DESIGNS[design].levels(Recorder(), torch.tensor([length]), num_samples)
    last = max(bounds, default=-1)
    return [bounds.get(index, {1}) for index in range(last + 1)], levels.stream_RK[0]


def every_draw(design, length, num_samples):
    """All equally likely outcomes of a by-rank design, as one MaskDraw of R responses with row weights."""
    bounds, stream_K = level_bounds(design, length, num_samples)
    streams = stream_K.unique().tolist()
    permutations = list(itertools.permutations(range(length)))
    joint = torch.tensor(list(itertools.product(permutations, repeat=len(streams))))  # rank of each position
    uniform = EveryInteger(bounds, len(joint))
    num_responses = uniform.num_levels * len(joint)
    length_R = torch.full((num_responses,), length)
    levels = DESIGNS[design].levels(uniform, length_R, num_samples)
    rank_RKL = joint[:, [streams.index(s) for s in stream_K.tolist()]].repeat(uniform.num_levels, 1, 1)
    masked_RKL = (rank_RKL - levels.first_RK[:, :, None]) % length < levels.count_RK[:, :, None]
    segment_N, position_N = masked_RKL.flatten(0, 1).nonzero(as_tuple=True)
    count_S = masked_RKL.sum(2).flatten()
    drawn = MaskDraw(
        position_N=position_N,
        weight_N=levels.weight_RK.flatten()[segment_N].float(),
        offsets_S1=torch.cat([torch.zeros(1, dtype=torch.int64), count_S.cumsum(0)]),
        num_samples=num_samples,
        replicate_K=levels.replicate_K,
    )
    reweight = DESIGNS[design].row_weights
    if reweight is not None and num_samples > 1:
        drawn = replace(drawn, weight_N=reweight(drawn, length_R))
    return drawn, length_R


def estimates(drawn, length, table):
    """The ELBO estimate of every response of a draw whose responses have one length: (R, channels)."""
    num_segments = len(drawn.offsets_S1) - 1
    segment_N = torch.arange(num_segments).repeat_interleave(drawn.offsets_S1.diff())
    bits_S = torch.zeros(num_segments, dtype=torch.int64).index_add_(0, segment_N, 1 << drawn.position_N)
    value_N = table[bits_S[segment_N], drawn.position_N] * drawn.weight_N.double()[:, None]
    sum_S = torch.zeros(num_segments, table.shape[2], dtype=torch.float64).index_add_(0, segment_N, value_N)
    return sum_S.view(-1, drawn.num_samples, table.shape[2]).mean(1)
