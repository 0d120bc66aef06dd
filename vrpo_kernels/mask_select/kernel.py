"""The Triton mask draw: Philox words, an exact rank window by bisection, positions written in order.

One program owns one segment. Nothing is sorted: the r-th smallest word is found bit by bit, 32 counts, from
words in registers (the first BLOCK positions) or drawn again (longer segments).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.backend import on_device

_BLOCK = 4096
_SHORT_BLOCK = 512
_LARGEST_WORD = tl.constexpr(2**32 - 1)
_U32_END = tl.constexpr(2**32)


@triton.jit
def _words(seed, c1, c2, c3, start, BLOCK: tl.constexpr):
    """uint32 words of positions start .. start + BLOCK - 1; position p owns lane p & 3 of counter p >> 2."""
    c0 = (start // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = tl.zeros((BLOCK // 4,), dtype=tl.uint32)
    w0, w1, w2, w3 = tl.philox(
        seed, c0, zero + c1.to(tl.uint32), zero + c2.to(tl.uint32), zero + c3.to(tl.uint32)
    )
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [.., a, b] is lane 2 a + b
    return tl.reshape(words, (BLOCK,))


@triton.jit
def _two_counts(words, low, high):
    """How many words lie below `low`, and below `high` in the upper 16 bits (BLOCK <= 4096) of one sum."""
    below = (words < low).to(tl.int32) + ((words < high).to(tl.int32) << 16)
    return tl.sum(below, axis=0)


@triton.jit
def _write_masked(position_ptr, masked, offs_l, written, limit):
    """Append the positions of `masked` (int32, 0 or 1) at `written`, in [0, limit); returns the new end."""
    at = written + tl.cumsum(masked, axis=0) - 1
    tl.store(position_ptr + at, offs_l, mask=(masked != 0) & (at >= 0) & (at < limit))
    return written + tl.sum(masked, axis=0)


@triton.jit
def _select_window(
    position_ptr, seed, c1, c2, c3, length, first, last, wraps, written, num_rows, BLOCK: tl.constexpr
):
    """One segment of `_select_by_rank_kernel`: masked iff first <= rank < last, or outside where it wraps."""
    offs = tl.arange(0, BLOCK)
    # A word past the end is the largest there is, and no bound lies above it: it is counted nowhere.
    near = _words(seed, c1, c2, c3, tl.zeros((), dtype=tl.int64), BLOCK)
    near = tl.where(offs < length, near, _LARGEST_WORD)
    low = tl.zeros((), dtype=tl.int64)
    high = tl.zeros((), dtype=tl.int64)
    below_low = tl.zeros((), dtype=tl.int64)
    below_high = tl.zeros((), dtype=tl.int64)
    bit = tl.full((), 2147483648, dtype=tl.int64)
    for _ in range(32):
        bound_low = (low + bit).to(tl.uint32)
        bound_high = (high + bit).to(tl.uint32)
        both = _two_counts(near, bound_low, bound_high)
        count_low = (both & 65535).to(tl.int64)
        count_high = (both >> 16).to(tl.int64)
        for start in range(BLOCK, length, BLOCK):
            far = _words(seed, c1, c2, c3, start, BLOCK)
            both = _two_counts(tl.where(offs + start < length, far, _LARGEST_WORD), bound_low, bound_high)
            count_low += (both & 65535).to(tl.int64)
            count_high += (both >> 16).to(tl.int64)
        below_low = tl.where(count_low <= first, count_low, below_low)
        low = tl.where(count_low <= first, low + bit, low)
        below_high = tl.where(count_high <= last, count_high, below_high)
        high = tl.where(count_high <= last, high + bit, high)
        bit = bit // 2

    word_low, word_high = low.to(tl.uint32), high.to(tl.uint32)
    left_low, left_high = (
        first - below_low,
        last - below_high,
    )  # of the words equal to a bound, how many count
    equal_low = tl.zeros((), dtype=tl.int64)
    equal_high = tl.zeros((), dtype=tl.int64)
    for start in range(0, length, BLOCK):
        words = near
        if start > 0:
            words = _words(seed, c1, c2, c3, start, BLOCK)
        in_l = offs + start < length
        equal = (words == word_low).to(tl.int32) + ((words == word_high).to(tl.int32) << 16)
        equal = tl.where(in_l, equal, 0)
        before = tl.cumsum(equal, axis=0) - equal
        under_low = (words < word_low) | ((words == word_low) & ((before & 65535) + equal_low < left_low))
        under_high = (words < word_high) | ((words == word_high) & ((before >> 16) + equal_high < left_high))
        outside = under_low.to(tl.int32)
        inside = under_high.to(tl.int32)
        masked = tl.where(wraps, tl.maximum(1 - outside, inside), (1 - outside) * inside)
        masked = tl.where(in_l, masked, 0)
        written = _write_masked(position_ptr, masked, (offs + start).to(tl.int64), written, num_rows)
        here = tl.sum(equal, axis=0)
        equal_low += (here & 65535).to(tl.int64)
        equal_high += (here >> 16).to(tl.int64)


@triton.jit(do_not_specialize=["seed", "num_rows"])
def _select_by_rank_kernel(
    length_ptr,
    counter_ptr,
    first_ptr,
    count_ptr,
    offset_ptr,
    position_ptr,
    seed,
    num_rows,
    SHORT_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S,): masked iff (rank - first) mod L < count, rank of (word, position) among the L positions.

    rank < x  <=>  word < T or (word = T and fewer than x - #(words < T) equal words come before),
    where T is the x-th smallest word (from 0). Both ends of the window are found in one bisection.
    32-bit integer operations: about 200 per position of the block (512 for short segments, else 4096), and
    about 30 times that beyond the first block, where words are drawn again for every count.
    """
    segment = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + segment)
    c1 = tl.load(counter_ptr + 3 * segment)
    c2 = tl.load(counter_ptr + 3 * segment + 1)
    c3 = tl.load(counter_ptr + 3 * segment + 2)
    first = tl.load(first_ptr + segment) % tl.maximum(length, 1)
    last = first + tl.load(count_ptr + segment)
    wraps = last > length
    last = tl.where(wraps, last - length, last)
    written = tl.load(offset_ptr + segment)
    if length <= SHORT_BLOCK:
        _select_window(
            position_ptr, seed, c1, c2, c3, length, first, last, wraps, written, num_rows, SHORT_BLOCK
        )
    else:
        _select_window(position_ptr, seed, c1, c2, c3, length, first, last, wraps, written, num_rows, BLOCK)


@triton.jit(do_not_specialize=["seed", "num_rows"])
def _select_by_word_kernel(
    length_ptr,
    counter_ptr,
    first_ptr,
    count_ptr,
    offset_ptr,
    position_ptr,
    seed,
    num_rows,
    WRITE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (S,): masked iff (word - first) mod 2^32 < count; writes positions, or their number."""
    segment = tl.program_id(0).to(tl.int64)
    length = tl.load(length_ptr + segment)
    c1 = tl.load(counter_ptr + 3 * segment)
    c2 = tl.load(counter_ptr + 3 * segment + 1)
    c3 = tl.load(counter_ptr + 3 * segment + 2)
    first = tl.load(first_ptr + segment)
    count = tl.load(count_ptr + segment)
    offs = tl.arange(0, BLOCK).to(tl.int64)
    written = tl.zeros((), dtype=tl.int64)
    if WRITE:
        written = tl.load(offset_ptr + segment)
    for start in range(0, length, BLOCK):
        words = _words(seed, c1, c2, c3, start, BLOCK).to(tl.int64)
        masked = ((words - first + _U32_END) % _U32_END < count) & (offs + start < length)
        if WRITE:
            written = _write_masked(position_ptr, masked.to(tl.int32), offs + start, written, num_rows)
        else:
            written += tl.sum(masked.to(tl.int64), axis=0)
    if not WRITE:
        tl.store(offset_ptr + segment, written)


@on_device
def mask_select(
    length_S: Tensor,
    counter_S3: Tensor,
    first_S: Tensor,
    count_S: Tensor,
    seed: int,
    by_rank: bool,
    num_rows: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `reference.mask_select`. Synchronises only to size the output, that is without num_rows."""
    num_segments = length_S.shape[0]
    offsets_S1 = torch.zeros(num_segments + 1, dtype=torch.int64, device=length_S.device)
    if num_segments == 0:
        return length_S.new_empty(0), offsets_S1
    inputs = tuple(tensor.contiguous() for tensor in (length_S, counter_S3, first_S, count_S))
    shape = {"BLOCK": _BLOCK, "num_warps": 8, "enable_fp_fusion": False}
    if by_rank:
        masked_S = inputs[3]
    else:
        masked_S = torch.empty_like(inputs[0])
        _select_by_word_kernel[(num_segments,)](*inputs, masked_S, None, seed, 0, WRITE=False, **shape)
    torch.cumsum(masked_S, 0, out=offsets_S1[1:])
    total = int(offsets_S1[-1]) if num_rows is None else num_rows
    position_N = length_S.new_full((max(total, 0),), -1)  # and so it stays where a bad count leaves a gap
    where = (offsets_S1, position_N, seed, total)
    if by_rank:
        _select_by_rank_kernel[(num_segments,)](*inputs, *where, SHORT_BLOCK=_SHORT_BLOCK, **shape)
    else:
        _select_by_word_kernel[(num_segments,)](*inputs, *where, WRITE=True, **shape)
    return position_N, offsets_S1
