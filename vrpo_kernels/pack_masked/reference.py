"""Corruption and packing, and per-token weight sums, in plain PyTorch without a loop over segments."""

import torch
from torch import Tensor


def _segment_of_row(offsets_S1: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=offsets_S1.device)
    return torch.searchsorted(offsets_S1[1:].contiguous(), rows, right=True)


def pack_masked(
    tokens_U: Tensor,
    prompt_length_R: Tensor,
    response_length_R: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    num_samples: int,
    mask_token_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """tokens_T, position_T, cu_seqlens_S1, row_N, target_N; see `op.pack_masked`."""
    device = tokens_U.device
    num_segments = offsets_S1.shape[0] - 1
    length_R = prompt_length_R + response_length_R
    length_S = length_R.repeat_interleave(num_samples, output_size=num_segments)
    start_S = length_S.cumsum(0) - length_S
    clean_start_S = (length_R.cumsum(0) - length_R).repeat_interleave(num_samples, output_size=num_segments)
    segment_T = torch.repeat_interleave(
        torch.arange(num_segments, device=device),
        length_S,
        output_size=num_samples * tokens_U.shape[0],
    )
    position_T = torch.arange(segment_T.shape[0], device=device) - start_S[segment_T]
    tokens_T = tokens_U[clean_start_S[segment_T] + position_T]

    segment_N = _segment_of_row(offsets_S1, position_N.shape[0])
    row_N = start_S[segment_N] + prompt_length_R[segment_N // num_samples] + position_N
    target_N = tokens_T[row_N]
    tokens_T[row_N] = mask_token_id
    cu_seqlens_S1 = torch.cat([length_S.new_zeros(1), length_S.cumsum(0)]).int()
    return tokens_T, position_T, cu_seqlens_S1, row_N, target_N


def token_weight_sums(
    weight_N: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    response_length_R: Tensor,
    num_samples: int,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """sum_M, sum_N; see `op.token_weight_sums`."""
    response_N = _segment_of_row(offsets_S1, position_N.shape[0]) // num_samples
    start_R = response_length_R.cumsum(0) - response_length_R
    token_N = start_R[response_N] + position_N
    # Rows come in (response, sample, position) order; a stable sort by token keeps samples in order.
    order = torch.argsort(token_N, stable=True)
    token_sorted = token_N[order]
    offsets_M1 = torch.searchsorted(token_sorted, torch.arange(num_tokens + 1, device=token_N.device))
    sum_M = torch.segment_reduce(
        weight_N[order].double(), "sum", offsets=offsets_M1, unsafe=True, initial=0.0
    ).float()
    return sum_M, sum_M[token_N]
