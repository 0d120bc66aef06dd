"""From per-row NLLs to ELBO estimates. Knows weights and segments, nothing of preferences."""

import math

import torch
from torch import Tensor

from vrpo.batch import PackedBatch
from vrpo_kernels import segment_sum


def segment_elbo(nll_N: Tensor, pack: PackedBatch) -> Tensor:
    """ELBO estimate of every segment s, one sample of one response, in nats.

        elbo_s = - sum over the masked rows n of segment s of weight_n * nll_n

    A sum over the response, never divided by its length (arXiv 2505.19223 Eq. (7), (14)); the estimate of
    the response is the mean over its K samples. A segment without a masked row has 0.

    Args: nll_N (N,) float32 or float64, nats; pack: its weight_N and offsets_S1.
    Returns: elbo_S (S,) in the dtype of nll_N.
    """
    return -segment_sum(pack.weight_N.to(nll_N.dtype) * nll_N, pack.offsets_S1)


def elbo(nll_N: Tensor, pack: PackedBatch) -> Tensor:
    """`segment_elbo` of a pack of whole responses, as elbo_RK (R, K)."""
    return segment_elbo(nll_N, pack).view(-1, pack.num_samples)


def elbo_std(elbo_RK: Tensor, replicate_K: tuple[int, ...]) -> Tensor:
    """Standard error of each response's ELBO over mask draws, from the replicates of its own K samples, nats.

        std = sqrt( sum_g (B_g - mean_g B_g)^2 / (G (G - 1)) ),  B_g = mean over the samples of replicate g

    Its square is an unbiased estimate of the variance of the mean over K where the G replicates are
    independent, alike and equally large (masking.independent_replicates). With few of them it is a noisy one:
    of Gaussian replicates its relative standard deviation is sqrt(2 / (G - 1)).

    Args: elbo_RK (R, K); replicate_K as in MaskDraw.
    Returns: (R,); NaN with a single replicate, since nothing can be said then.
    """
    num_replicates = max(replicate_K) + 1
    if num_replicates == 1:
        return elbo_RK.new_full((len(elbo_RK),), math.nan)
    replicate = torch.tensor(replicate_K, device=elbo_RK.device)
    member_KG = (replicate[:, None] == torch.arange(num_replicates, device=elbo_RK.device)).to(elbo_RK)
    mean_RG = elbo_RK @ (member_KG / member_KG.sum(0))
    return mean_RG.std(dim=1, correction=1) / math.sqrt(num_replicates)
