"""The C++ packing (`csrc/pack_masked.cpp`)."""

import torch
from torch import Tensor


def pack_masked(
    tokens_U: Tensor,
    prompt_length_R: Tensor,
    response_length_R: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    num_samples: int,
    mask_token_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.pack_masked`; segments in parallel, every output written once."""
    return torch.ops.vrpo.pack_masked(
        tokens_U,
        prompt_length_R,
        response_length_R,
        position_N,
        offsets_S1,
        num_samples,
        mask_token_id,
    )


def token_weight_sums(
    weight_N: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    response_length_R: Tensor,
    num_samples: int,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """As `reference.token_weight_sums`; responses in parallel."""
    return torch.ops.vrpo.token_weight_sums(
        weight_N, position_N, offsets_S1, response_length_R, num_samples, num_tokens
    )
