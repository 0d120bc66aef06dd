"""The mask draw in int64 PyTorch: the formula every backend is held to, bit for bit.

All segments are drawn at once; nothing loops over segments and nothing is random except Philox.
"""

import torch
from torch import Tensor

from vrpo_kernels.philox import philox4x32


def mask_words(length_S: Tensor, counter_S3: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """The Philox word of every position of every segment, segments back to back.

    Position p of segment s owns lane p & 3 of philox4x32(seed, p >> 2, *counter_S3[s]).

    Returns:
        word, segment, position: int64, one element per position of the batch (sum of length_S).
    """
    device = length_S.device
    segments = torch.arange(length_S.numel(), device=device)
    blocks_S = (length_S + 3) // 4
    block_segment = torch.repeat_interleave(segments, blocks_S)
    block_start_S = blocks_S.cumsum(0) - blocks_S
    block = torch.arange(block_segment.numel(), device=device) - block_start_S[block_segment]
    lanes = philox4x32(seed, block, *counter_S3[block_segment].unbind(1))

    segment = torch.repeat_interleave(segments, length_S)
    start_S = length_S.cumsum(0) - length_S
    position = torch.arange(segment.numel(), device=device) - start_S[segment]
    word = torch.stack(lanes, dim=1).flatten()[4 * block_start_S[segment] + position]
    return word, segment, position


def mask_select(
    length_S: Tensor,
    counter_S3: Tensor,
    first_S: Tensor,
    count_S: Tensor,
    seed: int,
    by_rank: bool,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Masked positions and their segment offsets; arguments and formula as in `op.mask_select`."""
    word, segment, position = mask_words(length_S, counter_S3, seed)
    if by_rank:
        # One sort by (segment, word, position): the layout is ordered by position already, so a
        # stable sort breaks equal words by position; a segment's j-th sorted entry has rank j.
        order = torch.argsort((segment << 32) | word, stable=True)
        rank = torch.empty_like(position)
        rank[order] = position
        masked = torch.remainder(rank - first_S[segment], length_S[segment]) < count_S[segment]
    else:
        masked = torch.remainder(word - first_S[segment], 2**32) < count_S[segment]
    masked_count_S = torch.zeros_like(length_S).index_add_(0, segment, masked.long())
    offsets_S1 = torch.cat([masked_count_S.new_zeros(1), masked_count_S.cumsum(0)])
    return position[masked], offsets_S1
