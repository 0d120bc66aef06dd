"""The inputs every provider is timed on: a head, selected rows, ELBO-like row gradients."""

from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo_kernels.testing import wide_range_upstream

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = {"no gradient": (False, False), "frozen head": (True, False), "trained head": (True, True)}
"""Name -> (hidden needs a gradient, weight needs a gradient)."""


@dataclass(frozen=True)
class Case:
    """One problem. logits: "random" (standard deviation 2) or "peaked" (p of the target about 0.9)."""

    num_rows: int
    size: int
    num_classes: int
    dtype: torch.dtype
    device: str
    logits: str = "random"
    seed: int = 0


@dataclass(frozen=True)
class Inputs:
    """hidden (N, D), weight (V, D), targets (N,), upstream (N,) fp32: signed, over four decades."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor

    def first(self, num_rows: int) -> "Inputs":
        """The same problem with fewer rows, for the gate."""
        return Inputs(self.hidden[:num_rows], self.weight, self.targets[:num_rows], self.upstream[:num_rows])


def make_inputs(case: Case) -> Inputs:
    """Random inputs, the same for every provider and every run of the case."""
    generator = torch.Generator(case.device).manual_seed(case.seed)
    options = {"generator": generator, "device": case.device}
    hidden = torch.randn(case.num_rows, case.size, **options)
    weight = torch.randn(case.num_classes, case.size, **options) * (2 * case.size**-0.5)
    targets = torch.randint(0, case.num_classes, (case.num_rows,), **options)
    if case.logits == "peaked":
        towards = torch.nn.functional.normalize(weight[targets]) * (16 / 2)
        hidden = hidden + towards
    upstream = wide_range_upstream(case.num_rows, torch.Generator().manual_seed(case.seed))
    return Inputs(hidden.to(case.dtype), weight.to(case.dtype), targets, upstream.to(case.device))
