"""The gradient of a head's bias: weighted column sums of the tiles that the head's gradient is formed from.

dbias_v = sum_n dnll_n q_n scale * (E_nv D_nv / s_n, or -D_ny at the target)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.linear_cross_entropy.kernel_head import tile_factor


@triton.jit
def _tile_factors_kernel(
    dnll_ptr,
    statistics_ptr,
    out_ptr,
    N,
    stride_dnll,
    softcap,
    scale,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PER_SUM: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Grid (ceil(N / BLOCK_N),): the unrounded factor of each row's tile, fp64 for fp32 tiles, else fp32."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_n = offs_n < N
    row = tl.where(in_n, offs_n, 0)
    dnll = tl.load(dnll_ptr + row * stride_dnll)
    factor = tile_factor(statistics_ptr, dnll, row, N, softcap, scale, HAS_CAP, SCALED, PER_SUM, TILE, TILE)
    tl.store(out_ptr + offs_n, factor, mask=in_n)


@triton.jit
def _column_sums_kernel(
    tile_ptr,
    factor_ptr,
    out_ptr,
    num_rows,
    num_cols,
    stride_tile,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Grid (ceil(cols / BLOCK_V),): out_v = [out_v +] sum_n factor_n tile_nv, in the dtype of factor and out.

    One program owns BLOCK_V columns and walks down all rows: one fixed order, no atomics.
    FLOP: 2 per entry. Bytes: the tile once.
    """
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = offs_v < num_cols
    lanes = tl.zeros((BLOCK_N, BLOCK_V), dtype=out_ptr.dtype.element_ty)
    for start in range(0, num_rows, BLOCK_N):
        offs_n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        in_n = offs_n < num_rows
        factor = tl.load(factor_ptr + offs_n, mask=in_n, other=0.0)
        at = tile_ptr + offs_n[:, None] * stride_tile + offs_v[None, :]
        tile = tl.load(at, mask=in_n[:, None] & in_v[None, :], other=0.0)
        lanes += tile.to(factor.dtype) * factor[:, None]
    total = tl.sum(lanes, axis=0)
    if ACCUMULATE:
        total += tl.load(out_ptr + offs_v, mask=in_v, other=0.0)
    tl.store(out_ptr + offs_v, total, mask=in_v)


_TILE_TYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def tile_factors(
    dnll: Tensor, statistics: Tensor, dtype: torch.dtype, *, softcap: float, scale: float, per_sum: bool
) -> Tensor:
    """[N] what the rows of tiles of this dtype are multiplied by; fp64 for fp32 tiles, else fp32."""
    wide = torch.float64 if dtype is torch.float32 else torch.float32
    out = statistics.new_empty(dnll.shape, dtype=wide)
    _tile_factors_kernel[(triton.cdiv(len(out), 128),)](
        dnll,
        statistics,
        out,
        len(out),
        dnll.stride(0),
        softcap,
        scale,
        HAS_CAP=softcap != 0.0,
        SCALED=scale != 1.0,
        PER_SUM=per_sum,
        TILE=_TILE_TYPES[dtype],
        BLOCK_N=128,
        num_warps=4,
        enable_fp_fusion=False,
    )
    return out


def column_sums(tile: Tensor, factor_N: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out[v] = sum_n factor[n] * tile[n, v], added to out if accumulate; tile [rows, cols], out as factor."""
    num_rows, num_cols = tile.shape
    _column_sums_kernel[(triton.cdiv(num_cols, 128),)](
        tile,
        factor_N,
        out,
        num_rows,
        num_cols,
        tile.stride(0),
        ACCUMULATE=accumulate,
        BLOCK_N=32,
        BLOCK_V=128,
        num_warps=4,
        enable_fp_fusion=False,
    )
