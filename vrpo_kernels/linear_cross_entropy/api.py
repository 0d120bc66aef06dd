"""The public functions of `linear_cross_entropy`: checks, the choice of the backend, one call of an op."""

import torch
from torch import Tensor

from vrpo_kernels import checks
from vrpo_kernels.linear_cross_entropy import op, reference
from vrpo_kernels.linear_cross_entropy.metrics import RowMetrics, row_metrics
from vrpo_kernels.linear_cross_entropy.plan import KEPT_TILE_BYTES, make_plan


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    return_metrics: bool = False,
    backend: str = "auto",
    gemm: str = "auto",
    kept_tile_bytes: int = KEPT_TILE_BYTES,
) -> Tensor | tuple[Tensor, RowMetrics]:
    """Negative log-likelihood of one target per row under a linear head.

        nll_n = logsumexp_v z_nv - z_n,target_n
        z_nv  = softcap * tanh(u_nv / softcap)  (softcap None: z = u)
        u_nv  = scale * (hidden_n . weight_v + bias_v)

    Exact for any outer loss: backward takes an arbitrary, signed gradient per row. The gradient of `hidden`
    is linear in the row's upstream gradient, so it is formed in the forward pass and scaled in the backward
    pass: 2 matmul units with a frozen head and 3 with a trained one, where recomputation needs 3 and 4
    (`plan_linear_cross_entropy` lists every case and says which one a call takes). A bias, a soft-cap and a
    scale cost no unit.

    Args:
        hidden: (N, D) float32, bfloat16 or float16 (float64: reference only); the rows to score, already
            selected. Under autocast, cast as `torch.nn.functional.linear` would cast it. N = 0 is allowed.
        weight: (V, D), the head, same dtype and device; V >= 1. No DTensor: gather it first.
        targets: (N,) int64 in [0, V).
        bias: (V,), same dtype and device as weight, or None. -inf takes a class out if there is no soft-cap;
            below one its logit is -softcap.
        softcap: bound on the logits' size, > 0 (Gemma's `final_logit_softcapping`), or None.
        scale: factor of the logits before the soft-cap, > 0: 1 / temperature, or a model's logit scale. (A
            temperature T comes after a soft-cap c: pass scale = 1 / T, softcap = c / T.)
        return_metrics: also return entropy, log-sum-exp and top-1 hit of every row, from the same pass.
        backend: "auto", "triton", "cpu" or "reference" (see `vrpo_kernels.choose`).
        gemm: matrix multiplication inside the backend. "auto" depends on dtype and machine model only. Other
            names (`cpu.GEMMS`) change the last bits, so a run must keep one choice on all its processes.
        kept_tile_bytes: budget in bytes for the N x V tiles that a trained head keeps from forward to
            backward. Beyond it the tiles are computed again (one more unit, no memory).
    Returns:
        nll (N,) float32 (float64 for float64), nats, >= 0, differentiable in hidden, weight and bias. With
        return_metrics a pair (nll, RowMetrics), the second part not differentiable.
    Numerics:
        Logits, sums and the result in fp32 also for 16-bit inputs; softplus of the log-odds, so that rows
        with p close to 1 keep their relative accuracy. nll is bitwise the same whether or not gradients or
        metrics are wanted, and from run to run. Gradients are summed in fp32 and rounded once. Where the
        matmuls take 16-bit factors (Triton; gemm "bf16" on CPUs), probabilities enter them rounded to the
        input dtype. No atomics: every output has one owner.
    Differentiation:
        Once, in reverse mode, `torch.func` (grad, vjp, jacrev, vmap) included; backend "reference" as often
        as wanted and in forward mode. What a backend cannot differentiate raises a RuntimeError.
    Errors:
        ValueError naming the argument and both shapes, for a target out of range, or listing every reason
        why a requested backend cannot run. On a GPU, where looking at targets would mean waiting for it
        (`vrpo_kernels.set_debug(True)` does), a row with a target out of range has nll NaN, and so have the
        gradients it enters; nothing out of bounds is read or written.
    Source: per-term log-probability of the l-form ELBO, arXiv 2505.19223, Eq. (14)-(15). Soft-cap: Gemma 2,
        arXiv 2408.00118, section 2.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.require_head(hidden, weight, targets, bias)
    settings = checks.logit_settings(softcap, scale)
    plan = make_plan(hidden, weight, bias, backend=backend, gemm=gemm, kept_tile_bytes=kept_tile_bytes)
    if plan.backend == "reference":
        formula = reference.with_metrics if return_metrics else reference.linear_cross_entropy
        result = reference.exactly(formula, hidden, weight, targets, bias, *settings)
        return (result[0], RowMetrics(*(part.detach() for part in result[1:]))) if return_metrics else result
    nll, statistics, *_, metrics = op.forward(
        hidden,
        weight,
        bias,
        targets,
        *settings,
        plan.backend,
        plan.gemm,
        plan.want_dhidden,
        plan.keep_tiles,
        return_metrics,
        False,
    )
    return (nll, row_metrics(statistics, metrics, settings[0])) if return_metrics else nll


@torch.no_grad()
def linear_cross_entropy_statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
    gemm: str = "auto",
) -> tuple[Tensor, Tensor]:
    """First pass of a replay: nll without gradients, and what the second pass needs to know. 1 unit.

    Args, Errors: as `linear_cross_entropy`.
    Returns:
        nll (N,), with the same bits as `linear_cross_entropy`, and statistics (3, N), both float32 (float64
        for float64): the target's logit before the soft-cap, a shift m, and s = sum over the other classes of
        exp(logit - m). 12 bytes per row.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.require_head(hidden, weight, targets, bias)
    settings = checks.logit_settings(softcap, scale)
    plan = make_plan(hidden, weight, None, backend=backend, gemm=gemm)
    if plan.backend == "reference":
        return reference.exactly(reference.statistics, hidden, weight, targets, bias, *settings)
    nll, statistics, *_ = op.forward(
        hidden, weight, bias, targets, *settings, plan.backend, plan.gemm, False, False, False, False
    )
    return nll, statistics


def linear_cross_entropy_replay(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    nll: Tensor,
    statistics: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
    gemm: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Second pass of a replay: the nll known from `linear_cross_entropy_statistics`, now with gradients.

    Forward costs no matmul; backward is one sweep over the vocabulary, 3 units (2 with a frozen head), with
    tile-sized workspace and nothing of size N x V or N x D saved. Gradients are those of
    `linear_cross_entropy`.

    Args:
        hidden, weight, targets, bias, softcap, scale: as in the first pass, bit for bit (same batching,
            deterministic body, no dropout).
        nll, statistics: what the first pass returned.
        backend, gemm: as in the first pass.
    Returns:
        nll (N,), the known values, differentiable in hidden, weight and bias; and drift, a 0-dim float32
        tensor: the largest difference between the target logits (before the soft-cap) of the two passes. It
        is 0 if nothing changed; anything else means that the gradients belong to other values than the nll.
        Not checked here, because that would stall a GPU.
    Errors: as `linear_cross_entropy`, and ValueError if nll or statistics have the wrong shape.
    Source: the two-pass form of the gradient in arXiv 2505.19223, section 4: row weights are known before
    pass 2.
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.require_head(hidden, weight, targets, bias)
    softcap, scale = checks.logit_settings(softcap, scale)
    num_rows = hidden.shape[0]
    checks.require_same("shape", "nll", tuple(nll.shape), "(N,)", (num_rows,))
    checks.require_same("shape", "statistics", tuple(statistics.shape), "(3, N)", (3, num_rows))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    for name, known in (("nll", nll), ("statistics", statistics)):
        checks.require_plain(name, known)
        checks.require_same("dtype", name, known.dtype, "the first pass's results", wide)
        checks.require_same("device", name, known.device, "hidden", hidden.device)
    statistics = statistics.contiguous()  # the backends read its three rows one after the other
    plan = make_plan(hidden, weight, None, backend=backend, gemm=gemm)
    if plan.backend == "reference":
        head = (hidden, weight, targets, bias)
        fresh = reference.exactly(reference.linear_cross_entropy, *head, softcap, scale)
        target_logit = reference.exactly(reference.target_logits, *head, scale)
        return fresh, op.drift(target_logit.detach(), statistics)
    return op.replay(hidden, weight, bias, targets, nll, statistics, softcap, scale, plan.backend, plan.gemm)


def _autocast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """What autocast does to the arguments of F.linear: float inputs become the autocast dtype, float64
    stays.
    """
    parts = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    for name, tensor in parts.items():
        checks.require_plain(name, tensor)
    device = hidden.device.type
    if (
        device == "meta"
        or not torch.is_autocast_enabled(device)
        or any(part.dtype is torch.float64 or not part.is_floating_point() for part in parts.values())
    ):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
