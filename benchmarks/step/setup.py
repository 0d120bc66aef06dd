"""Models of the step benchmark: a policy that has moved a little from its reference, and their sizes."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.step_setup import LLADA_8B, TINY, Size, build_model, checkpoint_activations, with_lora
from vrpo.training.trunk import frozen_copy, train_top_layers

# By the number of their parameters. The lengths that a Size names are not used: those of a mix are.
SMALL = replace(LLADA_8B, layers=4, hidden=128, heads=2, mlp=384, classes=2048, mask_token_id=2047)
SIZES = {
    "1M": SMALL,
    "9M": replace(SMALL, layers=8, hidden=256, heads=4, mlp=768, classes=4096, mask_token_id=4095),
    "30M": replace(SMALL, layers=8, hidden=512, heads=8, mlp=1408, classes=4096, mask_token_id=4095),
    "LLaDA-8B": LLADA_8B,
    "tiny": TINY,
}
WEIGHTS = ("full", "LoRA")


class Models:
    """A policy and its reference: with LoRA the model with its adapter off, else a frozen copy.

    top_layers: only so many of the uppermost layers train (or carry the adapter); 0: all.
    checkpointing: of activations, in everything that runs on this policy.
    """

    def __init__(
        self, size: Size, device: str, weights: str, *, checkpointing: bool = False, top_layers: int = 0
    ):
        self.size, self.device, self.weights, self.top_layers = size, device, weights, top_layers
        self.checkpointing = checkpointing
        self.dtype = torch.bfloat16 if device == "cuda" else torch.float32
        base = build_model(size, device, self.dtype)
        self.frozen: nn.Module | None = None
        if weights == "full":
            self.model = base.requires_grad_(True)
            if top_layers:
                train_top_layers(self.model, top_layers)
            self.frozen = frozen_copy(self.model).requires_grad_(False).eval()
        else:
            self.model = with_lora(base, layers=range(size.layers - (top_layers or size.layers), size.layers))
        self._move()
        checkpoint_activations(self.model, checkpointing)
        self.model.train()

    @property
    def base(self) -> nn.Module:
        """The policy below its adapter."""
        return self.model.get_base_model() if self.weights == "LoRA" else self.model

    @contextlib.contextmanager
    def reference(self) -> Iterator[nn.Module]:
        """The reference as a model, without gradients."""
        with torch.no_grad():
            if self.frozen is not None:
                yield self.frozen
            else:
                with self.model.disable_adapter():
                    yield self.model

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 as the trainer runs it on a GPU; nothing on a CPU."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device, self.dtype)

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that get a gradient."""
        return {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}

    def gradients(self) -> dict[str, Tensor]:
        """A copy of the gradients; a weight without one counts as zero."""
        return {
            name: torch.zeros_like(weight) if weight.grad is None else weight.grad.clone()
            for name, weight in self.trained().items()
        }

    @torch.no_grad()
    def _move(self) -> None:
        generator = torch.Generator(self.device).manual_seed(1)
        for weight in self.trained().values():
            weight.add_(torch.empty_like(weight).normal_(std=0.002, generator=generator))


def gradient_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """|got - want| / |want| over all trained weights; infinite where it is not a number."""
    squares = [(got[name] - want[name]).double().square().sum() for name in want]
    norm = torch.stack([gradient.double().square().sum() for gradient in want.values()]).sum()
    error = (torch.stack(squares).sum() / norm).sqrt().item()
    return error if error == error else float("inf")
