"""The formula of `linear_cross_entropy`, in whatever dtype it is given. Nothing is fused, tiled or shared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vrpo_kernels import checks


def logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, softcap: float = 0.0, scale: float = 1.0
) -> Tensor:
    """z = softcap * tanh(u / softcap) with u = scale * (hidden @ weight^T + bias); softcap 0: z = u.

    Args:
        hidden: (N, D) floating; weight: (V, D) same dtype; bias: (V,) same dtype or None.
    Returns:
        (N, V), float64 for float64 inputs, else float32. hidden @ weight^T + bias is rounded to the input
        dtype, as `F.linear` rounds it; upcast the inputs for an exact result.
    """
    raw = torch.nn.functional.linear(hidden, weight, bias)
    z = raw.to(torch.promote_types(raw.dtype, torch.float32)) * scale
    return softcap * torch.tanh(z / softcap) if softcap else z


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> Tensor:
    """nll_n = logsumexp_v z_nv - z_n,target_n with the logits of `logits`.

    Args:
        targets: (N,) int64 in [0, V); the others as in `logits`.
    Returns:
        nll (N,), nats.
    """
    z = logits(hidden, weight, bias, softcap, scale)
    return z.logsumexp(dim=1) - z.gather(1, targets[:, None])[:, 0]


def with_metrics(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, softcap: float, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(nll, entropy, log-sum-exp, whether no logit is larger than the target's), (N,) each."""
    z = logits(hidden, weight, bias, softcap, scale)
    target_logit = z.gather(1, targets[:, None])[:, 0]
    log_sum_exp = z.logsumexp(dim=1)
    entropy = torch.special.entr(z.softmax(dim=1)).sum(dim=1)
    return log_sum_exp - target_logit, entropy, log_sum_exp, target_logit >= z.amax(dim=1)


def target_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None = None, scale: float = 1.0
) -> Tensor:
    """(N,) logit of each row's target before the soft-cap: scale * (hidden_n . weight_y + bias_y)."""
    raw = (hidden * weight[targets]).sum(dim=1)
    return (raw if bias is None else raw + bias[targets]) * scale


def statistics(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    softcap: float = 0.0,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(nll (N,), (target logit before the soft-cap, shift m, s = sum over v != target of exp(z_v - m)) as
    (3, N)).
    """
    z = logits(hidden, weight, bias, softcap, scale)
    others = z.scatter(1, targets[:, None], float("-inf"))
    shift = others.amax(dim=1).clamp(min=torch.finfo(others.dtype).min)  # V = 1: no other class
    total = (others - shift[:, None]).exp().sum(dim=1)
    return (
        linear_cross_entropy(hidden, weight, targets, bias, softcap, scale),
        torch.stack([target_logits(hidden, weight, targets, bias, scale), shift, total]),
    )


def exactly(
    formula: Callable[..., Any],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    *settings: float,
) -> Any:
    """One of the functions above, for 16-bit inputs in fp32, so that its nll is exact like the backends'.

    Autocast does not enter: the inputs are cast already.

    Errors: ValueError for a target out of range where values are checked, in the words of every backend;
        elsewhere everything of its row is NaN.
    """
    known = checks.known_targets(targets, weight.shape[0])
    if hidden.dtype is not torch.float64:
        hidden, weight = hidden.float(), weight.float()
        bias = None if bias is None else bias.float()
    hidden = hidden * torch.where(known < 0, torch.nan, 1.0).to(hidden.dtype)[:, None]
    with torch.autocast(hidden.device.type, enabled=False):
        return formula(hidden, weight, known.clamp(min=0), bias, *settings)
