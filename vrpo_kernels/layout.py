"""Which rows of a model's output an op reads: padded [B, L] or packed [T] tokens, predicted in place or one
position earlier. Shared by the ELBO ops and token_logps; knows indices, not losses.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vrpo_kernels import checks
from vrpo_kernels.segments import sound_offsets


class Sequences(NamedTuple):
    """Where the sequences of the flattened tokens begin and end.

    factor: what every result is to be multiplied by: None for 1, or a 0-dim tensor, 1 or NaN.
    """

    boundary_S1: Tensor
    factor: Tensor | None


class Rows(NamedTuple):
    """The wanted positions, ascending, and what predicts them.

    token_N: index into the flattened tokens.
    row_N: index into the flattened hidden states or logits; no two are equal.
    target_N: the token at each position.
    factor_N: what each row's result is to be multiplied by: None for 1, or 1 and NaN, (N,) or 0-dim.
    """

    token_N: Tensor
    row_N: Tensor
    target_N: Tensor
    factor_N: Tensor | None


def check_tokens(leading: tuple[int, ...], tokens: Tensor, name: str, wanted: Tensor) -> None:
    """Shapes, dtypes and devices of the tokens and of the boolean tensor `name` that selects some of them."""
    for argument, tensor in (("tokens", tokens), (name, wanted)):
        checks.require_same("shape", argument, tuple(tensor.shape), "the leading axes", leading)
    checks.require_int64("tokens", tokens)
    if wanted.dtype is not torch.bool:
        raise ValueError(
            f"{name} must be a boolean tensor (True at some positions, not token ids), got {wanted.dtype}"
        )
    checks.require_same("device", name, wanted.device, "tokens", tokens.device)


def find_sequences(leading: tuple[int, ...], tokens: Tensor, cu_seqlens: Tensor | None) -> Sequences:
    """The sequences of padded tokens, leading (B, L), or of packed ones, leading (T,) and cu_seqlens."""
    if cu_seqlens is None:
        if len(leading) != 2:
            raise ValueError(f"without cu_seqlens the input must be padded, [B, L, ...], got {leading}")
        num_sequences, length = leading
        return Sequences(torch.arange(num_sequences + 1, device=tokens.device) * length, None)
    if len(leading) != 1:
        raise ValueError(f"with cu_seqlens the input must be packed, [T, ...], got {leading}")
    checks.require_dim("cu_seqlens", cu_seqlens, "S + 1")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
    checks.require_same("device", "cu_seqlens", cu_seqlens.device, "tokens", tokens.device)
    return Sequences(*sound_offsets("cu_seqlens", cu_seqlens, leading[0]))


def find_rows(
    tokens: Tensor,
    name: str,
    wanted: Tensor,
    num_wanted: int | None,
    boundary_S1: Tensor | None,
    shift: bool,
) -> Rows:
    """The rows that predict the wanted positions.

    Args:
        tokens, wanted: checked by `check_tokens`. name: of wanted, for messages; its count is `num_<name>`.
        num_wanted: how many are wanted, or None to ask the device.
        boundary_S1: of `find_sequences`; needed with shift only.
        shift: the model predicts position i at i - 1.
    Errors: ValueError for a wrong count and, with shift, for a wanted first token, where values are checked;
        elsewhere factor_N is NaN everywhere or at such a token.
    """
    wanted_T = wanted.reshape(-1)
    token_N, factor = _true_positions(wanted_T, name, num_wanted)
    target_N = tokens.reshape(-1)[token_N]
    if not shift:
        return Rows(token_N, token_N, target_N, factor)
    segment_N = torch.searchsorted(boundary_S1[1:], token_N, right=True)
    is_first_N = boundary_S1[segment_N] == token_N
    factor_N = None
    if not checks.values_are_checked(wanted.device):
        factor_N = torch.where(is_first_N, torch.nan, 1.0 if factor is None else factor)
    elif bool(is_first_N.any()):
        raise ValueError(
            f"{name} must be False at the first token of a sequence if shift is True, because no position "
            f"before it predicts it, got True in sequence {int(segment_N[is_first_N][0])}"
        )
    # Before the very first token stands the very last row, which predicts nothing: rows stay unique.
    row_N = (token_N - 1) % max(wanted_T.shape[0], 1)
    return Rows(token_N, row_N, target_N, factor_N)


def _true_positions(wanted_T: Tensor, name: str, num_wanted: int | None) -> tuple[Tensor, Tensor | None]:
    """Indices of the True elements, ascending; and a factor, NaN if there are not num_wanted of them, where
    nobody may look.
    """
    if num_wanted is None:
        if not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(wanted_T):
            raise ValueError(f"under torch.func.vmap over {name}, num_{name} must say how many are True")
        return wanted_T.nonzero()[:, 0], None
    if isinstance(num_wanted, (bool, float)):
        raise ValueError(f"num_{name} must be an integer, got {num_wanted!r}")
    factor = None
    if checks.values_are_checked(wanted_T.device):
        checks.require_same("value", f"num_{name}", num_wanted, f"{name}.sum()", int(wanted_T.sum()))
    else:
        factor = torch.where(wanted_T.sum() == num_wanted, 1.0, torch.nan)
    return torch.nonzero_static(wanted_T, size=num_wanted, fill_value=0)[:, 0], factor


def times(value: Tensor, factor: Tensor | None) -> Tensor:
    """value * factor, where None stands for 1."""
    return value if factor is None else value * factor
