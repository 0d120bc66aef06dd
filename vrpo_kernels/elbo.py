"""elbo_from_logits and elbo_from_hidden: one call from model outputs to per-sequence ELBOs, in nats.

The drop-in for the loss of a masked-diffusion language model: padded [B, L] or packed [T] input, a boolean
tensor that says what is masked, and weights that say what each masked token counts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vrpo_kernels import checks
from vrpo_kernels.cross_entropy import cross_entropy
from vrpo_kernels.linear_cross_entropy import linear_cross_entropy
from vrpo_kernels.rows import gather_rows
from vrpo_kernels.segments import segment_sum


class _Rows(NamedTuple):
    """The masked rows: index into the flattened tokens, target, ELBO weight; and each sequence's range."""

    row_N: Tensor
    target_N: Tensor
    weight_N: Tensor
    offsets_S1: Tensor


def _masked_rows(masked_T: Tensor, num_masked: int | None) -> Tensor:
    """Indices of the True elements, ascending."""
    if num_masked is None:
        return masked_T.nonzero()[:, 0]
    if masked_T.device.type == "cpu" and not torch.compiler.is_compiling():
        checks.require_same("value", "num_masked", num_masked, "masked.sum()", int(masked_T.sum()))
    return torch.nonzero_static(masked_T, size=num_masked)[:, 0]


def _find_rows(
    leading: tuple[int, ...],
    tokens: Tensor,
    masked: Tensor,
    row_weights: Tensor,
    cu_seqlens: Tensor | None,
    num_masked: int | None,
) -> _Rows:
    """Checks the arguments that the two public functions share and lists the masked rows in order."""
    for name, tensor in (("tokens", tokens), ("masked", masked)):
        checks.require_same("shape", name, tuple(tensor.shape), "the leading axes", leading)
    checks.require_int64("tokens", tokens)
    if masked.dtype is not torch.bool:
        raise ValueError(
            f"masked must be a boolean tensor (where tokens were masked, not token ids), got {masked.dtype}"
        )
    if not row_weights.is_floating_point():
        raise ValueError(f"row_weights must be floating, got {row_weights.dtype}")
    for name, tensor in (("masked", masked), ("row_weights", row_weights)):
        checks.require_same("device", name, tensor.device, "tokens", tokens.device)

    # running_T1[i] = masked positions before flattened position i.
    masked_T = masked.reshape(-1)
    running_T1 = torch.nn.functional.pad(masked_T.long().cumsum(0), (1, 0))
    if cu_seqlens is None:
        if len(leading) != 2:
            raise ValueError(f"without cu_seqlens the input must be padded, [B, L, ...], got {leading}")
        num_sequences = leading[0]
        boundary_S1 = torch.arange(num_sequences + 1, device=masked.device) * leading[1]
    else:
        if len(leading) != 1:
            raise ValueError(f"with cu_seqlens the input must be packed, [T, ...], got {leading}")
        checks.require_dim("cu_seqlens", cu_seqlens, "S + 1")
        checks.require_same("device", "cu_seqlens", cu_seqlens.device, "tokens", tokens.device)
        num_sequences = cu_seqlens.shape[0] - 1
        boundary_S1 = cu_seqlens
    offsets_S1 = running_T1.index_select(0, boundary_S1)

    if tuple(row_weights.shape) not in {(num_sequences,), leading}:
        raise ValueError(
            f"row_weights must have one weight per sequence, shape ({num_sequences},), or one per token, "
            f"shape {leading}, got {tuple(row_weights.shape)}"
        )
    row_N = _masked_rows(masked_T, num_masked)
    if tuple(row_weights.shape) == leading:
        weight_N = row_weights.reshape(-1)[row_N]
    else:
        weight_N = row_weights[torch.searchsorted(boundary_S1[1:], row_N, right=True)]
    return _Rows(row_N, tokens.reshape(-1)[row_N], weight_N, offsets_S1)


def _weighted_sum(nll_N: Tensor, rows: _Rows) -> Tensor:
    return -segment_sum(rows.weight_N.to(nll_N.dtype) * nll_N, rows.offsets_S1)


def elbo_from_logits(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    row_weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    num_masked: int | None = None,
    in_place: bool = False,
    backend: str = "auto",
) -> Tensor:
    """ELBO estimate of every sequence from the logits of one masked copy of it.

        elbo_b = sum over the masked positions i of sequence b of  w_bi * log softmax(logits_bi)[tokens_bi]

    With w = L/l (exactly l of L response tokens masked) or w = 1/t (each masked with probability t) this is
    the unbiased one-sample estimate of the bound on log p(response | prompt): a sum in nats, never divided
    by a length. LLaDA's training loss is `-elbo.sum() / (B * L)` with w = 1 / p_mask.

    Args:
        logits: (B, L, V) padded, or (T, V) packed; float32, bfloat16, float16 (float64: reference). For a
            model that predicts position i at i - 1 (Dream), pass the shifted logits.
        tokens: (B, L) or (T,) int64, the clean tokens. Read at masked positions only.
        masked: bool, like tokens: True where the model's input was masked. Prompt and padding are False.
            (Not `input == mask_id`: text may contain the mask token.)
        row_weights: floating, one weight per sequence, (B,) or (S,), or one per token, like tokens. (A pack
            with S = T is read as one weight per token.) Gradients flow to it if it requires them.
        cu_seqlens: (S + 1,) int, packed input only: sequence s is tokens cu_seqlens[s] : cu_seqlens[s + 1].
        num_masked: number of True in masked, if known. It spares the one synchronisation with a device and
            the one data-dependent shape of this function, so that torch.compile(fullgraph=True) and CUDA
            graphs can take it. It must be right; outside of a compiled function it is checked on the CPU.
        in_place: as in `cross_entropy`: the gradient overwrites the logits.
        backend: "auto", "triton", "cpu" or "reference".
    Returns:
        elbo (B,) or (S,), float32 (float64 for float64), nats, <= 0 for weights >= 0; exactly 0 for a
        sequence without masked positions. Differentiable in logits.
    Numerics: logits are read at masked rows only, sums in fp32 per row and fp64 per sequence, in one order.
    Errors: ValueError naming the argument, what it got and what it needs.
    Source: arXiv 2505.19223, Eq. (12)-(15).
    """
    checks.require_floating("logits", logits)
    leading = tuple(logits.shape[:-1])
    rows = _find_rows(leading, tokens, masked, row_weights, cu_seqlens, num_masked)
    nll_N = cross_entropy(logits, rows.target_N, rows.row_N, in_place=in_place, backend=backend)
    return _weighted_sum(nll_N, rows)


def elbo_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    masked: Tensor,
    row_weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    num_masked: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """ELBO estimate of every sequence from the last hidden states: `elbo_from_logits` without the logits.

    The head is applied to masked rows only and no (rows x V) tensor exists, forward or backward.

    Args:
        hidden: (B, L, D) padded, or (T, D) packed, after the final norm; float32, bfloat16 or float16. For a
            model that predicts position i at i - 1 (Dream), pass the hidden states shifted by one.
        weight: (V, D), the head, same dtype and device (see `linear_cross_entropy`).
        tokens, masked, row_weights, cu_seqlens, num_masked, backend: as in `elbo_from_logits`.
    Returns:
        elbo (B,) or (S,), float32, nats. Differentiable in hidden and weight.
    Numerics, Errors, Source: as in `linear_cross_entropy` and `elbo_from_logits`.
    """
    checks.require_plain("hidden", hidden)
    leading = tuple(hidden.shape[:-1])
    rows = _find_rows(leading, tokens, masked, row_weights, cu_seqlens, num_masked)
    hidden_ND = gather_rows(hidden.reshape(-1, hidden.shape[-1]), rows.row_N)
    nll_N = linear_cross_entropy(hidden_ND, weight, rows.target_N, backend=backend)
    return _weighted_sum(nll_N, rows)
