"""The inputs every provider is timed on: a head, selected rows, ELBO-like row gradients."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vrpo_kernels.testing import wide_range_upstream

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
COLUMNS = {"no gradient": (False, False), "frozen head": (True, False), "trained head": (True, True)}
"""Name -> (hidden needs a gradient, weight and bias need a gradient)."""
SOFTCAP = 30.0
HEADS = {"plain": (False, None), "bias": (True, None), "softcap": (False, SOFTCAP)}
"""Name -> (whether it has a bias, its soft-cap)."""


@dataclass(frozen=True)
class ModelHead:
    """D, V and kind of a model's head."""

    size: int
    num_classes: int
    head: str


def _diffusion_gemma() -> ModelHead:
    """As transformers' own configuration says."""
    from transformers.models.diffusion_gemma import configuration_diffusion_gemma

    text = configuration_diffusion_gemma.DiffusionGemmaConfig().get_text_config()
    if text.final_logit_softcapping != SOFTCAP:
        raise ValueError(
            f"soft-cap must be {SOFTCAP}, and this transformers says {text.final_logit_softcapping}"
        )
    return ModelHead(text.hidden_size, text.vocab_size, "softcap")


MODELS = {
    "llada": lambda: ModelHead(4096, 126464, "plain"),
    "dream": lambda: ModelHead(3584, 152064, "plain"),
    "llada2-mini": lambda: ModelHead(2048, 157184, "plain"),
    "diffusion-gemma": _diffusion_gemma,
}
"""Name -> its head."""


@dataclass(frozen=True)
class Case:
    """One problem.

    Attributes:
        logits: "random" (standard deviation 2) or "peaked" (p of the target about 0.9).
        head: one of HEADS.
    """

    num_rows: int
    size: int
    num_classes: int
    dtype: torch.dtype
    device: str
    logits: str = "random"
    seed: int = 0
    head: str = "plain"

    @property
    def softcap(self) -> float | None:
        """Of the head."""
        return HEADS[self.head][1]


@dataclass(frozen=True)
class Inputs:
    """hidden (N, D), weight (V, D), targets (N,), upstream (N,) fp32: signed, over four decades; bias (V,) or
    None, soft-cap or None.
    """

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    bias: Tensor | None = None
    softcap: float | None = None

    def first(self, num_rows: int) -> "Inputs":
        """The same problem with fewer rows, for the gate."""
        rows = {name: getattr(self, name)[:num_rows] for name in ("hidden", "targets", "upstream")}
        return replace(self, **rows)

    def with_head(self, head: str) -> "Inputs":
        """The same problem with another head; a bias of standard deviation 1."""
        has_bias, softcap = HEADS[head]
        generator = torch.Generator(self.weight.device).manual_seed(1)
        options = {"generator": generator, "device": self.weight.device}
        bias = torch.randn(len(self.weight), **options).to(self.weight.dtype) if has_bias else None
        return replace(self, bias=bias, softcap=softcap)


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
    plain = Inputs(hidden.to(case.dtype), weight.to(case.dtype), targets, upstream.to(case.device))
    return plain.with_head(case.head)
