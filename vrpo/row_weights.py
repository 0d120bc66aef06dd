"""Row weights that depend on masks only: what each (token, sample) cell of a draw counts.

A design gives every masked row of sample k the same base weight (L/l in the l-form). Tokens then carry unequal
total weight W_i = (1/K) sum over the samples that mask i of their weight, and that inequality, not the level,
is most of the noise of a score with shared masks. The functions here spread the weights better. They never
look at a model, so the result is again rows and weights, the same for policy and reference.

When a re-weighting is exactly unbiased. Let omega_ki be the weight of token i in sample k, b_k the base
weight, M_k the mask. The estimate sum_ki omega_ki log p(y_i | M_k) keeps the expectation of the base design
for *every* function of (token, mask) if and only if E[omega_ki | M_k] = b_k. Call the set of samples that mask
i the *pattern* of i, and count the tokens of every pattern. All our masks are windows of uniform permutations,
so given those counts the patterns are spread over the tokens uniformly. Hence weights that are functions of
(k, pattern of i, pattern counts) are exact as soon as every sample keeps its total,

    sum over i in M_k of omega_ki = b_k * |M_k|        for every k,

because then E[omega_ki | M_k, counts] = b_k. `balanced` and `leave_one_couple_out` are exact; `token_ratio`
breaks the rule on purpose. Tensors here are dense, padded to the longest response: masked_RKL is 1 where
sample k of response r masks position l.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vrpo.batch import MaskDraw

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


def _in_response(length_R: Tensor) -> Tensor:
    """(R, 1, longest): 1 on positions of the response, 0 on padding."""
    return (torch.arange(int(length_R.max())) < length_R[:, None]).double()[:, None]
