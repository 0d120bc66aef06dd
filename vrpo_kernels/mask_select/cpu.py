"""The C++ mask draw (`csrc/mask_select.cpp`)."""

import torch
from torch import Tensor


def mask_select(
    length_S: Tensor,
    counter_S3: Tensor,
    first_S: Tensor,
    count_S: Tensor,
    seed: int,
    by_rank: bool,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.mask_select`; segments in parallel."""
    key = seed - 2**64 if seed >= 2**63 else seed  # the operator schema has signed integers only
    return torch.ops.vrpo.mask_select(length_S, counter_S3, first_S, count_S, key, by_rank)
