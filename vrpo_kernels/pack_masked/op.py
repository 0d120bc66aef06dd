"""pack_masked and token_weight_sums: checks, backend choice, registration."""

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.backend import choose
from vrpo_kernels.checks import require_dim, require_int64, require_same


class PackedTokens(NamedTuple):
    """All corrupted copies of a batch, back to back; segments in the order (response, sample).

    Attributes:
        tokens_T: int64, prompt then response of every segment, masked positions replaced.
        position_T: int64, position of each token within its segment, from 0.
        cu_seqlens_S1: int32, tokens of segment s are cu_seqlens_S1[s] : cu_seqlens_S1[s + 1].
        row_N: int64, where the masked tokens lie in tokens_T, ascending.
        target_N: int64, the clean token of each masked row.
    """

    tokens_T: Tensor
    position_T: Tensor
    cu_seqlens_S1: Tensor
    row_N: Tensor
    target_N: Tensor


def _backend(name: str) -> ModuleType:
    if name == "triton":
        from vrpo_kernels.pack_masked import kernel as module
    elif name == "cpu":
        from vrpo_kernels.pack_masked import cpu as module
    else:
        from vrpo_kernels.pack_masked import reference as module
    return module


def _check_rows(position_N: Tensor, offsets_S1: Tensor, response_length_R: Tensor, num_samples: int) -> None:
    if not isinstance(num_samples, int) or num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, an integer, got {num_samples!r}")
    for name, tensor, axis in (
        ("position_N", position_N, "N"),
        ("offsets_S1", offsets_S1, "S + 1"),
        ("response_length_R", response_length_R, "R"),
    ):
        require_dim(name, tensor, axis)
        require_int64(name, tensor)
        require_same("device", name, tensor.device, "position_N", position_N.device)
    num_segments = response_length_R.shape[0] * num_samples
    require_same(
        "size",
        "offsets_S1",
        offsets_S1.shape[0],
        "(responses x num_samples + 1)",
        num_segments + 1,
    )


def _check_row_values(
    position_N: Tensor, offsets_S1: Tensor, response_length_R: Tensor, num_samples: int
) -> None:
    if int(offsets_S1[0]) != 0 or int(offsets_S1[-1]) != position_N.shape[0]:
        raise ValueError(
            f"offsets_S1 must run from 0 to the number of rows, {position_N.shape[0]}, got "
            f"{int(offsets_S1[0])} to {int(offsets_S1[-1])}"
        )
    count_S = offsets_S1.diff()
    if bool((count_S < 0).any()):
        raise ValueError("offsets_S1 must not decrease")
    length_S = response_length_R.repeat_interleave(num_samples)
    length_N = length_S.repeat_interleave(count_S)
    if bool(((position_N < 0) | (position_N >= length_N)).any()):
        raise ValueError("position_N must lie in [0, response length) of its segment")
    ascending = position_N.diff() > 0
    starts = offsets_S1[1:-1]
    starts = starts[(starts > 0) & (starts < position_N.shape[0])]
    ascending[starts - 1] = True
    if not bool(ascending.all()):
        raise ValueError("position_N must be strictly ascending within each segment")


@torch.library.custom_op("vrpo_kernels::pack_masked", mutates_args=())
def _pack_masked(
    tokens_U: Tensor,
    prompt_length_R: Tensor,
    response_length_R: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    num_samples: int,
    mask_token_id: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if checks.values_are_checked(tokens_U.device):
        if bool((prompt_length_R < 0).any()) or bool((response_length_R < 0).any()):
            raise ValueError("prompt_length_R and response_length_R must not be negative")
        num_tokens = int(prompt_length_R.sum() + response_length_R.sum())
        require_same("size", "tokens_U", tokens_U.shape[0], "the sum of all lengths", num_tokens)
        _check_row_values(position_N, offsets_S1, response_length_R, num_samples)
    if num_samples * tokens_U.shape[0] >= 2**31:
        raise ValueError(
            "num_samples x tokens must stay below 2**31 (cu_seqlens_S1 is int32), got "
            f"{num_samples * tokens_U.shape[0]}"
        )
    name = choose("pack_masked", device=tokens_U.device.type, dtype=None, requested=backend)
    return _backend(name).pack_masked(
        tokens_U,
        prompt_length_R,
        response_length_R,
        position_N,
        offsets_S1,
        num_samples,
        mask_token_id,
    )


@_pack_masked.register_fake
def _(
    tokens_U,
    prompt_length_R,
    response_length_R,
    position_N,
    offsets_S1,
    num_samples,
    mask_token_id,
    backend,
):
    num_tokens = num_samples * tokens_U.shape[0]
    return (
        tokens_U.new_empty(num_tokens),
        tokens_U.new_empty(num_tokens),
        offsets_S1.new_empty(offsets_S1.shape[0], dtype=torch.int32),
        tokens_U.new_empty(position_N.shape[0]),
        tokens_U.new_empty(position_N.shape[0]),
    )


def pack_masked(
    tokens_U: Tensor,
    prompt_length_R: Tensor,
    response_length_R: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    *,
    num_samples: int,
    mask_token_id: int,
    backend: str = "auto",
) -> PackedTokens:
    """Corrupt and pack: every (response, sample) becomes prompt + response with its rows masked.

        segment s = response s // K, sample s % K, K = num_samples
        tokens[start_s + i] = mask_token_id if i - P is one of the segment's positions, else clean[i]

    Which tokens are masked is decided by positions alone: the prompt is never masked, and a
    mask_token_id that occurs in the text is a token like any other.

    Args:
        tokens_U: (U,) int64, for each response its prompt tokens, then its response tokens.
        prompt_length_R, response_length_R: (R,) int64, >= 0; their total is U.
        position_N: (N,) int64, masked positions within the response, strictly ascending in each
            segment (from `mask_select`).
        offsets_S1: (R * K + 1,) int64, rows of segment s are offsets_S1[s] : offsets_S1[s + 1].
        num_samples: K, corrupted copies per response.
        mask_token_id: the token written at masked positions.
        backend: "auto", "triton", "cpu" or "reference". All give the same bits.
    Returns:
        PackedTokens with T = K * U tokens. Sizes follow from shapes, so nothing synchronises.
    Errors:
        ValueError naming the argument, what it got and what it needs. Values (not shapes) are
        checked for CPU tensors only, elsewhere after `vrpo_kernels.set_debug(True)`; without it what bad
        values leave unwritten is -1.
    """
    if isinstance(mask_token_id, bool) or not isinstance(mask_token_id, int):
        raise ValueError(f"mask_token_id must be an integer, got {mask_token_id!r}")
    require_dim("tokens_U", tokens_U, "U")
    require_dim("prompt_length_R", prompt_length_R, "R")
    require_int64("tokens_U", tokens_U)
    require_int64("prompt_length_R", prompt_length_R)
    require_same(
        "size R",
        "prompt_length_R",
        prompt_length_R.shape[0],
        "response_length_R",
        response_length_R.shape[0],
    )
    require_same("device", "tokens_U", tokens_U.device, "position_N", position_N.device)
    require_same("device", "prompt_length_R", prompt_length_R.device, "tokens_U", tokens_U.device)
    _check_rows(position_N, offsets_S1, response_length_R, num_samples)
    return PackedTokens(
        *_pack_masked(
            tokens_U,
            prompt_length_R,
            response_length_R,
            position_N,
            offsets_S1,
            num_samples,
            mask_token_id,
            backend,
        )
    )


@torch.library.custom_op("vrpo_kernels::token_weight_sums", mutates_args=())
def _token_weight_sums(
    weight_N: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    response_length_R: Tensor,
    num_samples: int,
    num_tokens: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if checks.values_are_checked(weight_N.device):
        require_same(
            "size", "num_tokens", num_tokens, "response_length_R's sum", int(response_length_R.sum())
        )
        _check_row_values(position_N, offsets_S1, response_length_R, num_samples)
    name = choose("token_weight_sums", device=weight_N.device.type, dtype=None, requested=backend)
    return _backend(name).token_weight_sums(
        weight_N, position_N, offsets_S1, response_length_R, num_samples, num_tokens
    )


@_token_weight_sums.register_fake
def _(weight_N, position_N, offsets_S1, response_length_R, num_samples, num_tokens, backend):
    return weight_N.new_empty(num_tokens), torch.empty_like(weight_N)


def token_weight_sums(
    weight_N: Tensor,
    position_N: Tensor,
    offsets_S1: Tensor,
    response_length_R: Tensor,
    *,
    num_samples: int,
    num_tokens: int,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Total weight that a response's samples put on each of its tokens.

        W[r, i] = sum over the samples k of response r that mask token i of weight[r, k, i]

    It is what token-ratio weights and leave-one-out control variates need; it depends on masks only.

    Args:
        weight_N: (N,) fp32, one weight per masked row, rows in the order (response, sample,
            position).
        position_N, offsets_S1, num_samples: as in `pack_masked`.
        response_length_R: (R,) int64.
        num_tokens: M, the sum of response_length_R (given, so that nothing synchronises).
        backend: "auto", "triton", "cpu" or "reference".
    Returns:
        sum_M: (M,) fp32, W of every response token, responses back to back; 0 where never masked.
        sum_N: (N,) fp32, the W of each masked row's token.
    Numerics: accumulated in fp64 in sample order and rounded once: the same bits on each backend and
        from run to run (the fp64 sum is exact while weights stay within a factor of 2**20 or so).
        Not differentiable.
    Errors: ValueError naming the argument, what it got and what it needs, and for a weight_N that requires a
        gradient; values on the CPU, elsewhere after `vrpo_kernels.set_debug(True)`, and NaN without it.
    """
    require_dim("weight_N", weight_N, "N")
    autograd.require_constant("token_weight_sums", "weight_N", weight_N)
    if weight_N.dtype != torch.float32:
        raise ValueError(f"weight_N must be float32, got {weight_N.dtype}")
    require_same("size N", "weight_N", weight_N.shape[0], "position_N", position_N.shape[0])
    require_same("device", "weight_N", weight_N.device, "position_N", position_N.device)
    _check_rows(position_N, offsets_S1, response_length_R, num_samples)
    return _token_weight_sums(
        weight_N,
        position_N,
        offsets_S1,
        response_length_R,
        num_samples,
        num_tokens,
        backend,
    )
