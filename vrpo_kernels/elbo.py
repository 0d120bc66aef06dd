"""elbo_from_logits and elbo_from_hidden: one call from model outputs to per-sequence ELBOs, in nats.

The drop-in for the loss of a masked-diffusion language model: padded [B, L] or packed [T] input, a boolean
tensor that says what is masked, and weights that say what each masked token counts.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vrpo_kernels import checks, layout
from vrpo_kernels.cross_entropy import cross_entropy
from vrpo_kernels.linear_cross_entropy import linear_cross_entropy
from vrpo_kernels.rows import gather_rows
from vrpo_kernels.segments import segment_sum


class _Terms(NamedTuple):
    """The masked rows, what each of them counts, and where each sequence's rows begin and end."""

    rows: layout.Rows
    weight_N: Tensor
    offsets_S1: Tensor
    factor: Tensor | None


def _find_terms(
    leading: tuple[int, ...],
    tokens: Tensor,
    masked: Tensor,
    row_weights: Tensor,
    cu_seqlens: Tensor | None,
    num_masked: int | None,
    shift: bool,
) -> _Terms:
    """Checks the arguments that the two public functions share and lists the masked rows in order."""
    layout.check_tokens(leading, tokens, "masked", masked)
    if not row_weights.is_floating_point():
        raise ValueError(f"row_weights must be floating, got {row_weights.dtype}")
    checks.require_same("device", "row_weights", row_weights.device, "tokens", tokens.device)
    boundary_S1, factor = layout.find_sequences(leading, tokens, cu_seqlens)
    num_sequences = boundary_S1.shape[0] - 1
    if tuple(row_weights.shape) not in {(num_sequences,), leading}:
        raise ValueError(
            f"row_weights must have one weight per sequence, shape ({num_sequences},), or one per token, "
            f"shape {leading}, got {tuple(row_weights.shape)}"
        )
    rows = layout.find_rows(tokens, "masked", masked, num_masked, boundary_S1, shift)
    if tuple(row_weights.shape) == leading:
        weight_N = row_weights.reshape(-1)[rows.token_N]
    else:
        weight_N = row_weights[torch.searchsorted(boundary_S1[1:], rows.token_N, right=True)]
    # running_T1[i] = masked positions before flattened position i.
    running_T1 = torch.nn.functional.pad(masked.reshape(-1).long().cumsum(0), (1, 0))
    return _Terms(rows, weight_N, running_T1.index_select(0, boundary_S1), factor)


def _weighted_sum(nll_N: Tensor, terms: _Terms) -> Tensor:
    term_N = terms.weight_N.to(nll_N.dtype) * nll_N
    term_N = layout.times(term_N, terms.rows.factor_N)
    return layout.times(-segment_sum(term_N, terms.offsets_S1), terms.factor)


def elbo_from_logits(
    logits: Tensor,
    tokens: Tensor,
    masked: Tensor,
    row_weights: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    num_masked: int | None = None,
    shift: bool = False,
    in_place: bool = False,
    backend: str = "auto",
) -> Tensor:
    """ELBO estimate of every sequence from the logits of one masked copy of it.

        elbo_b = sum over the masked positions i of sequence b of  w_bi * log softmax(logits_bi)[tokens_bi]

    With w = L/l (exactly l of L response tokens masked) or w = 1/t (each masked with probability t) this is
    the unbiased one-sample estimate of the bound on log p(response | prompt): a sum in nats, never divided
    by a length. LLaDA's training loss is `-elbo.sum() / (B * L)` with w = 1 / p_mask.

    Args:
        logits: (B, L, V) padded, or (T, V) packed; float32, bfloat16, float16 (float64: reference).
        tokens: (B, L) or (T,) int64, the clean tokens. Read at masked positions only.
        masked: bool, like tokens: True where the model's input was masked. Prompt and padding are False.
            (Not `input == mask_id`: text may contain the mask token.)
        row_weights: floating, one weight per sequence, (B,) or (S,), or one per token, like tokens. (A pack
            with S = T is read as one weight per token.) Gradients flow to it if it requires them.
        cu_seqlens: (S + 1,) int32 or int64, packed input only: sequence s is tokens cu_seqlens[s] :
            cu_seqlens[s + 1]. From 0 to T, never descending.
        num_masked: number of True in masked, if known. It spares the one synchronisation with a device and
            the one data-dependent shape of this function, so that torch.compile(fullgraph=True) and CUDA
            graphs can take it. It must be right; outside of a compiled function it is checked on the CPU.
        shift: True for a model that predicts token i at position i - 1 (Dream): row i - 1 is read, nothing is
            copied. No sequence may then have its first token masked; nothing predicts it.
        in_place: as in `cross_entropy`: the gradient overwrites the logits.
        backend: "auto", "triton", "cpu" or "reference".
    Returns:
        elbo (B,) or (S,), float32 (float64 for float64), nats, <= 0 for weights >= 0; exactly 0 for a
        sequence without masked positions. Differentiable in logits.
    Numerics: logits are read at masked rows only, sums in fp32 per row and fp64 per sequence, in one order.
    Errors: ValueError naming the argument, what it got and what it needs; a masked token outside of [0, V) is
        told as `targets`, with its row among the masked ones. On CUDA and inside torch.compile, where
        looking at values would mean waiting, NaN instead: of every sequence if cu_seqlens are no boundaries
        or num_masked is wrong, of its sequence for a masked first token under shift and, on CUDA, for a
        token outside of [0, V) (see `set_debug`).
    Source: arXiv 2505.19223, Eq. (12)-(15).
    """
    checks.require_floating("logits", logits)
    leading = tuple(logits.shape[:-1])
    terms = _find_terms(leading, tokens, masked, row_weights, cu_seqlens, num_masked, shift)
    rows = terms.rows
    nll_N = cross_entropy(logits, rows.target_N, rows.row_N, in_place=in_place, backend=backend)
    return _weighted_sum(nll_N, terms)


def elbo_from_hidden(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    masked: Tensor,
    row_weights: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    cu_seqlens: Tensor | None = None,
    num_masked: int | None = None,
    shift: bool = False,
    backend: str = "auto",
) -> Tensor:
    """ELBO estimate of every sequence from the last hidden states: `elbo_from_logits` without the logits.

    The head is applied to masked rows only and no (rows x V) tensor exists, forward or backward.

    Args:
        hidden: (B, L, D) padded, or (T, D) packed, after the final norm; float32, bfloat16 or float16.
        weight: (V, D), the head, same dtype and device.
        bias, softcap, scale: the rest of the head, as in `linear_cross_entropy`: (V,) or None, a bound on the
            logits or None (Gemma), a factor of the logits before that bound.
        tokens, masked, row_weights, cu_seqlens, num_masked, shift, backend: as in
            `elbo_from_logits`.
    Returns:
        elbo (B,) or (S,), float32, nats. Differentiable in hidden, weight and bias.
    Numerics, Errors, Source: as in `linear_cross_entropy` and `elbo_from_logits`.
    """
    checks.require_plain("hidden", hidden)
    leading = tuple(hidden.shape[:-1])
    terms = _find_terms(leading, tokens, masked, row_weights, cu_seqlens, num_masked, shift)
    hidden_ND = gather_rows(hidden.reshape(-1, hidden.shape[-1]), terms.rows.row_N)
    head = {"bias": bias, "softcap": softcap, "scale": scale}
    nll_N = linear_cross_entropy(hidden_ND, weight, terms.rows.target_N, **head, backend=backend)
    return _weighted_sum(nll_N, terms)
