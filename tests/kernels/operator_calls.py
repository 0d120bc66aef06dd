"""Every custom operator of linear_cross_entropy with arguments, for torch.library.opcheck. No tests here."""

from collections.abc import Callable, Iterator

from torch import Tensor

from vrpo_kernels.linear_cross_entropy import op


def operator_calls(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dnll: Tensor, gemm: str
) -> Iterator[tuple[Callable, tuple]]:
    """(operator, arguments) of all that the op, its replay and its shards dispatch to in the Triton backend.

    With a bias also a soft-cap, a scale and metrics: a whole head.
    """
    whole = bias is not None
    leaves = tuple(part if part is None else part.clone().requires_grad_() for part in (hidden, weight, bias))
    head, settings = (4.0, 0.7) if whole else (0.0, 1.0), ("triton", gemm)
    given = (targets, *head, *settings)
    out = op._forward(hidden, weight, bias, *given, True, True, whole)
    nll, statistics, expected, kept, shift, _ = out
    known = (targets, statistics)
    yield op._forward, (*leaves, *given, True, True, whole)
    yield op._forward, (*leaves, *given, False, False, False)
    yield op._dhidden, (dnll, expected, statistics, weight, targets, *head, "triton")
    yield op._dweight, (dnll, hidden, weight, *known, kept, shift, *head, *settings, True, whole)
    yield op._sweep, (dnll, hidden, weight, bias, *known, *head, *settings, True, True, whole)
    yield op._replay, (*leaves, targets, nll, statistics, *head, *settings)
    yield op._rebase_kept, (kept, *known, statistics, len(weight), head[0], "triton")
