"""What a step must cost: floating-point operations and bytes, over the rates of bare products and copies.

Only work that nobody can leave out counts: real tokens, masked rows, in the last layer what those rows need.
With D the hidden size, I that of the MLP, L_s and n_s the tokens and masked rows of segment s, T and N their
sums:

    a layer:         2 (4 D^2 + 3 D I) T + 4 D sum_s L_s^2                  (projections; attention)
    the last layer:  2 (2 D^2) T + 2 (2 D^2 + 3 D I) N + 4 D sum_s n_s L_s  (keys, values; all else at N rows)
    the head:        2 N D V

A backward pass costs as much again for the inputs, attention twice, and the projections once more where
weights train; below the lowest layer that trains nothing, and nothing for what that layer reads unless the
embedding trains. Adapters (1 %) are left out.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.step.setup import Models
from benchmarks.step.variants import Variant
from benchmarks.step_setup import Size
from vrpo.batch import PackedBatch


@dataclass(frozen=True)
class Work:
    """Operations by the product they need: (T, D) @ (D, D) and attention, (T, D) @ (D, I), and the head's."""

    square: float = 0.0
    wide: float = 0.0
    head: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.square + other.square, self.wide + other.wide, self.head + other.head)

    def times(self, factor: float) -> "Work":
        return Work(factor * self.square, factor * self.wide, factor * self.head)

    @property
    def flops(self) -> float:
        return self.square + self.wide + self.head


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
    if not last:
        return Work(4 * square * counts.tokens, wide * counts.tokens), Work(
            4.0 * size.hidden * counts.length_squares
        )
    return (
        Work(2 * square * (counts.tokens + counts.rows), wide * counts.rows),
        Work(4.0 * size.hidden * counts.row_lengths),
    )


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


Shape = tuple[int, int, int]


def shapes(size: Size, tokens: int, rows: int) -> dict[str, Shape]:
    """The bare products whose rates make up the floor: (M, K) @ (K, N)."""
    return {
        "square": (tokens, size.hidden, size.hidden),
        "wide": (tokens, size.hidden, size.mlp),
        "head": (rows, size.hidden, size.classes),
    }


def product(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Callable[[], Tensor], float]:
    """(a call of x w^T, its floating-point operations), repeated to 0.5 GFLOP at least."""
    M, K, N = shape
    generator = torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device, "dtype": dtype}
    left, right = torch.randn(M, K, **options), torch.randn(N, K, **options)
    out = left.new_empty(M, N)
    repeats = max(1, round(5e8 / (2 * M * K * N)))

    def run() -> Tensor:
        for _ in range(repeats):
            torch.mm(left, right.t(), out=out)
        return out

    return run, 2.0 * M * K * N * repeats


def copy_of(device: str, nbytes: int = 2**28) -> tuple[Callable[[], Tensor], float]:
    """(a call of copy_, the bytes that it reads and writes)."""
    source = torch.ones(nbytes // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source), 2.0 * nbytes


def floor_ms(work: Work, rates: dict[str, float]) -> float:
    """Milliseconds of the bare products of a step at these rates in FLOP/s."""
    return 1e3 * sum(getattr(work, name) / rates[name] for name in ("square", "wide", "head"))
