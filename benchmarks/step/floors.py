"""What a step must cost: floating-point operations and bytes, over the rates of bare products and copies.

Only work that nobody can leave out counts: real tokens, masked rows, in the last layer what those rows need.
With D the hidden size, I that of the MLP, L_s and n_s the tokens and masked rows of segment s, T and N their
sums:

    a layer:         2 (4 D^2 + 3 D I) T + 4 D sum_s L_s^2                  (projections; attention)
    the last layer:  2 (2 D^2) T + 2 (2 D^2 + 3 D I) N + 4 D sum_s n_s L_s  (keys, values; all else at N rows)
    the head:        2 N D V

A backward pass costs as much again for the inputs, attention twice, and the projections once more where
weights train; below the lowest layer that trains nothing, and nothing for what that layer reads unless the
embedding trains. Adapters are left out: 1 % at LLaDA-8B's size, a tenth of the smallest models'.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.bare_products import BareProducts
from benchmarks.step.setup import Models
from benchmarks.step.variants import Variant
from benchmarks.step_setup import Size
from vrpo.batch import PackedBatch


@dataclass(frozen=True)
class Work:
    """Operations in the layers and in the head."""

    layers: float = 0.0
    head: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.layers + other.layers, self.head + other.head)

    def times(self, factor: float) -> "Work":
        return Work(factor * self.layers, factor * self.head)

    @property
    def flops(self) -> float:
        return self.layers + self.head


@dataclass(frozen=True)
class Counts:
    """Tokens, masked rows, and the sums that attention needs: of L^2, and of n L."""

    tokens: float
    rows: float
    length_squares: float
    row_lengths: float

    @classmethod
    def of(cls, pack: PackedBatch) -> "Counts":
        """Of a pack on the CPU."""
        length_S, rows_S = pack.cu_seqlens_S1.diff().double(), pack.offsets_S1.diff().double()
        return cls(
            length_S.sum().item(),
            rows_S.sum().item(),
            length_S.square().sum().item(),
            (rows_S * length_S).sum().item(),
        )


def layer(size: Size, counts: Counts, last: bool) -> tuple[Work, Work]:
    """(projections, attention) of a layer's forward pass."""
    square, wide = 2.0 * size.hidden**2, 2.0 * 3 * size.hidden * size.mlp
    if last:
        projections = 2 * square * (counts.tokens + counts.rows) + wide * counts.rows
        return Work(projections), Work(4.0 * size.hidden * counts.row_lengths)
    return Work((4 * square + wide) * counts.tokens), Work(4.0 * size.hidden * counts.length_squares)


def head(size: Size, counts: Counts) -> Work:
    """One product of the head."""
    return Work(head=2.0 * counts.rows * size.hidden * size.classes)


def forward(size: Size, counts: Counts, first: int = 0) -> Work:
    """The layers from `first` on."""
    total = Work()
    for index in range(first, size.layers):
        projections, attention = layer(size, counts, index == size.layers - 1)
        total += projections + attention
    return total


def backward(size: Size, counts: Counts, first: int, *, weights: bool, embedding: bool) -> Work:
    """The layers from `first` on, the lowest that trains. weights: theirs train, not an adapter's alone."""
    total = Work()
    for index in range(first, size.layers):
        projections, attention = layer(size, counts, index == size.layers - 1)
        total += projections.times(1 + weights) + attention.times(2)
    if not embedding:  # queries, keys and values of that layer
        total += Work(-2.0 * 3 * size.hidden**2 * counts.tokens)
    return total


def step_work(variant: Variant, models: Models, counts: Counts) -> Work:
    """All of one step. Others than ours are held to what ours needs: their padding is not work."""
    size = models.size
    first = size.layers - models.top_layers if models.top_layers else 0
    trains = models.weights == "full"
    total = forward(size, counts) + head(size, counts)
    total += backward(size, counts, first, weights=trains, embedding=trains and not first)
    total += head(size, counts).times(1 + trains)
    if variant.replay:  # whose second pass reads the logits' normalisers from its first
        total += forward(size, counts)
    if models.checkpointing:
        total += forward(size, counts, first)
    if variant.reference == "computed":
        total += forward(size, counts, first if variant.share_trunk else 0) + head(size, counts)
    return total


def step_bytes(variant: Variant, models: Models, counts: Counts) -> float:
    """Least traffic: each pass reads the weights and moves the residual stream in and out of every layer."""
    size, width = models.size, 4 if models.dtype is torch.float32 else 2
    weights = size.body_parameters + size.hidden * size.classes
    passes = 2 + (variant.reference == "computed") + variant.replay + models.checkpointing
    gradients = sum(weight.numel() * weight.element_size() for weight in models.trained().values())
    return passes * (weights + 2.0 * counts.tokens * size.hidden * size.layers) * width + gradients


def copy_of(device: str, nbytes: int = 2**28) -> tuple[Callable[[], Tensor], float]:
    """(a call of copy_, the bytes that it reads and writes)."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * nbytes


def bare_rates(bare: BareProducts, layer_ms: float, head_ms: float) -> dict[str, float]:
    """FLOP/s of the products of a layer, and of the head, from their times."""
    layer_flops = 2.0 * bare.size.body_parameters / bare.size.layers * bare.tokens
    head_flops = 2.0 * bare.rows * bare.size.hidden * bare.size.classes
    return {"layers": 1e3 * layer_flops / layer_ms, "head": 1e3 * head_flops / head_ms}


def floor_ms(work: Work, rates: dict[str, float]) -> float:
    """Milliseconds of the bare products of a step at these rates; attention counts at that of the layers."""
    return 1e3 * (work.layers / rates["layers"] + work.head / rates["head"])
