"""The fused form of the forward pass: a GEMM whose epilogue folds the logits while they are on chip.

z = hidden @ weight^T never reaches memory. Per row and column block the epilogue leaves (max, sum of exp)
without the target, and, if wanted, E under the reference that `kernel_fold._fold_blocks_kernel`
expects. Two kernels, one epilogue: operands through TMA descriptors (Hopper) or pointers (Ampere).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vrpo_kernels.linear_cross_entropy.tiles import LOWEST, Tiles

_NEG_INF = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _fold_block(
    z,
    target_ptr,
    tile_ptr,
    max_ptr,
    block_max_ptr,
    block_sum_ptr,
    offs_n,
    block,
    num_rows,
    first_col,
    num_cols,
    stride_tile,
    stride_block,
    raise_by,
    store_tile,
    BLOCK_V: tl.constexpr,
):
    """Epilogue of one [BLOCK_N, BLOCK_V] block of logits: statistics always, E if `store_tile`."""
    in_n = offs_n < num_rows
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + offs_n, mask=in_n, other=-1) - first_col
    use = (offs_v[None, :] < num_cols) & (offs_v[None, :] != target[:, None])
    z = tl.where(use, z, _NEG_INF)
    block_max = tl.maximum(tl.max(z, axis=1), _LOWEST)
    e = tl.exp(z - block_max[:, None])
    statistics = offs_n * stride_block + block
    tl.store(block_max_ptr + statistics, block_max, mask=in_n)
    tl.store(block_sum_ptr + statistics, tl.sum(e, axis=1), mask=in_n)
    if store_tile != 0:
        old_max = tl.load(max_ptr + offs_n, mask=in_n, other=0.0)
        used = tl.where(block_max > old_max + raise_by, block_max, old_max)
        # Two factors: exp(z - used) in one step would be a second exponential per logit.
        e = e * tl.exp(block_max - used)[:, None]
        out = tile_ptr + offs_n[:, None] * stride_tile + offs_v[None, :]
        tl.store(out, e.to(tile_ptr.dtype.element_ty), mask=in_n[:, None] & (offs_v[None, :] < num_cols))


@triton.jit(do_not_specialize=["store_tile"])
def _logits_fold_descriptor_kernel(
    hidden_desc,
    weight_desc,
    target_ptr,
    tile_ptr,
    max_ptr,
    block_max_ptr,
    block_sum_ptr,
    num_rows,
    first_col,
    num_cols,
    D,
    stride_tile,
    stride_block,
    raise_by,
    store_tile,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """Persistent grid (NUM_PROGRAMS,): program p owns blocks p, p + NUM_PROGRAMS, ... of the tile.

    Row blocks vary fastest, so that the programs of a wave share few weight blocks through L2.
    FLOP: 2 * rows * cols * D. Bytes: operands once, 8 per row and block, E if stored.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    num_blocks = row_blocks * tl.cdiv(num_cols, BLOCK_V)
    for index in range(tl.program_id(0), num_blocks, NUM_PROGRAMS):
        row_block = index % row_blocks
        block = index // row_blocks
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            hidden = hidden_desc.load([row_block * BLOCK_N, start])
            weight = weight_desc.load([first_col + block * BLOCK_V, start])
            z = tl.dot(hidden, weight.T, z)
        _fold_block(
            z,
            target_ptr,
            tile_ptr,
            max_ptr,
            block_max_ptr,
            block_sum_ptr,
            (row_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64),
            block,
            num_rows,
            first_col,
            num_cols,
            stride_tile,
            stride_block,
            raise_by,
            store_tile,
            BLOCK_V,
        )


@triton.jit(do_not_specialize=["store_tile"])
def _logits_fold_pointer_kernel(
    hidden_ptr,
    weight_ptr,
    target_ptr,
    tile_ptr,
    max_ptr,
    block_max_ptr,
    block_sum_ptr,
    num_rows,
    first_col,
    num_cols,
    D,
    stride_hidden,
    stride_weight,
    stride_tile,
    stride_block,
    raise_by,
    store_tile,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (row blocks * column blocks,): one block per program, operands by cp.async.

    FLOP and bytes as the descriptor kernel. fp32 operands are multiplied in fp32 ("ieee").
    """
    index = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    row_block = index % row_blocks
    block = index // row_blocks
    offs_n = (row_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_d = tl.arange(0, BLOCK_D)
    # Rows and columns past the end wrap onto valid ones: the epilogue never uses what they give.
    rows = offs_n % num_rows
    cols = (first_col + offs_v % num_cols).to(tl.int64)
    hidden_at = hidden_ptr + rows[:, None] * stride_hidden + offs_d[None, :]
    weight_at = weight_ptr + cols[:, None] * stride_weight + offs_d[None, :]
    z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        in_d = offs_d[None, :] < D - start
        hidden = tl.load(hidden_at + start, mask=in_d, other=0.0)
        weight = tl.load(weight_at + start, mask=in_d, other=0.0)
        z = tl.dot(hidden, weight.T, z, input_precision="ieee")
    _fold_block(
        z,
        target_ptr,
        tile_ptr,
        max_ptr,
        block_max_ptr,
        block_sum_ptr,
        offs_n,
        block,
        num_rows,
        first_col,
        num_cols,
        stride_tile,
        stride_block,
        raise_by,
        store_tile,
        BLOCK_V,
    )


def _fits_descriptor(tensor: Tensor) -> bool:
    """TMA wants unit inner stride and 16-byte alignment of the base and of every row."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def logits_fold(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tile: Tensor,
    max_N: Tensor,
    block_max: Tensor,
    block_sum: Tensor,
    *,
    first_col: int,
    num_cols: int,
    raise_by: float,
    store_tile: bool,
    tiles: Tiles,
    num_programs: int,
) -> None:
    """Logits of hidden [rows, D] against weight[first_col : first_col + num_cols], folded per block.

    Writes block_max, block_sum [rows, >= blocks] fp32 and, if `store_tile`, E into tile [rows, cols].
    max_N [rows] fp32 is the state before this tile. num_programs: persistent programs, all resident at once.
    """
    num_rows, num_hidden = hidden.shape
    common = (
        targets,
        tile,
        max_N,
        block_max,
        block_sum,
        num_rows,
        first_col,
        num_cols,
        num_hidden,
    )
    strides = (tile.stride(0), block_max.stride(0), raise_by, int(store_tile))
    shape = {
        "BLOCK_N": tiles.block_rows,
        "BLOCK_V": tiles.block_cols,
        "BLOCK_D": tiles.block_hidden,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.num_stages,
        "enable_fp_fusion": False,
    }
    blocks = triton.cdiv(num_rows, tiles.block_rows) * triton.cdiv(num_cols, tiles.block_cols)
    if tiles.descriptors and _fits_descriptor(hidden) and _fits_descriptor(weight):
        hidden_block = [tiles.block_rows, tiles.block_hidden]
        weight_block = [tiles.block_cols, tiles.block_hidden]
        _logits_fold_descriptor_kernel[(min(num_programs, blocks),)](
            TensorDescriptor.from_tensor(hidden, hidden_block),
            TensorDescriptor.from_tensor(weight, weight_block),
            *common,
            *strides,
            NUM_PROGRAMS=num_programs,
            **shape,
        )
    else:
        _logits_fold_pointer_kernel[(blocks,)](
            hidden, weight, *common, hidden.stride(0), weight.stride(0), *strides, **shape
        )
