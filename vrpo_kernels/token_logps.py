"""token_logps: log-probabilities of chosen tokens, as a dense tensor, from hidden states without logits."""

from torch import Tensor

from vrpo_kernels import checks, layout
from vrpo_kernels.linear_cross_entropy import RowMetrics, linear_cross_entropy
from vrpo_kernels.rows import gather_rows


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    wanted: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    shift: bool = False,
    cu_seqlens: Tensor | None = None,
    num_wanted: int | None = None,
    return_metrics: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RowMetrics]:
    """Log-probability of every wanted token, 0 elsewhere: what policy-gradient code keeps per token.

        logp_bi = log softmax(head(hidden_bi))[tokens_bi]   where wanted_bi,  0 elsewhere

    The head meets the wanted rows only and no (rows x V) tensor exists, forward or backward. The result may
    enter any loss: ratios, clipping, signed advantages; each token's gradient is its own.

    Args:
        hidden: (B, L, D) padded, or (T, D) packed, after the final norm; float32, bfloat16 or float16
            (float64: reference).
        weight: (V, D), the head, same dtype and device.
        bias, softcap: the rest of the head, as in `linear_cross_entropy`: (V,) or None; a bound on the logits
            or None (Gemma).
        scale: factor of the logits before the soft-cap. Policy-gradient code divides logits by a sampling
            temperature T: scale = 1 / T, and with a soft-cap c, which comes before T, also softcap = c / T.
        tokens: (B, L) or (T,) int64. Read at wanted positions only.
        wanted: bool, like tokens: whose log-probability is asked for.
        shift: True for a model that predicts token i at position i - 1 (Dream): row i - 1 is read, nothing is
            copied. No first token of a sequence may then be wanted; nothing predicts it.
        cu_seqlens: (S + 1,) int32 or int64, from 0 to T: the sequences of packed input. Needed with shift
            only.
        num_wanted: number of True in wanted, if known. It spares the one synchronisation with a device and
            the one data-dependent shape of this function, so that torch.compile(fullgraph=True) and CUDA
            graphs can take it. It must be right; outside of a compiled function it is checked on the CPU.
        return_metrics: also return entropy, log-sum-exp and top-1 hit, from the same pass.
        backend: "auto", "triton", "cpu" or "reference".
    Returns:
        logp like tokens, float32 (float64 for float64), nats, <= 0; differentiable in hidden, weight, bias.
        With return_metrics a pair (logp, RowMetrics), each field like tokens, 0 or False where not wanted,
        not differentiable.
    Numerics: as in `linear_cross_entropy`; each element is written once, so runs are bitwise equal.
    Errors: ValueError naming the argument, what it got and what it needs; a wanted token outside of [0, V) is
        told as `targets`, with its row among the wanted ones. On CUDA and inside torch.compile, where
        looking at values would mean waiting, NaN instead: of everything if cu_seqlens are no boundaries, of
        every element it reads for a wrong num_wanted, of its own element for a wanted first token under
        shift and, on CUDA, for a token outside of [0, V) (see `set_debug`).
    Source: arXiv 2505.19223, Eq. (14)-(15), one term.
    """
    checks.require_plain("hidden", hidden)
    leading = tuple(hidden.shape[:-1])
    layout.check_tokens(leading, tokens, "wanted", wanted)
    boundary_S1 = factor = None
    if cu_seqlens is not None or len(leading) != 1:
        boundary_S1, factor = layout.find_sequences(leading, tokens, cu_seqlens)
    elif shift:
        raise ValueError("shift=True needs cu_seqlens for packed input: which tokens are the first, got None")
    rows = layout.find_rows(tokens, "wanted", wanted, num_wanted, boundary_S1, shift)
    hidden_ND = gather_rows(hidden.reshape(-1, hidden.shape[-1]), rows.row_N)
    result = linear_cross_entropy(
        hidden_ND,
        weight,
        rows.target_N,
        bias=bias,
        softcap=softcap,
        scale=scale,
        return_metrics=return_metrics,
        backend=backend,
    )
    nll_N, metrics = result if return_metrics else (result, None)

    def dense(value_N: Tensor) -> Tensor:
        """The values at their positions, zeros elsewhere. Positions are unique: copies, no additions."""
        zeros_T = value_N.new_zeros(tokens.numel())
        return zeros_T.index_copy(0, rows.token_N, value_N).view(leading)

    def marked(value_N: Tensor) -> Tensor:
        """The same, with NaN where there was nothing to read by."""
        return layout.times(dense(layout.times(value_N, rows.factor_N)), factor)

    logp = marked(-nll_N)
    if metrics is None:
        return logp
    entropy, log_sum_exp = marked(metrics.entropy), marked(metrics.log_sum_exp)
    return logp, RowMetrics(entropy, log_sum_exp, dense(metrics.top1))
