"""Calls into the C++ backend (`csrc/linear_cross_entropy.cpp`), and what its choices depend on.

`forward`, `dhidden`, `dweight`, `sweep` and `kept_shapes` are the contract every fused backend of this op
fulfils.
"""

import torch
from torch import Tensor

TILE = 512  # vocabulary rows per tile; kLinearCrossEntropyTile in csrc must be the same
LANES = 16  # kept tiles are padded to whole vectors of rows
GEMMS = ("fp32",)
"""Matrix multiplications the C++ backend can use: torch's own fp32 one (MKL on x86), oneDNN's fp32
micro-kernels, oneDNN's bfloat16 micro-kernels with fp32 sums (for bfloat16 inputs only)."""


def resolve_gemm(requested: str, dtype: torch.dtype) -> str:
    """ "auto" -> the matrix multiplication for this dtype on this machine; explicit names are checked.

    A pure function of dtype and CPU model, never of timing, so that every process and every resumed run of a
    cluster with equal machines takes the same one: the choice changes the last bits of the result.

    Errors:
        ValueError if the name is unknown or does not fit the dtype.
    """
    if requested == "auto":
        return "fp32"
    if requested not in GEMMS:
        raise ValueError(f"gemm must be one of {('auto', *GEMMS)} on the cpu backend, got {requested!r}")
    if requested == "bf16" and dtype is not torch.bfloat16:
        raise ValueError(f"gemm 'bf16' needs bfloat16 inputs, got {dtype}")
    return requested


def kept_shapes(num_rows: int, num_classes: int, gemm: str, input_dtype: torch.dtype):
    """((shape, dtype) of the kept tiles, (shape, dtype) of their shifts)."""
    padded = (num_rows + LANES - 1) // LANES * LANES
    dtype = torch.bfloat16 if gemm == "bf16" else torch.float32
    num_tiles = (num_classes + TILE - 1) // TILE
    return ((num_classes, padded), dtype), ((num_tiles, padded), torch.float32)


def forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, gemm: str, want_dhidden: bool, keep_tiles: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(nll, statistics, expected, kept, kept_shift); see `op._forward`."""
    return torch.ops.vrpo.linear_cross_entropy_forward(
        hidden, weight, targets, gemm, want_dhidden, keep_tiles
    )


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N,) fp32 logit of each row's target, the same bits as in `forward`."""
    return torch.ops.vrpo.linear_cross_entropy_target_logits(hidden, weight, targets)


def dhidden(dnll: Tensor, expected: Tensor, statistics: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N, D) gradient of hidden from what the forward pass left; see `op._dhidden`."""
    return torch.ops.vrpo.linear_cross_entropy_dhidden(dnll, expected, statistics, weight, targets)


def dweight(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    kept: Tensor,
    kept_shift: Tensor,
    *,
    gemm: str,
) -> Tensor:
    """(V, D) gradient of weight from kept tiles; see `op._dweight`."""
    return torch.ops.vrpo.linear_cross_entropy_dweight(
        dnll, hidden, weight, targets, statistics, kept, kept_shift, gemm
    )


def sweep(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    *,
    gemm: str,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """Both gradients in one sweep over the vocabulary, from known statistics; see `op._sweep`."""
    return torch.ops.vrpo.linear_cross_entropy_sweep(
        dnll, hidden, weight, targets, statistics, gemm, want_dhidden, want_dweight
    )
