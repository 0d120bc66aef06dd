"""The C++ attention (`csrc/segment_attention.cpp`)."""

import torch
from torch import Tensor


def forward(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, cu_seqlens_S1: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """(out (T, heads, d), softmax (2, heads, T)), float32; softmax: of each query's scores, scale * q k^T,
    the maximum, and 1 / sum of exp(score - maximum). One number for both, log-sum-exp, would lose the sum to
    rounding where scores are large.

    Args: heads with unit stride along d, any other strides; boundaries that ascend from 0 to T.
    """
    return torch.ops.vrpo.segment_attention_forward(query_THd, key_THd, value_THd, cu_seqlens_S1, scale)


def backward(
    dout_THd: Tensor,
    query_THd: Tensor,
    key_THd: Tensor,
    value_THd: Tensor,
    softmax_2HT: Tensor,
    cu_seqlens_S1: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dquery, dkey, dvalue), contiguous."""
    return torch.ops.vrpo.segment_attention_backward(
        dout_THd, query_THd, key_THd, value_THd, softmax_2HT, cu_seqlens_S1, scale
    )
