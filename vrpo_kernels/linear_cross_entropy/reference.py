"""The formula of `linear_cross_entropy`, in whatever dtype it is given. Nothing is fused, tiled or shared."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """nll_n = logsumexp_v(hidden_n . weight_v) - hidden_n . weight_{targets_n}.

    Args:
        hidden: (N, D) floating; weight: (V, D) same dtype; targets: (N,) int64 in [0, V).
    Returns:
        nll (N,), nats: float64 for float64 inputs, else float32. The logits are rounded to the input dtype,
        as `F.linear` rounds them; upcast the inputs for an exact result.
    """
    logits = hidden @ weight.T
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.logsumexp(dim=1) - logits.gather(1, targets[:, None])[:, 0]


def target_logits(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N,) logit of each row's target, hidden_n . weight_{targets_n}."""
    return (hidden * weight[targets]).sum(dim=1)


def statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """(nll (N,), (target logit, shift m, s = sum over v != target of exp(z_v - m)) as (3, N))."""
    others = (hidden @ weight.T).scatter(1, targets[:, None], float("-inf"))
    shift = others.amax(dim=1).clamp(min=torch.finfo(others.dtype).min)  # V = 1: no other class
    total = (others - shift[:, None]).exp().sum(dim=1)
    return (
        linear_cross_entropy(hidden, weight, targets),
        torch.stack([target_logits(hidden, weight, targets), shift, total]),
    )


def exactly(formula: Callable[..., Any], hidden: Tensor, weight: Tensor, targets: Tensor) -> Any:
    """One of the functions above, for 16-bit inputs in fp32, so that its nll is exact like the backends'.

    Autocast does not enter: the inputs are cast already.

    Errors: ValueError for a target out of range on the CPU, in the words of the C++ backend.
    """
    if hidden.dtype is not torch.float64:
        hidden, weight = hidden.float(), weight.float()
    with torch.autocast(hidden.device.type, enabled=False):
        try:
            return formula(hidden, weight, targets)
        except RuntimeError as error:
            _explain(error, targets, len(weight))
            raise


def _explain(error: RuntimeError, targets: Tensor, num_classes: int) -> None:
    """Raise the ValueError behind it, if there is one.

    Asked only after the fact: looking at the targets first would break torch.compile and torch.func.
    """
    if targets.device.type != "cpu":
        return
    wrong = ((targets < 0) | (targets >= num_classes)).nonzero().flatten().tolist()
    if wrong:
        raise ValueError(
            f"targets must lie in [0, {num_classes}), got {int(targets[wrong[0]])} in row {wrong[0]}"
        ) from error
