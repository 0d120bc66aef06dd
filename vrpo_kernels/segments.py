"""segment_sum: per-segment sums of sorted per-row scalars, in one fixed order; and offsets made sound."""

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks


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
    return dtotal_S.index_select(0, _segment_of_row(offsets_S1, ctx.num_rows)), None


def _segment_of_row(offsets_S1: Tensor, num_rows: int) -> Tensor:
    rows = torch.arange(num_rows, device=offsets_S1.device)
    return torch.searchsorted(offsets_S1[1:].contiguous(), rows, right=True)


def _by_formula(value_N: Tensor, offsets_S1: Tensor) -> Tensor:
    """The same sums from ops that every torch.func transform knows."""
    total_S = value_N.new_zeros(offsets_S1.shape[0] - 1, dtype=torch.float64)
    segment_N = _segment_of_row(offsets_S1, value_N.shape[0])
    return total_S.index_add(0, segment_N, value_N.double()).to(value_N.dtype)


torch.library.register_autograd("vrpo_kernels::segment_sum", _backward, setup_context=_setup_context)


def sound_offsets(name: str, offsets_S1: Tensor, end: int) -> tuple[Tensor, Tensor | None]:
    """Offsets that surely cut [0, end) into segments, and what every result of theirs is to be multiplied by.

    Where values are checked: the offsets themselves, and None. Elsewhere looking at them would mean waiting
    for the device: a 0-dim factor says whether they start at 0, never descend and stop at `end`. If so it
    is 1; if not it is NaN, and the offsets are others that are safe to read by.

    Args:
        name: of the argument, for messages.
        offsets_S1: (S + 1,) int32 or int64.
        end: what the last offset has to be.
    Errors: ValueError for bad offsets where values are checked, and anywhere if there is no segment to hold
        `end` > 0 rows.
    """
    if offsets_S1.shape[0] == 0 or (offsets_S1.shape[0] == 1 and end):
        raise ValueError(
            f"{name} must have one element more than there are segments, from 0 to {end}, got "
            f"{offsets_S1.shape[0]} elements"
        )
    is_bad = (offsets_S1[0] != 0) | (offsets_S1[-1] != end) | (offsets_S1[1:] < offsets_S1[:-1]).any()
    if checks.values_are_checked(offsets_S1.device):
        if bool(is_bad):
            raise ValueError(
                f"{name} must start at 0, never descend and end at {end}, got {_shortened(offsets_S1)}"
            )
        return offsets_S1, None
    is_last = torch.arange(offsets_S1.shape[0], device=offsets_S1.device) == offsets_S1.shape[0] - 1
    return torch.where(is_bad, is_last * end, offsets_S1), torch.where(is_bad, torch.nan, 1.0)


def _shortened(offsets_S1: Tensor) -> str:
    """The offsets around the first fault, as a list."""
    values = offsets_S1.tolist()
    falls = [i for i in range(1, len(values)) if values[i] < values[i - 1]]
    if len(values) <= 12:
        return str(values)
    if values[0] == 0 and falls:
        return f"{values[falls[0] - 1]}, {values[falls[0]]} at {falls[0] - 1}, {falls[0]}"
    return f"{values[0]} ... {values[-1]}"


def segment_sum(value_N: Tensor, offsets_S1: Tensor) -> Tensor:
    """Sum of each segment's rows.

        total_s = sum of value_N[offsets_S1[s] : offsets_S1[s + 1]]

    Args:
        value_N: (N,) fp32 or fp64, rows of a segment contiguous.
        offsets_S1: (S + 1,) int64, non-decreasing, offsets_S1[0] = 0, offsets_S1[S] = N.
    Returns:
        (S,) of value_N's dtype; an empty segment gives exactly 0. Differentiable in value_N.
    Numerics: each segment is accumulated in fp64 in row order on its own and rounded once, so a
        total depends on its own rows only: bitwise equal from run to run and in any batch.
    Differentiation: as often as wanted, in every mode and under every `torch.func` transform.
    Errors: ValueError naming the offending shape or dtype; for offsets that do not cut [0, N) into segments,
        ValueError on the CPU and NaN in every total on CUDA and inside torch.compile, where looking would
        mean waiting.
    """
    for name, tensor in (("value_N", value_N), ("offsets_S1", offsets_S1)):
        checks.require_plain(name, tensor)
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
    offsets_S1, factor = sound_offsets("offsets_S1", offsets_S1, value_N.shape[0])
    sums = _by_formula if autograd.is_transformed() else _segment_sum
    total_S = sums(value_N, offsets_S1)
    return total_S if factor is None else total_S * factor
