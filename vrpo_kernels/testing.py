"""The tolerance policy, in one place: what "correct" means for every kernel test and benchmark gate.

Three computations are compared: **truth** = `reference.py` in float64 on upcast inputs, **baseline** =
`reference.py` in the input dtype (or in float32, for outputs declared float32), **candidate** = the backend.
Errors are measured against what plain PyTorch achieves, line by line, because absolute floors go blind when
gradients carry 1/N or ELBO weights, and global maxima go blind when rows have unequal weights. Not imported
by any op.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vrpo_kernels.linear_cross_entropy import reference

ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}
"""u: largest relative error of rounding to the dtype (bfloat16 and float16: of one rounding up or down)."""
FP32_FACTOR, FP32_FLOOR = 2.0, 16.0
"""Outputs declared fp32: error <= FP32_FACTOR * baseline error + FP32_FLOOR * u32 * max|truth|."""
TENSOR_CORE_SIZE = 4096
"""D beyond which the floor of 16-bit inputs grows with D: max(1, D / 4096) * FP32_FLOOR.

Tensor cores add into the fp32 accumulator with truncation, once per k = 16 step, so every logit is too small
by an amount that grows with D. Measured on an H100 (bf16, V = 32768, logits of standard deviation 2), the
largest nll error was 2.1e-6 nats at D = 256, 5.2e-6 at 1024, 1.8e-5 at 4096 and 4.1e-5 at 8192, the mean
error -8.3e-7, -3.7e-6, -1.6e-5 and -3.2e-5; without this factor the last is 1.31 times what is allowed.
cuBLAS's own logits with fp32 output and an fp64 softmax have the same mean error.
"""
LINE_FACTOR, LINE_FLOOR = 2.0, 1.0
"""Each row and column: relative error <= LINE_FACTOR * the worst of the baseline + LINE_FLOOR * u."""
LINE_MINIMUM = 0.01
"""A line is measured against its own norm, but no less than this share of the largest line's."""
WHOLE_FACTOR, WHOLE_FLOOR = 1.25, 0.25
"""The whole matrix: relative error <= WHOLE_FACTOR * baseline + WHOLE_FLOOR * u."""


def fp32_floor(dtype: torch.dtype, size: int) -> float:
    """Floor for results of dot products over `size` values of this dtype, in units of u32 max|truth|."""
    grows = dtype in (torch.bfloat16, torch.float16)
    return FP32_FLOOR * max(1.0, size / TENSOR_CORE_SIZE) if grows else FP32_FLOOR


def fp32_error_ratio(
    candidate: Tensor, truth: Tensor, baseline32: Tensor, floor: float = FP32_FLOOR
) -> float:
    """Error of an output declared float32 (nll, elbo), as a share of what the policy allows; > 1 fails.

    Args:
        candidate: any shape, float32.
        truth: same shape, float64.
        baseline32: same shape, the reference on inputs upcast to float32.
        floor: `fp32_floor` of the inputs.
    Returns:
        max|candidate - truth| / (2 max|baseline32 - truth| + floor u32 max|truth|); inf where one side is not
        finite and the other differs from it, or is NaN.
    """
    if candidate.dtype is not torch.float32:
        raise AssertionError(f"declared float32, got {candidate.dtype}")
    finite = _same_infinities(candidate, truth)
    if finite is None:
        return float("inf")
    if not finite.any():
        return 0.0
    error = (candidate.double() - truth)[finite].abs().max()
    allowed = FP32_FACTOR * (baseline32.double() - truth)[finite].abs().max()
    allowed += floor * ROUNDOFF[torch.float32] * truth[finite].abs().max()
    return _ratio(error.item(), allowed.item())


def matrix_error_ratio(candidate: Tensor, truth: Tensor, baseline: Tensor) -> float:
    """Worst error of a matrix in the input dtype (a gradient), as a share of what the policy allows; > 1
    fails.

    Args:
        candidate: (rows, columns) in the input dtype.
        truth: same shape, float64.
        baseline: same shape and dtype as candidate, from the reference in the input dtype.
    Returns:
        The largest of three ratios: worst row, worst column, whole matrix. inf if anything is not finite.
    """
    if candidate.dtype is not baseline.dtype:
        raise AssertionError(f"declared {baseline.dtype}, got {candidate.dtype}")
    if candidate.shape != truth.shape:
        raise AssertionError(f"shape {tuple(candidate.shape)}, expected {tuple(truth.shape)}")
    if truth.numel() == 0:
        return 0.0
    if not torch.isfinite(candidate).all():
        return float("inf")
    roundoff = ROUNDOFF[baseline.dtype]
    error, base_error = candidate.double() - truth, baseline.double() - truth
    ratios = []
    for axis in (0, 1):
        size = truth.norm(dim=axis)
        size = size.clamp(min=LINE_MINIMUM * size.max().item())
        worst = _relative(error.norm(dim=axis), size).max().item()
        worst_base = _relative(base_error.norm(dim=axis), size).max().item()
        ratios.append(_ratio(worst, LINE_FACTOR * worst_base + LINE_FLOOR * roundoff))
    whole = _relative(error.norm(), truth.norm()).item()
    whole_base = _relative(base_error.norm(), truth.norm()).item()
    ratios.append(_ratio(whole, WHOLE_FACTOR * whole_base + WHOLE_FLOOR * roundoff))
    return max(ratios)


def _relative(error: Tensor, size: Tensor) -> Tensor:
    """error / size, with 0 / 0 = 0: where the truth is exactly zero, so must be the candidate."""
    return torch.where(error == 0, torch.zeros_like(error), error / size)


def _ratio(error: float, allowed: float) -> float:
    if error == 0:
        return 0.0
    return error / allowed if allowed > 0 else float("inf")


def _same_infinities(candidate: Tensor, truth: Tensor) -> Tensor | None:
    """Where both are finite; None if a NaN or an infinity has no equal on the other side."""
    if candidate.shape != truth.shape:
        raise AssertionError(f"shape {tuple(candidate.shape)}, expected {tuple(truth.shape)}")
    finite = torch.isfinite(truth)
    if not torch.equal(finite, torch.isfinite(candidate)):
        return None
    same = torch.equal(candidate[~finite].double(), truth[~finite])
    return finite if same else None


def linear_cross_entropy_ratios(
    nll: Tensor,
    dhidden: Tensor | None,
    dweight: Tensor | None,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor,
    *,
    dbias: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> dict[str, float]:
    """The policy applied to one call of `linear_cross_entropy` and its gradients.

    Args:
        nll, dhidden, dweight, dbias: the candidate's results; None where a gradient was not wanted.
        hidden, weight, targets, bias, softcap, scale: its inputs.
        upstream: (N,) float32 gradient of nll; should be signed, non-uniform and wide in range.
    Returns:
        {"nll": ratio, "dhidden": ratio, "dweight": ratio, "dbias": ratio} of the results that were given; > 1
        fails. dbias counts as a matrix of one column.
    """
    settings = (softcap or 0.0, scale)
    exact_bias, bias32 = (None, None) if bias is None else (bias.double(), bias.float())
    truth = _differentiate(hidden.double(), weight.double(), exact_bias, targets, upstream.double(), settings)
    baseline32 = reference.linear_cross_entropy(hidden.float(), weight.float(), targets, bias32, *settings)
    baseline = _differentiate(hidden, weight, bias, targets, upstream, settings)
    floor = fp32_floor(hidden.dtype, hidden.shape[1])
    ratios = {"nll": fp32_error_ratio(nll, truth[0], baseline32, floor)}
    if dhidden is not None:
        ratios["dhidden"] = matrix_error_ratio(dhidden, truth[1], baseline[1])
    if dweight is not None:
        ratios["dweight"] = matrix_error_ratio(dweight, truth[2], baseline[2])
    if dbias is not None:
        columns = (part.reshape(-1, 1) for part in (dbias, truth[3], baseline[3]))
        ratios["dbias"] = matrix_error_ratio(*columns)
    return ratios


def _differentiate(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    upstream: Tensor,
    settings: tuple[float, float],
) -> tuple[Tensor | None, ...]:
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in (hidden, weight, bias)]
    nll = reference.linear_cross_entropy(leaves[0], leaves[1], targets, leaves[2], *settings)
    nll.backward(upstream.to(nll.dtype))
    return nll.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


def assert_ratios(ratios: dict[str, float]) -> None:
    """Fail with every output whose error exceeds the policy."""
    wrong = {name: ratio for name, ratio in ratios.items() if not ratio <= 1.0}  # NaN fails
    if wrong:
        listed = ", ".join(f"{name} at {ratio:.3g} times what is allowed" for name, ratio in wrong.items())
        raise AssertionError(f"outside the tolerance policy: {listed}")


def assert_bitwise_equal(candidate: Tensor, expected: Tensor, name: str = "tensor") -> None:
    """Fail unless shape, dtype and every bit agree, naming the first coordinate that differs."""
    if candidate.shape != expected.shape or candidate.dtype != expected.dtype:
        raise AssertionError(
            f"{name}: {tuple(candidate.shape)} {candidate.dtype}, "
            f"expected {tuple(expected.shape)} {expected.dtype}"
        )
    a, b = (t.detach().contiguous().reshape(-1) for t in (candidate, expected))
    if a.dtype is not torch.bool:
        a, b = (t.view(torch.uint8).reshape(t.numel(), t.element_size()) for t in (a, b))
        differs = (a != b).any(dim=1)
    else:
        differs = a != b
    if differs.any():
        flat = int(differs.nonzero()[0])
        where = tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), candidate.shape))
        raise AssertionError(
            f"{name}: {int(differs.sum())} of {differs.numel()} elements differ, the first at {where}: "
            f"{candidate[where].item()!r}, expected {expected[where].item()!r}"
        )


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Inside, every uninitialised allocation (`empty` of Python, C++ and CUDA) is filled with NaN, integers
    with their maximum, so that an element nobody wrote shows up in the results.
    """
    before = torch.are_deterministic_algorithms_enabled()
    before_warn = torch.is_deterministic_algorithms_warn_only_enabled()
    before_fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            # only the filling is wanted, not the report of which ops are not deterministic
            warnings.filterwarnings("ignore", message=".*deterministic.*")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=before_warn)
        torch.utils.deterministic.fill_uninitialized_memory = before_fill


def wide_range_upstream(num_rows: int, generator: torch.Generator, decades: float = 4.0) -> Tensor:
    """(N,) float32 upstream gradients as an ELBO loss makes them: both signs, magnitudes over several
    decades.
    """
    uniform = torch.empty(2, num_rows).uniform_(generator=generator)
    return torch.where(uniform[0] < 0.5, -1.0, 1.0) * 10.0 ** (-decades * uniform[1])


def assert_linear_cross_entropy(
    op: Callable[..., Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    upstream: Tensor,
    *,
    head_frozen: bool = False,
    hidden_frozen: bool = False,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
) -> None:
    """Run `op(hidden, weight, targets) -> nll` with the wanted gradients and hold it to the policy.

    With a bias, soft-cap or scale the op is given them by name; a bias is frozen where the head is.
    """
    hidden_leaf = hidden.detach().requires_grad_(not hidden_frozen)
    weight_leaf = weight.detach().requires_grad_(not head_frozen)
    bias_leaf = None if bias is None else bias.detach().requires_grad_(not head_frozen)
    plain = bias is None and softcap is None and scale == 1.0
    settings = {} if plain else {"bias": bias_leaf, "softcap": softcap, "scale": scale}
    nll = op(hidden_leaf, weight_leaf, targets, **settings)
    if not (head_frozen and hidden_frozen):
        nll.backward(upstream)
    inputs = (hidden, weight, targets, upstream)
    dbias = None if bias_leaf is None else bias_leaf.grad
    ratios = linear_cross_entropy_ratios(
        nll.detach(), hidden_leaf.grad, weight_leaf.grad, *inputs,
        dbias=dbias, bias=bias, softcap=softcap, scale=scale,
    )  # fmt: skip
    assert_ratios(ratios)
