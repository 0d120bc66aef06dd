"""The formula of `segment_attention`, one segment after the other."""

from itertools import pairwise

import torch
from torch import Tensor


def segment_attention(
    query_THd: Tensor, key_THd: Tensor, value_THd: Tensor, cu_seqlens_S1: Tensor, scale: float
) -> Tensor:
    """softmax(scale * q k^T) v of each segment and head, in the dtype of the inputs.

    Args: query_THd (T, heads, d); key_THd, value_THd (T, key heads, d); cu_seqlens_S1 (S + 1,), read on the
        host.
    Returns: (T, heads, d).
    """
    group = query_THd.shape[1] // key_THd.shape[1]
    outputs = [query_THd[:0]]
    for start, end in pairwise(cu_seqlens_S1.tolist()):
        query_HLd = query_THd[start:end].transpose(0, 1)
        key_HLd, value_HLd = (
            heads[start:end].transpose(0, 1).repeat_interleave(group, dim=0) for heads in (key_THd, value_THd)
        )
        score_HLL = scale * query_HLd @ key_HLd.transpose(1, 2)
        outputs.append((score_HLL.softmax(dim=-1) @ value_HLd).transpose(0, 1))
    return torch.cat(outputs)
