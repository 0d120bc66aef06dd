"""Triton packing and per-token weight sums: one launch each, every output element written by one program.

A program owns every SPLIT-th block of tokens of one segment (or response). Each token looks itself up in the
segment's ascending positions, so that nothing is sorted, scattered twice or added atomically, and the bits do
not depend on the schedule. Where a segment starts is summed by each program from the lengths: R / BLOCK_R
loads, cheaper than a launch until R reaches about a hundred thousand responses.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.backend import on_device

_BLOCK = 512
_BLOCK_R = 1024
_MAX_SPLIT = 1024  # the grid's second axis ends at 65535; more programs than this fill any device


@triton.jit
def _sum_before(length_ptr, end, BLOCK_R: tl.constexpr):
    """int64 sum of the lengths of items 0 .. end - 1."""
    offs = tl.arange(0, BLOCK_R).to(tl.int64)
    total = tl.zeros((BLOCK_R,), dtype=tl.int64)
    for start in range(0, end, BLOCK_R):
        total += tl.load(length_ptr + start + offs, mask=start + offs < end, other=0)
    return tl.sum(total, axis=0)


@triton.jit
def _rows_of(offset_ptr, segment, num_rows):
    """(begin, count) of a segment's rows; none if its offsets are no part of [0, num_rows]."""
    begin = tl.load(offset_ptr + segment)
    count = tl.load(offset_ptr + segment + 1) - begin
    good = (begin >= 0) & (count >= 0) & (begin + count <= num_rows)
    return tl.where(good, begin, 0), tl.where(good, count, 0)


@triton.jit
def _find(position_ptr, begin, count, wanted, in_l):
    """Row of each wanted position among the ascending rows begin .. begin + count - 1, and if it is there."""
    low = tl.zeros_like(wanted)
    high = tl.zeros_like(wanted) + count
    left = count
    while left > 0:
        middle = (low + high) // 2
        here = tl.load(position_ptr + begin + middle, mask=in_l & (low < high), other=0)
        after = (low < high) & (here < wanted)
        low = tl.where(after, middle + 1, low)
        high = tl.where(after, high, middle)
        left = left // 2
    inside = in_l & (low < count)
    found = tl.load(position_ptr + begin + low, mask=inside, other=-1)
    return begin + low, inside & (found == wanted)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_samples", "mask_token_id"])
def _pack_kernel(
    clean_ptr,
    prompt_length_ptr,
    response_length_ptr,
    position_ptr,
    offset_ptr,
    token_out_ptr,
    position_out_ptr,
    cu_seqlens_ptr,
    row_ptr,
    target_ptr,
    num_tokens,
    num_rows,
    num_samples,
    mask_token_id,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (S, SPLIT): tokens, positions, rows and targets of segment s; nothing out of bounds.

    A token that is masked is its own row: it finds its row number n and writes row_N[n] and target_N[n].
    Per token 8 bytes read, 16 written, and log2(count) reads that hit the cache.
    """
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    response = segment // num_samples
    prompt_length = tl.load(prompt_length_ptr + response)
    length = prompt_length + tl.load(response_length_ptr + response)
    clean_start = _sum_before(prompt_length_ptr, response, BLOCK_R)
    clean_start += _sum_before(response_length_ptr, response, BLOCK_R)
    start = clean_start * num_samples + (segment % num_samples) * length
    begin, count = _rows_of(offset_ptr, segment, num_rows)
    # A segment whose lengths do not fit is left out.
    fits = (clean_start >= 0) & (clean_start + length <= num_tokens // num_samples)
    shown = tl.where(fits & (start >= 0) & (start + length <= num_tokens), length, 0)
    if split == 0:
        tl.store(cu_seqlens_ptr + segment, start.to(tl.int32))
        if segment == tl.num_programs(0) - 1:
            tl.store(cu_seqlens_ptr + segment + 1, (start + length).to(tl.int32))

    offs = tl.arange(0, BLOCK).to(tl.int64)
    for block_start in range(split * BLOCK, shown, tl.num_programs(1) * BLOCK):
        offs_l = block_start + offs
        in_l = offs_l < shown
        clean = tl.load(clean_ptr + clean_start + offs_l, mask=in_l, other=0)
        row, masked = _find(position_ptr, begin, count, offs_l - prompt_length, in_l)
        tl.store(token_out_ptr + start + offs_l, tl.where(masked, mask_token_id, clean), mask=in_l)
        tl.store(position_out_ptr + start + offs_l, offs_l, mask=in_l)
        tl.store(row_ptr + row, start + offs_l, mask=masked)
        tl.store(target_ptr + row, clean, mask=masked)


@triton.jit(do_not_specialize=["num_tokens", "num_rows", "num_samples"])
def _token_weight_sums_kernel(
    value_ptr,
    position_ptr,
    offset_ptr,
    response_length_ptr,
    token_sum_ptr,
    row_sum_ptr,
    num_tokens,
    num_rows,
    num_samples,
    BLOCK: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Grid (R, SPLIT): sums over the samples of response r, in sample order in fp64, rounded once.

    A sample that leaves a token alone adds +0.0, which changes no sum that started from +0.0.
    """
    response = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    length = tl.load(response_length_ptr + response)
    start = _sum_before(response_length_ptr, response, BLOCK_R)
    first_segment = response * num_samples
    offs = tl.arange(0, BLOCK).to(tl.int64)
    length = tl.where((start >= 0) & (start + length <= num_tokens), length, 0)
    for block_start in range(split * BLOCK, length, tl.num_programs(1) * BLOCK):
        offs_l = block_start + offs
        in_l = offs_l < length
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for segment in range(first_segment, first_segment + num_samples):
            begin, count = _rows_of(offset_ptr, segment, num_rows)
            row, masked = _find(position_ptr, begin, count, offs_l, in_l)
            total += tl.load(value_ptr + row, mask=masked, other=0.0).to(tl.float64)
        rounded = total.to(tl.float32)
        tl.store(token_sum_ptr + start + offs_l, rounded, mask=in_l)
        for segment in range(first_segment, first_segment + num_samples):
            begin, count = _rows_of(offset_ptr, segment, num_rows)
            row, masked = _find(position_ptr, begin, count, offs_l, in_l)
            tl.store(row_sum_ptr + row, rounded, mask=masked)


def _shape() -> dict[str, int | bool]:
    return {"BLOCK": _BLOCK, "BLOCK_R": _BLOCK_R, "num_warps": 4, "enable_fp_fusion": False}


def _grid(num_items: int, num_tokens: int) -> tuple[int, int]:
    """As many programs as there are blocks if all items were equally long; lengths stay on the device."""
    return num_items, min(max(triton.cdiv(num_tokens, num_items * _BLOCK), 1), _MAX_SPLIT)


@on_device
def pack_masked(
    tokens_U: Tensor,
    prompt_length_R: Tensor,
    response_length_R: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    num_samples: int,
    mask_token_id: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `reference.pack_masked`; one launch, no synchronisation."""
    num_segments = offsets_S1.shape[0] - 1
    num_tokens = num_samples * tokens_U.shape[0]
    # What bad lengths, offsets or positions leave unwritten is -1, no index of anything.
    tokens_T, position_T = (tokens_U.new_full((num_tokens,), -1) for _ in range(2))
    row_N, target_N = (tokens_U.new_full(position_N.shape, -1) for _ in range(2))
    if num_segments == 0:
        return tokens_T, position_T, offsets_S1.new_zeros(1, dtype=torch.int32), row_N, target_N
    cu_seqlens_S1 = offsets_S1.new_empty(num_segments + 1, dtype=torch.int32)
    inputs = (tokens_U, prompt_length_R, response_length_R, position_N, offsets_S1)
    _pack_kernel[_grid(num_segments, num_tokens)](
        *(tensor.contiguous() for tensor in inputs),
        tokens_T,
        position_T,
        cu_seqlens_S1,
        row_N,
        target_N,
        num_tokens,
        position_N.shape[0],
        num_samples,
        mask_token_id,
        **_shape(),
    )
    return tokens_T, position_T, cu_seqlens_S1, row_N, target_N


@on_device
def token_weight_sums(
    weight_N: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    response_length_R: Tensor,
    num_samples: int,
    num_tokens: int,
) -> tuple[Tensor, Tensor]:
    """As `reference.token_weight_sums`; one launch, no synchronisation."""
    # What bad lengths, offsets or positions leave unwritten is NaN.
    sum_M = weight_N.new_full((num_tokens,), float("nan"))
    sum_N = torch.full_like(weight_N, float("nan"), memory_format=torch.contiguous_format)
    num_responses = response_length_R.shape[0]
    if num_responses == 0:
        return sum_M, sum_N
    inputs = (weight_N, position_N, offsets_S1, response_length_R)
    _token_weight_sums_kernel[_grid(num_responses, num_tokens)](
        *(tensor.contiguous() for tensor in inputs),
        sum_M,
        sum_N,
        num_tokens,
        position_N.shape[0],
        num_samples,
        **_shape(),
    )
    return sum_M, sum_N
