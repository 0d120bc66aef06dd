"""Kept tiles of one shard of a head, brought under the softmax of the whole head."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.linear_cross_entropy.kernel_head import target_entry
from vrpo_kernels.triton_math import exp, is_class

_SPAN = tl.constexpr(60.0)
"""Nats by which a shard's own m may lie below the head's before its row is written again: exp(60) times s is
far from overflowing, and a row further down has no bits to lose."""


@triton.jit
def _rebase_kept_kernel(
    kept_ptr,
    target_ptr,
    local_ptr,
    joined_ptr,
    out_ptr,
    N,
    V,
    stride_kept,
    softcap,
    HAS_CAP: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (rows,): m = max(own m, the head's - 60), s = the head's under that m; the row follows if m does.

    The target's entry, if it lives here, becomes -s * slope. NORMALISED rows (fp16) are divided by s, not by
    the shard's own, and their entry is -slope. What is rewritten is rounded once more.
    """
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    local_max = tl.load(local_ptr + N + row)
    local_sum = tl.load(local_ptr + 2 * N + row)
    target_logit = tl.load(joined_ptr + row)
    joined_max = tl.load(joined_ptr + N + row)
    new_max = tl.maximum(local_max, joined_max - _SPAN)
    new_sum = tl.load(joined_ptr + 2 * N + row) * exp(joined_max - new_max, True)
    tl.store(out_ptr + row, target_logit)
    tl.store(out_ptr + N + row, new_max)
    tl.store(out_ptr + 2 * N + row, new_sum)

    TILE: tl.constexpr = kept_ptr.dtype.element_ty
    factor = exp(local_max - new_max, True)
    entry = target_entry(target_logit, softcap, HAS_CAP, TILE)
    if NORMALISED:
        factor = tl.where(new_sum > 0.0, factor * local_sum / new_sum, 0.0)
    else:
        entry = (new_sum * entry).to(tl.float32)
    kept_row = kept_ptr + row * stride_kept
    if factor == 1.0:
        tl.store(kept_row + target, entry.to(TILE), mask=is_class(target, V))
    else:
        for start in range(0, V, BLOCK_V):
            offs_v = start + tl.arange(0, BLOCK_V)
            e = tl.load(kept_row + offs_v, mask=offs_v < V, other=0.0).to(tl.float32) * factor
            e = tl.where(offs_v == target, entry, e)
            tl.store(kept_row + offs_v, e.to(TILE), mask=offs_v < V)


def rebase_kept(kept: Tensor, targets: Tensor, local: Tensor, joined: Tensor, softcap: float) -> Tensor:
    """(3, N) statistics of the whole head under the m that kept [rows, V] has afterwards, in place.

    local, joined: [3, N] fp32, (u_y, m, s) of this shard and of the head; u_y of local is not read.
    """
    out = torch.empty_like(joined)
    _rebase_kept_kernel[(kept.shape[0],)](
        kept,
        targets,
        local,
        joined,
        out,
        joined.shape[1],
        kept.shape[1],
        kept.stride(0),
        softcap,
        HAS_CAP=softcap != 0.0,
        NORMALISED=kept.dtype is torch.float16,
        BLOCK_V=4096,
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out
