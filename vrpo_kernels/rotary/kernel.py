"""The Triton rotation: one launch for queries and keys, each element read once and written once."""

import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.backend import on_device

_BLOCK = 2048  # pairs of elements of one program


@triton.jit
def _turn(heads_ptr, out_ptr, cos, sin, first_head, num_heads, stride_h, HALF, BLOCK_H, BLOCK_D):
    """BLOCK_H heads of one token; heads_ptr and out_ptr point at its first head."""
    offs_h = first_head + tl.arange(0, BLOCK_H)[:, None].to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    inside = (offs_h < num_heads) & (offs_d < HALF)
    heads = heads_ptr + offs_h * stride_h + offs_d
    low = tl.load(heads, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(heads + HALF, mask=inside, other=0.0).to(tl.float32)
    out = out_ptr + offs_h * (2 * HALF) + offs_d
    tl.store(out, (low * cos - high * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out + HALF, (high * cos + low * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["length", "query_heads", "key_heads"])
def _rotary_kernel(
    query_ptr,
    key_ptr,
    cos_ptr,
    sin_ptr,
    query_out_ptr,
    key_out_ptr,
    length,
    query_heads,
    key_heads,
    stride_query_b,
    stride_query_h,
    stride_query_l,
    stride_key_b,
    stride_key_h,
    stride_key_l,
    stride_angle_b,
    stride_angle_l,
    INVERSE: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (B * L, blocks of query heads + blocks of key heads): BLOCK_H heads of one token.

    Outputs are contiguous (B, L, heads, 2 HALF). FLOP: 3 per element. Bytes: one read and one write of each
    element; cos and sin once per program.
    """
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    item = token // length
    place = token % length
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    angle = item * stride_angle_b + place * stride_angle_l + offs_d
    cos = tl.load(cos_ptr + angle, mask=offs_d < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=offs_d < HALF, other=0.0)
    if INVERSE:
        sin = -sin
    query_blocks = tl.cdiv(query_heads, BLOCK_H)
    if block < query_blocks:
        heads_ptr = query_ptr + item * stride_query_b + place * stride_query_l
        out_ptr = query_out_ptr + token * query_heads * (2 * HALF)
        _turn(
            heads_ptr, out_ptr, cos, sin, block * BLOCK_H, query_heads, stride_query_h, HALF, BLOCK_H, BLOCK_D
        )
    else:
        heads_ptr = key_ptr + item * stride_key_b + place * stride_key_l
        out_ptr = key_out_ptr + token * key_heads * (2 * HALF)
        first_head = (block - query_blocks) * BLOCK_H
        _turn(heads_ptr, out_ptr, cos, sin, first_head, key_heads, stride_key_h, HALF, BLOCK_H, BLOCK_D)


def _with_unit_stride(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def block_heads(most_heads: int, half: int) -> dict[str, int]:
    """BLOCK_H and BLOCK_D for so many heads of 2 * half elements."""
    block_d = triton.next_power_of_2(half)
    fitting = max(_BLOCK // block_d, 1)
    return {"BLOCK_H": min(triton.next_power_of_2(most_heads), fitting), "BLOCK_D": block_d}


@on_device
def rotary(
    query_BHLd: Tensor, key_BHLd: Tensor, cos_BLh: Tensor, sin_BLh: Tensor, inverse: bool
) -> tuple[Tensor, Tensor]:
    """Both turned (with inverse: back), as (B, heads, L, d) views of contiguous (B, L, heads, d)."""
    batch, query_heads, length, size = query_BHLd.shape
    key_heads = key_BHLd.shape[1]
    query_out = query_BHLd.new_empty(batch, length, query_heads, size)
    key_out = key_BHLd.new_empty(batch, length, key_heads, size)
    outputs = query_out.transpose(1, 2), key_out.transpose(1, 2)
    if query_out.numel() + key_out.numel() == 0:
        return outputs
    query_BHLd, key_BHLd, cos_BLh, sin_BLh = map(_with_unit_stride, (query_BHLd, key_BHLd, cos_BLh, sin_BLh))
    if cos_BLh.stride() != sin_BLh.stride():
        cos_BLh, sin_BLh = cos_BLh.contiguous(), sin_BLh.contiguous()
    blocks = block_heads(max(query_heads, key_heads), size // 2)
    programs = triton.cdiv(query_heads, blocks["BLOCK_H"]) + triton.cdiv(key_heads, blocks["BLOCK_H"])
    _rotary_kernel[(batch * length, programs)](
        query_BHLd,
        key_BHLd,
        cos_BLh,
        sin_BLh,
        query_out,
        key_out,
        length,
        query_heads,
        key_heads,
        *query_BHLd.stride()[:3],
        *key_BHLd.stride()[:3],
        *cos_BLh.stride()[:2],
        INVERSE=inverse,
        HALF=size // 2,
        **blocks,
        num_warps=4,
        enable_fp_fusion=False,  # a fused multiply-add rounds once where the formula rounds twice
    )
    return outputs
