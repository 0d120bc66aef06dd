"""The C++ cross-entropy (`csrc/cross_entropy.cpp`): one read forward, one read and one write backward.

`forward` and `backward` are the contract that every fused backend of this op fulfils.
"""

import torch
from torch import Tensor


def forward(logits_MV: Tensor, target_N: Tensor, row_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """Reads the rows row_N of logits_MV (all rows, N = M, if None) and no others.

    Args: logits_MV fp32, bf16 or fp16, unit stride along V, any stride along M.
    Returns:
        nll_N (N,) fp32; statistics (2, N) fp32: m = max over v != target of z (at least the lowest finite
        fp32), and s = sum over v != target of exp(z - m).
    """
    return torch.ops.vrpo.cross_entropy_forward(logits_MV, target_N, row_N)


def backward(
    dnll_N: Tensor,
    logits_MV: Tensor,
    target_N: Tensor,
    owner_M: Tensor | None,
    statistics: Tensor,
    out_MV: Tensor,
) -> None:
    """Writes every element of out_MV: dlogits of the row owner_M[m], zeros where owner_M[m] is -1.

    Args: owner_M (M,) int64, the index n that scores row m of the logits, or None for the identity;
        out_MV like logits_MV, and possibly logits_MV itself: each element is read before it is written.
    """
    torch.ops.vrpo.cross_entropy_backward(dnll_N, logits_MV, target_N, owner_M, statistics, out_MV)
