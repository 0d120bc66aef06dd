"""From per-row NLLs to ELBO estimates. Knows weights and segments, nothing of preferences."""

from torch import Tensor

from vrpo.batch import PackedBatch
from vrpo_kernels import segment_sum


def elbo(nll_N: Tensor, pack: PackedBatch) -> Tensor:
    """ELBO estimate of every sample of every response, in nats.

        elbo_{r,k} = - sum over the masked rows n of segment (r, k) of weight_n * nll_n

    A sum over the response, never divided by its length (arXiv 2505.19223 Eq. (7), (14)); the estimate of
    the response is the mean over its K samples.

    Args: nll_N (N,) float32 or float64, nats; pack: its weight_N and offsets_S1.
    Returns: elbo_RK (R, K) in the dtype of nll_N.
    """
    elbo_S = -segment_sum(pack.weight_N.to(nll_N.dtype) * nll_N, pack.offsets_S1)
    return elbo_S.view(-1, pack.num_samples)
