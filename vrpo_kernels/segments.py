"""segment_sum: per-segment sums of sorted per-row scalars, in one fixed order."""

import torch
from torch import Tensor


@torch.library.custom_op("vrpo_kernels::segment_sum", mutates_args=())
def _segment_sum(value_N: Tensor, offsets_S1: Tensor) -> Tensor:
    # unsafe: the safe form reads the offsets back to the host to check them.
    total_S = torch.segment_reduce(value_N.double(), "sum", offsets=offsets_S1, unsafe=True, initial=0.0)
    return total_S.to(value_N.dtype)


@_segment_sum.register_fake
def _(value_N: Tensor, offsets_S1: Tensor) -> Tensor:
    return value_N.new_empty(offsets_S1.shape[0] - 1)


def _setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    value_N, offsets_S1 = inputs
    ctx.save_for_backward(offsets_S1)
    ctx.num_rows = value_N.shape[0]


def _backward(ctx: torch.autograd.function.FunctionCtx, dtotal_S: Tensor) -> tuple[Tensor, None]:
    (offsets_S1,) = ctx.saved_tensors
    rows = torch.arange(ctx.num_rows, device=dtotal_S.device)
    segment_N = torch.searchsorted(offsets_S1[1:], rows, right=True)
    return dtotal_S.index_select(0, segment_N), None


torch.library.register_autograd("vrpo_kernels::segment_sum", _backward, setup_context=_setup_context)


def segment_sum(value_N: Tensor, offsets_S1: Tensor) -> Tensor:
    """Sum of each segment's rows.

        total_s = sum of value_N[offsets_S1[s] : offsets_S1[s + 1]]

    Args:
        value_N: (N,) fp32 or fp64, rows of a segment contiguous.
        offsets_S1: (S + 1,) int64, non-decreasing, offsets_S1[0] = 0, offsets_S1[S] = N. The
            values are the caller's promise; checking them would synchronise with the device.
    Returns:
        (S,) of value_N's dtype; an empty segment gives exactly 0. Differentiable in value_N.
    Numerics: each segment is accumulated in fp64 in row order on its own and rounded once, so a
        total depends on its own rows only: bitwise equal from run to run and in any batch.
    Errors: ValueError naming the offending shape or dtype.
    """
    if value_N.dim() != 1 or value_N.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"value_N must be a 1-D fp32 or fp64 tensor, got shape {tuple(value_N.shape)}, {value_N.dtype}"
        )
    if offsets_S1.dim() != 1 or offsets_S1.dtype != torch.int64 or offsets_S1.shape[0] < 1:
        raise ValueError(
            "offsets_S1 must be a 1-D int64 tensor of at least one element, got shape "
            f"{tuple(offsets_S1.shape)}, {offsets_S1.dtype}"
        )
    if offsets_S1.device != value_N.device:
        raise ValueError(f"offsets_S1 is on {offsets_S1.device}, value_N on {value_N.device}")
    return _segment_sum(value_N, offsets_S1)
