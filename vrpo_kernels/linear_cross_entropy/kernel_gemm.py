"""The fused form: a GEMM whose epilogue (`kernel_epilogue.py`) takes exponentials of the logits on chip.

z = hidden @ weight^T never reaches memory. Two kernels: operands through TMA descriptors (Hopper) or pointers
(Ampere).
"""

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vrpo_kernels.linear_cross_entropy.kernel_epilogue import finish_block
from vrpo_kernels.linear_cross_entropy.kernel_head import Head
from vrpo_kernels.linear_cross_entropy.tiles import Tiles


@triton.jit
def _add_bias(z, bias_ptr, cols, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """z + bias[cols] by one more step of the product: ones in a single column of 16 times the bias in a row.

    Exact but for the accumulator's rounding. Added in the epilogue, the bias would make Triton convert the
    whole accumulator to another layout.
    """
    step = tl.arange(0, 16)
    bias = tl.load(bias_ptr + cols)
    bias = tl.where(step[:, None] == 0, bias[None, :], tl.zeros_like(bias)[None, :])
    ones = tl.where(step[None, :] == 0, tl.full((BLOCK_N, 16), 1.0, bias.dtype), 0.0).to(bias.dtype)
    return tl.dot(ones, bias, z, input_precision="ieee")


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
    bias_ptr,
    scale,
    softcap,
    first_extra_ptr,
    second_extra_ptr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    METRICS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KNOWN: tl.constexpr,
    NUM_PROGRAMS: tl.constexpr,
):
    """Persistent grid (NUM_PROGRAMS,): program p owns blocks p, p + NUM_PROGRAMS, ... of the tile.

    Row blocks vary fastest, so that the programs of a wave share few weight blocks through L2.
    KNOWN: the epilogue of the sweep; max_ptr and block_sum_ptr are then m and s of the rows.
    FLOP: 2 * rows * cols * D. Bytes: operands once, 8 per row and block, E if stored.
    """
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    num_blocks = row_blocks * tl.cdiv(num_cols, BLOCK_V)
    for index in range(tl.program_id(0), num_blocks, NUM_PROGRAMS):
        row_block, block = index % row_blocks, index // row_blocks
        z = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            hidden = hidden_desc.load([row_block * BLOCK_N, start])
            weight = weight_desc.load([first_col + block * BLOCK_V, start])
            z = tl.dot(hidden, weight.T, z)
        if HAS_BIAS:
            cols = (block * BLOCK_V + tl.arange(0, BLOCK_V)) % num_cols
            z = _add_bias(z, bias_ptr, first_col + cols, BLOCK_N, BLOCK_V)
        if SCALED:
            z = z * scale
        span, tile = (num_rows, first_col, num_cols), (tile_ptr, stride_tile)
        rows = (target_ptr, max_ptr, block_max_ptr, block_sum_ptr, first_extra_ptr, second_extra_ptr)
        switches = (stride_block, raise_by, store_tile)
        finish_block(
            z, row_block, block, span, tile, rows, switches, softcap,
            HAS_CAP, METRICS, SLICES, BLOCK_N, BLOCK_V, KNOWN,
        )  # fmt: skip


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
    bias_ptr,
    scale,
    softcap,
    first_extra_ptr,
    second_extra_ptr,
    HAS_BIAS: tl.constexpr,
    SCALED: tl.constexpr,
    HAS_CAP: tl.constexpr,
    METRICS: tl.constexpr,
    SLICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Grid (row blocks * column blocks,): one block per program, operands by cp.async.

    FLOP and bytes as the descriptor kernel. fp32 operands are multiplied in fp32 ("ieee").
    """
    index = tl.program_id(0)
    row_blocks = tl.cdiv(num_rows, BLOCK_N)
    row_block, block = index % row_blocks, index // row_blocks
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
    if HAS_BIAS:
        z = _add_bias(z, bias_ptr, first_col + offs_v % num_cols, BLOCK_N, BLOCK_V)
    if SCALED:
        z = z * scale
    span, tile = (num_rows, first_col, num_cols), (tile_ptr, stride_tile)
    rows = (target_ptr, max_ptr, block_max_ptr, block_sum_ptr, first_extra_ptr, second_extra_ptr)
    switches = (stride_block, raise_by, store_tile)
    finish_block(
        z, row_block, block, span, tile, rows, switches, softcap,
        HAS_CAP, METRICS, SLICES, BLOCK_N, BLOCK_V, KNOWN,
    )  # fmt: skip


def _fits_descriptor(tensor: Tensor) -> bool:
    """TMA wants unit inner stride and 16-byte alignment of the base and of every row."""
    row_bytes = tensor.stride(0) * tensor.element_size()
    return tensor.stride(1) == 1 and tensor.data_ptr() % 16 == 0 and row_bytes % 16 == 0


def logits_fold(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    tile: Tensor,
    max_N: Tensor,
    blocks: Tensor,
    *,
    first_col: int,
    num_cols: int,
    raise_by: float,
    store_tile: bool,
    tiles: Tiles,
    num_programs: int,
) -> None:
    """Logits of hidden [rows, D] for the classes from first_col on, num_cols of them, folded per block.

    Writes blocks [2 or 4, rows, >= column blocks] fp32, per row and block a reference, the sum of exp(logit -
    it) and, of four, the largest logit and the sum of exp(logit - reference) (logit - reference); the target
    has no part in any. Writes E into tile [rows, cols] if `store_tile`. max_N [rows] fp32 is the state before
    this tile. num_programs: SMs of the device.
    """
    metrics = len(blocks) == 4
    rows = (targets, tile, max_N, blocks[0], blocks[1])
    switches = (blocks.stride(1), raise_by, int(store_tile))
    extra = (blocks[2], blocks[3]) if metrics else (max_N, max_N)
    constants = {"KNOWN": False, "METRICS": metrics}
    _launch(hidden, head, rows, switches, extra, first_col, num_cols, tiles, num_programs, constants)


def probabilities(
    hidden: Tensor,
    head: Head,
    targets: Tensor,
    statistics: Tensor,
    tile: Tensor,
    *,
    first_col: int,
    num_cols: int,
    tiles: Tiles,
    num_programs: int,
) -> None:
    """tile [rows, cols] = exp(logit - m) / s * slope, -slope at the target, from the logits of `logits_fold`.

    statistics: [3, rows] fp32, u_y, m and s over the whole vocabulary.
    """
    target_logits, max_N, sum_N = statistics
    rows = (targets, tile, max_N, sum_N, sum_N)
    extra = (target_logits, target_logits)
    constants = {"KNOWN": True, "METRICS": False}
    _launch(hidden, head, rows, (0, 0.0, 1), extra, first_col, num_cols, tiles, num_programs, constants)


def _launch(
    hidden: Tensor,
    head: Head,
    rows: tuple[Tensor, ...],
    switches: tuple[int, float, int],
    extra: tuple[Tensor, Tensor],
    first_col: int,
    num_cols: int,
    tiles: Tiles,
    num_programs: int,
    constants: dict[str, bool],
) -> None:
    """One of the two kernels. rows: the tensors after the operands; switches: what follows stride_tile."""
    num_rows, num_hidden = hidden.shape
    weight = head.weight
    common = (*rows, num_rows, first_col, num_cols, num_hidden)
    last = (rows[1].stride(0), *switches, head.bias_or_dummy, head.scale, head.softcap, *extra)
    shape = {
        **constants,
        **head.switches(),
        "SLICES": tiles.slices if head.bias is not None or head.has_cap else 1,
        "BLOCK_N": tiles.block_rows,
        "BLOCK_V": tiles.block_cols,
        "BLOCK_D": tiles.block_hidden,
        "num_warps": tiles.num_warps,
        "num_stages": tiles.stages(num_rows),
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
            *last,
            NUM_PROGRAMS=num_programs,
            **shape,
        )
    else:
        _logits_fold_pointer_kernel[(blocks,)](
            hidden, weight, *common, hidden.stride(0), weight.stride(0), *last, **shape
        )
