"""gather_rows: picks the masked rows of a pack; its backward writes each row at most once."""

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks


@torch.library.custom_op("vrpo_kernels::gather_rows", mutates_args=())
def _gather_rows(hidden_TD: Tensor, row_N: Tensor) -> Tensor:
    if checks.values_are_checked(row_N.device):
        checks.require_rows("row_N", row_N, hidden_TD.shape[0])
    return hidden_TD.index_select(0, row_N)


@_gather_rows.register_fake
def _(hidden_TD, row_N):
    return hidden_TD.new_empty(row_N.shape[0], hidden_TD.shape[1])


def _setup_context(ctx, inputs, output):
    hidden_TD, row_N = inputs
    ctx.save_for_backward(row_N)
    ctx.num_rows = hidden_TD.shape[0]


def _backward(ctx, dhidden_ND):
    (row_N,) = ctx.saved_tensors
    # Rows are unique, so each row of dhidden has one owner: a copy, no atomics, no additions.
    dhidden_TD = dhidden_ND.new_zeros(ctx.num_rows, dhidden_ND.shape[1])
    return dhidden_TD.index_copy_(0, row_N, dhidden_ND), None


_gather_rows.register_autograd(_backward, setup_context=_setup_context)


def gather_rows(hidden_TD: Tensor, row_N: Tensor) -> Tensor:
    """Selected rows, `hidden_TD[row_N]`, for row indices that are all different.

    Args:
        hidden_TD: (T, D), any floating dtype.
        row_N: (N,) int64, unique, in [0, T). On a GPU uniqueness is the caller's promise (masked rows of a
            pack are sorted and unique by construction); checking it would synchronise.
    Returns:
        (N, D), same dtype. N = 0 gives an empty tensor that still passes (zero) gradients.
    Numerics: forward and backward copy, so both are exact and deterministic.
    Differentiation: as often as wanted, in every mode and under every `torch.func` transform.
    Errors: ValueError naming the offending shape or dtype, and, where values are checked (see `set_debug`), a
        row that is out of range or given twice. Elsewhere a row out of range is torch's device-side assert.
    """
    for name, tensor in (("hidden_TD", hidden_TD), ("row_N", row_N)):
        checks.require_plain(name, tensor)
    if hidden_TD.dim() != 2:
        raise ValueError(f"hidden_TD must be (T, D), got shape {tuple(hidden_TD.shape)}")
    if row_N.dim() != 1 or row_N.dtype != torch.int64:
        raise ValueError(f"row_N must be a 1-D int64 tensor, got shape {tuple(row_N.shape)}, {row_N.dtype}")
    if row_N.device != hidden_TD.device:
        raise ValueError(f"row_N is on {row_N.device}, hidden_TD on {hidden_TD.device}")
    if autograd.is_transformed():
        return hidden_TD.index_select(0, row_N)
    return _gather_rows(hidden_TD, row_N)
