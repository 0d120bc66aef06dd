"""The correctness gate of `bench_linear_cross_entropy`: the tolerance policy, the truth computed once."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from benchmarks.cases import COLUMNS, Inputs
from benchmarks.providers import Op
from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import reference

ROWS = 256
"""Rows that are checked; the fp64 logits of LLaDA's head are then 0.26 GB, those of 4096 rows 4 GB."""
LARGE_HEAD, CLASSES = 2**27, 4096
"""Numbers in a head beyond which, on a CPU, the gradients of about so many classes are checked, those of all
targets among them: fp64 copies of LLaDA's whole head would take 4 GB each, five of them at a time."""

Results = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""nll (N,), dhidden (N, D), dweight (V, D), dbias (V,); None where a gradient is not wanted."""


@dataclass(frozen=True)
class Verdict:
    """nll_error: largest error of nll in nats. ratios: error over what the policy allows, per output."""

    nll_error: float
    ratios: dict[str, float]

    @property
    def worst(self) -> float:
        """The largest ratio; NaN counts as infinite."""
        return max(ratio if ratio == ratio else float("inf") for ratio in self.ratios.values())

    @property
    def note(self) -> str:
        """Empty within the policy, else every ratio."""
        if self.worst <= 1:
            return ""
        return "outside the tolerance policy: " + ", ".join(f"{k} {v:.3g}" for k, v in self.ratios.items())


class Gate:
    """Truth in fp64 and baseline of the first ROWS rows of one problem."""

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = _only_first_rows_count(inputs)
        part = inputs.first(ROWS)
        self._classes = _checked_classes(part)
        self._truth = self._of_checked_classes(_differentiate(part, torch.float64))
        self._baseline32 = _differentiate(part, torch.float32, only_nll=True)[0]
        self._baseline = self._of_checked_classes(_differentiate(part, inputs.weight.dtype))

    def _of_checked_classes(self, results: Results) -> Results:
        nll, dhidden, *of_classes = results
        return nll, dhidden, *(one if one is None else one[self._classes] for one in of_classes)

    def judge(self, op: Op) -> Verdict:
        """Runs op forward and backward on the whole problem, the gradient of all other rows being zero, so
        that what is judged is what is timed; and holds nll, dhidden and dweight to the policy.
        """
        results = full_pass(op, self.inputs, "trained head")
        nll, dhidden, dweight, dbias = self._of_checked_classes(results)
        first = slice(0, ROWS)
        nll, dhidden = nll[first].float(), dhidden[first]
        floor = testing.fp32_floor(self.inputs.hidden.dtype, self.inputs.hidden.shape[1])
        ratios = {
            "nll": testing.fp32_error_ratio(nll, self._truth[0], self._baseline32, floor),
            "dhidden": testing.matrix_error_ratio(dhidden, self._truth[1], self._baseline[1]),
            "dweight": testing.matrix_error_ratio(dweight, self._truth[2], self._baseline[2]),
        }
        if self.inputs.bias is not None:
            columns = (part[:, None] for part in (dbias, self._truth[3], self._baseline[3]))
            ratios["dbias"] = testing.matrix_error_ratio(*columns)
        return Verdict((nll.double() - self._truth[0]).abs().max().item(), ratios)


def _only_first_rows_count(inputs: Inputs) -> Inputs:
    upstream = inputs.upstream.clone()
    upstream[ROWS:] = 0
    return replace(inputs, upstream=upstream)


def _checked_classes(part: Inputs) -> Tensor | slice:
    """All classes, or of a large head on a CPU the targets and evenly spaced others."""
    num_classes = len(part.weight)
    if part.weight.numel() <= LARGE_HEAD or part.weight.is_cuda:
        return slice(None)
    spaced = torch.arange(0, num_classes, max(1, num_classes // CLASSES), device=part.targets.device)
    return torch.cat([part.targets, spaced]).unique()


def _differentiate(part: Inputs, dtype: torch.dtype, *, only_nll: bool = False) -> Results:
    """The formula's results with operands of this dtype."""
    operands = [part.hidden, part.weight, *([] if part.bias is None else [part.bias])]
    leaves = [one.detach().to(dtype).requires_grad_() for one in operands]
    bias = leaves[2] if len(leaves) > 2 else None
    nll = reference.linear_cross_entropy(*leaves[:2], part.targets, bias, part.softcap or 0.0)
    if only_nll:
        return nll.detach(), None, None, None
    gradients = torch.autograd.grad(nll, leaves, part.upstream.to(nll.dtype))
    return nll.detach(), *gradients, *([] if len(gradients) > 2 else [None])


def full_pass(op: Op, inputs: Inputs, column: str, *, per_row: bool = True) -> Results:
    """One call of op with the column's gradients; gradients that the column does not want are None."""
    need_hidden, need_weight = COLUMNS[column]
    hidden = inputs.hidden.detach().requires_grad_(need_hidden)
    weight = inputs.weight.detach().requires_grad_(need_weight)
    bias = [] if inputs.bias is None else [inputs.bias.detach().requires_grad_(need_weight)]
    with torch.set_grad_enabled(need_hidden or need_weight):
        nll = op(hidden, weight, inputs.targets, *bias)
    if need_hidden or need_weight:
        nll.backward(inputs.upstream.to(nll.dtype) if per_row else None)
    return nll.detach(), hidden.grad, weight.grad, bias[0].grad if bias else None
