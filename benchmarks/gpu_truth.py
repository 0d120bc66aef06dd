"""A head of one size with random operands, what is true of it in fp64, and how far a candidate is from it."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cases import HEADS
from benchmarks.gpu_bench import Bench
from vrpo_kernels.testing import wide_range_upstream

SAMPLED_ROWS, SAMPLED_CLASSES = 16, 64
CHUNK = 8192  # classes per fp64 tile

NLL_NATS, NLL_RELATIVE = 5e-5, 5e-6
"""Largest error allowed for nll: NLL_NATS + NLL_RELATIVE * max|nll|. Tensor cores add into the fp32
accumulator with truncation, about 5e-6 of a logit at D = 4096; any kernel on them can keep this."""

GRADIENT = {torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""Largest error of a gradient, in norms: factors and result are rounded, by up to 2^-9 each in bf16."""

ERRORS = (
    *("nll_err", "nll_err_rel", "nll_bias", "dX_err", "dX_worst_row", "dW_err", "dW_target_err", "db_err"),
    *("repeats", "verdict"),
)


@dataclass(frozen=True)
class Size:
    """N rows of D features, V classes; peaked: the target has most of the probability in most rows; head: one
    of `cases.HEADS`.
    """

    rows: int
    hidden: int
    classes: int
    peaked: bool = False
    head: str = "plain"

    @property
    def case(self) -> str:
        logits = "peaked logits" if self.peaked else "random logits"
        return logits if self.head == "plain" else f"{logits}, {self.head}"


class Head:
    """Operands of one size: hidden (N, D), weight (V, D), targets (N,), dnll (N,) signed over four decades;
    bias (V,) or None, soft-cap or None.

    Logits have standard deviation 2; peaked ones 1, and 16 nats more on the target. A bias has 1.
    """

    def __init__(self, bench: Bench, size: Size) -> None:
        self.bench, self.size = bench, size
        generator = torch.Generator(bench.device).manual_seed(size.rows + size.classes)
        options = {"generator": generator, "device": bench.device}
        self.weight = torch.randn(size.classes, size.hidden, dtype=torch.float32, **options).to(bench.dtype)
        self.targets = torch.randint(size.classes, (size.rows,), **options)
        hidden = torch.randn(size.rows, size.hidden, **options)
        hidden *= (1.0 if size.peaked else 2.0) * size.hidden**-0.5
        if size.peaked:
            hidden += self.weight[self.targets].float() * (16.0 / size.hidden)
        self.hidden = hidden.to(bench.dtype)
        has_bias, self.softcap = HEADS[size.head]
        self.bias = torch.randn(size.classes, **options).to(bench.dtype) if has_bias else None
        upstream = wide_range_upstream(size.rows, torch.Generator().manual_seed(size.rows))
        self.dnll = upstream.to(bench.device)
        spread = torch.linspace(0, size.rows - 1, min(SAMPLED_ROWS, size.rows)).long().unique()
        self.some_rows = spread.to(bench.device)
        self.some_classes = torch.randint(size.classes, (SAMPLED_CLASSES,), **options).unique()

    def columns(self) -> dict[str, object]:
        """The size in a CSV row."""
        size = self.size
        shape = {"N": size.rows, "D": size.hidden, "V": size.classes}
        return {"dtype": self.bench.dtype_name, **shape, "case": size.case}

    def _chunks(self):
        for first in range(0, self.size.classes, CHUNK):
            yield slice(first, first + CHUNK)

    def _logits(self, hidden: Tensor, classes: Tensor | slice) -> Tensor:
        """(rows, classes) fp64, after the soft-cap."""
        logits = hidden @ self.weight[classes].double().T
        if self.bias is not None:
            logits += self.bias[classes].double()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def _slope(self, logits: Tensor) -> Tensor:
        """Derivative of the soft-cap where it gave these logits; of one element where there is no cap."""
        return logits.new_ones(1) if self.softcap is None else 1 - (logits / self.softcap) ** 2

    @functools.cached_property
    def target_logit(self) -> Tensor:
        """(N,) fp64."""
        found = []
        for hidden, targets in zip(self.hidden.split(1024), self.targets.split(1024), strict=True):
            logits = (hidden.double() * self.weight[targets].double()).sum(1)
            logits += 0.0 if self.bias is None else self.bias[targets].double()
            found.append(logits)
        logits = torch.cat(found)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    @functools.cached_property
    def lse(self) -> Tensor:
        """(N,) fp64 log-sum-exp of every row."""
        hidden = self.hidden.double()
        total = hidden.new_full((self.size.rows,), -torch.inf)
        for classes in self._chunks():
            total = torch.logaddexp(total, torch.logsumexp(self._logits(hidden, classes), dim=1))
        return total

    @functools.cached_property
    def nll(self) -> Tensor:
        """(N,) fp64. lse - z rounds to some 1e-15 nats: enough against an fp32 candidate of any size."""
        return self.lse - self.target_logit

    @functools.cached_property
    def dhidden(self) -> Tensor:
        """(some rows, D) fp64 gradient of hidden."""
        rows = self.some_rows
        hidden, lse = self.hidden[rows].double(), self.lse[rows]
        total = torch.zeros_like(hidden)
        for classes in self._chunks():
            logits = self._logits(hidden, classes)
            share = torch.exp(logits - lse[:, None]) * self._slope(logits)
            total += share @ self.weight[classes].double()
        slope = self._slope(self.target_logit[rows])
        total -= self.weight[self.targets[rows]].double() * slope[:, None]
        return total * self.dnll[rows].double()[:, None]

    def _dlogits(self, classes: Tensor, part: slice) -> Tensor:
        """(rows, classes) fp64 gradient of the logits before the soft-cap."""
        logits = self._logits(self.hidden[part].double(), classes)
        share = torch.exp(logits - self.lse[part, None])
        share -= (self.targets[part, None] == classes[None, :]).double()
        return share * self._slope(logits) * self.dnll[part].double()[:, None]

    def _dweight(self, classes: Tensor) -> Tensor:
        """(classes, D) fp64 gradient of these rows of the head."""
        total = torch.zeros(len(classes), self.size.hidden, dtype=torch.float64, device=self.bench.device)
        for start in range(0, self.size.rows, 4096):
            part = slice(start, start + 4096)
            total += self._dlogits(classes, part).T @ self.hidden[part].double()
        return total

    @functools.cached_property
    def dbias(self) -> Tensor:
        """(classes, 1) fp64 gradient of the bias of random classes."""
        parts = (slice(start, start + 4096) for start in range(0, self.size.rows, 4096))
        return sum(self._dlogits(self.some_classes, part).sum(dim=0) for part in parts)[:, None]

    @functools.cached_property
    def dweight(self) -> Tensor:
        """Gradient of random classes."""
        return self._dweight(self.some_classes)

    @functools.cached_property
    def target_classes(self) -> Tensor:
        return self.targets[self.some_rows].unique()

    @functools.cached_property
    def dweight_targets(self) -> Tensor:
        """Gradient of classes that are targets."""
        return self._dweight(self.target_classes)

    def errors(
        self,
        nll: Tensor | None = None,
        dhidden: Tensor | None = None,
        dweight: Tensor | None = None,
        dbias: Tensor | None = None,
    ) -> dict[str, str]:
        """Columns of ERRORS but `repeats`; what is not given stays empty and is not judged."""
        found: dict[str, str] = {}
        good = []
        if nll is not None:
            difference = nll.double() - self.nll
            worst, largest = difference.abs().max().item(), self.nll.abs().max().item()
            found |= {"nll_err": f"{worst:.2e}", "nll_err_rel": f"{worst / largest:.2e}"}
            found["nll_bias"] = f"{difference.mean().item():+.2e}"
            good.append(worst <= NLL_NATS + NLL_RELATIVE * largest)  # NaN is not good
        limit = GRADIENT[self.bench.dtype]
        if dhidden is not None:
            whole, line = relative_errors(dhidden[self.some_rows], self.dhidden)
            found |= {"dX_err": f"{whole:.2e}", "dX_worst_row": f"{line:.2e}"}
            good.append(whole <= limit)
        if dweight is not None:
            whole, _ = relative_errors(dweight[self.some_classes], self.dweight)
            targets, _ = relative_errors(dweight[self.target_classes], self.dweight_targets)
            found |= {"dW_err": f"{whole:.2e}", "dW_target_err": f"{targets:.2e}"}
            good.append(whole <= limit and targets <= limit)
        if dbias is not None:
            whole, _ = relative_errors(dbias[self.some_classes, None], self.dbias)
            found["db_err"] = f"{whole:.2e}"
            good.append(whole <= limit)
        return {**found, "verdict": "ok" if all(good) else "RED"}


def relative_errors(candidate: Tensor, truth: Tensor) -> tuple[float, float]:
    """(||c - t|| / ||t||, the largest such ratio of a row)."""
    error = candidate.double() - truth
    whole = (error.norm() / truth.norm()).item()
    return whole, (error.norm(dim=1) / truth.norm(dim=1).clamp(min=1e-300)).max().item()


class Heads:
    """Heads by size, a GB each, with what was found out about them; where tests run beside it, one only."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._heads: dict[Size, Head] = {}

    def get(self, size: Size) -> Head:
        """The head of this size."""
        if size not in self._heads:
            if self.bench.warm:
                self._heads.clear()
            self.bench.clear()
            self._heads[size] = Head(self.bench, size)
        return self._heads[size]
