"""The fused form: a GEMM whose epilogue takes exponentials of the logits while they are on chip.

z = hidden @ weight^T never reaches memory. Forward, the epilogue leaves per row and column block (reference,
sum of exp) without the target, and, if wanted, E under the reference that `kernel_fold._fold_blocks_kernel`
expects. In the sweep, where the statistics are known, it leaves the probabilities. Two kernels: operands
through TMA descriptors (Hopper) or pointers (Ampere).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vrpo_kernels.linear_cross_entropy.tiles import LOWEST, Tiles
from vrpo_kernels.triton_math import as_reference

_NEG_INF = tl.constexpr(float("-inf"))
_LOWEST = tl.constexpr(LOWEST)


@triton.jit
def _place(index, row_blocks, col_blocks, GROUP_N: tl.constexpr):
    """(row block, column block) of the index-th block: groups of GROUP_N row blocks, columns by columns."""
    first = index // (GROUP_N * col_blocks) * GROUP_N
    rows = tl.minimum(row_blocks - first, GROUP_N)
    within = index % (GROUP_N * col_blocks)
    return first + within % rows, within // rows


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
    block_max = as_reference(tl.maximum(tl.max(z, axis=1), _LOWEST))
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


@triton.jit
def _known_block(
    z,
    target_ptr,
    tile_ptr,
    max_ptr,
    sum_ptr,
    offs_n,
    block,
    num_rows,
    first_col,
    num_cols,
    stride_tile,
    BLOCK_V: tl.constexpr,
):
    """Epilogue of one block with the statistics known: exp(z - m) / s, and -1 at the target."""
    in_n = offs_n < num_rows
    offs_v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    target = tl.load(target_ptr + offs_n, mask=in_n, other=-1) - first_col
    max_n = tl.load(max_ptr + offs_n, mask=in_n, other=float("inf"))  # rows past the end become 0
    sum_n = tl.load(sum_ptr + offs_n, mask=in_n, other=1.0)
    log_sum = tl.where(sum_n > 0.0, max_n + tl.log(sum_n), 0.0)  # s = 0 where there is no other class
    e = tl.where(offs_v[None, :] == target[:, None], -1.0, tl.exp(z - log_sum[:, None]))
    out = tile_ptr + offs_n[:, None] * stride_tile + offs_v[None, :]
    tl.store(out, e.to(tile_ptr.dtype.element_ty), mask=in_n[:, None] & (offs_v[None, :] < num_cols))


@triton.jit
def _finish_block(
    z,
    target_ptr,
    tile_ptr,
    max_ptr,
    block_max_ptr,
    block_sum_ptr,
    row_block,
    block,
    num_rows,
    first_col,
    num_cols,
    stride_tile,
    stride_block,
    raise_by,
    store_tile,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Epilogue of one block: of the sweep if KNOWN (m in max_ptr, s in block_sum_ptr), else of the fold."""
    offs_n = (row_block * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    if KNOWN:
        _known_block(
            z,
            target_ptr,
            tile_ptr,
            max_ptr,
            block_sum_ptr,
            offs_n,
            block,
            num_rows,
            first_col,
            num_cols,
            stride_tile,
            BLOCK_V,
        )
    else:
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
    GROUP_N: tl.constexpr,
    KNOWN: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """Persistent grid (NUM_PROGRAMS,): program p owns blocks p, p + NUM_PROGRAMS, ... of the tile.

    Row blocks vary fastest, so that the programs of a wave share few weight blocks through L2 (`_place`).
    KNOWN: the epilogue of the sweep; max_ptr and block_sum_ptr are then m and s of the rows.
    FLOP: 2 * rows * cols * D. Bytes: operands once, 8 per row and block, E if stored.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    num_blocks = row_blocks * tl.cdiv(num_cols, BLOCK_V)
    for index in range(tl.program_id(0), num_blocks, NUM_PROGRAMS):
        row_block, block = _place(index, row_blocks, num_blocks // row_blocks, GROUP_N)
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            hidden = hidden_desc.load([row_block * BLOCK_N, start])
            weight = weight_desc.load([first_col + block * BLOCK_V, start])
            z = tl.dot(hidden, weight.T, z)
        _finish_block(
            z,
            target_ptr,
            tile_ptr,
            max_ptr,
            block_max_ptr,
            block_sum_ptr,
            row_block,
            block,
            num_rows,
            first_col,
            num_cols,
            stride_tile,
            stride_block,
            raise_by,
            store_tile,
            BLOCK_N,
            BLOCK_V,
            KNOWN,
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
    GROUP_N: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Grid (row blocks * column blocks,): one block per program, operands by cp.async.

    FLOP and bytes as the descriptor kernel. fp32 operands are multiplied in fp32 ("ieee").
    """
    index = tl.program_id(0)
    row_block, block = _place(index, tl.cdiv(num_rows, BLOCK_N), tl.cdiv(num_cols, BLOCK_V), GROUP_N)
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
    _finish_block(
        z,
        target_ptr,
        tile_ptr,
        max_ptr,
        block_max_ptr,
        block_sum_ptr,
        row_block,
        block,
        num_rows,
        first_col,
        num_cols,
        stride_tile,
        stride_block,
        raise_by,
        store_tile,
        BLOCK_N,
        BLOCK_V,
        KNOWN,
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
    max_N [rows] fp32 is the state before this tile. num_programs: SMs of the device.
    """
    rows = (targets, tile, max_N, block_max, block_sum)
    switches = (block_max.stride(0), raise_by, int(store_tile))
    _launch(hidden, weight, rows, switches, first_col, num_cols, tiles, num_programs, known=False)


def probabilities(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    tile: Tensor,
    max_N: Tensor,
    sum_N: Tensor,
    *,
    first_col: int,
    num_cols: int,
    tiles: Tiles,
    num_programs: int,
) -> None:
    """tile [rows, cols] = exp(z - m) / s with -1 at the target, from the same logits as `logits_fold`.

    max_N, sum_N: [rows] fp32, m and s over the whole vocabulary.
    """
    rows = (targets, tile, max_N, sum_N, sum_N)
    _launch(hidden, weight, rows, (0, 0.0, 1), first_col, num_cols, tiles, num_programs, known=True)


def _launch(
    hidden: Tensor,
    weight: Tensor,
    rows: tuple[Tensor, ...],
    switches: tuple[int, float, int],
    first_col: int,
    num_cols: int,
    tiles: Tiles,
    num_programs: int,
    *,
    known: bool,
) -> None:
    """One of the two kernels. rows: the tensors after the operands; switches: what follows stride_tile."""
    num_rows, num_hidden = hidden.shape
    common = (*rows, num_rows, first_col, num_cols, num_hidden)
    strides = (rows[1].stride(0), *switches)
    shape = {
        "BLOCK_N": tiles.block_rows,
        "BLOCK_V": tiles.block_cols,
        "BLOCK_D": tiles.block_hidden,
        "GROUP_N": tiles.group_rows,
        "KNOWN": known,
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
