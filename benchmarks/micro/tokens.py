"""Micro benchmarks of what works on tokens and rows: masks, packing, sums, selection, rotation, Philox."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

import vrpo_kernels
from benchmarks.micro.micro import Micro, Prepared, Sizes, Where
from vrpo_kernels import testing

SEED = 7
# Random123's known answer for counter 0 and key 0 (its file kat_vectors, philox4x32 with 10 rounds).
PHILOX_OF_ZERO = (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def _same_bits(found: object, expected: object) -> None:
    """Fails unless two tensors, or two sequences of tensors, agree in every bit."""
    if isinstance(found, Tensor):
        testing.assert_bitwise_equal(found, expected)
        return
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        testing.assert_bitwise_equal(one, other, f"output {index}")


@dataclass(frozen=True)
class Draw:
    """Equal sequences, half of each masked, `samples` copies of each response."""

    length: Tensor
    counter: Tensor
    response: Tensor
    prompt: Tensor
    tokens: Tensor
    position: Tensor
    offsets: Tensor
    samples: int

    @classmethod
    def make(cls, where: Where) -> "Draw":
        """Masks by the reference backend, so that what is benchmarked is one op at a time."""
        sizes, options = where.sizes, {"dtype": torch.int64, "device": where.device}
        length = torch.full((sizes.segments,), sizes.length, **options)
        counter = torch.arange(3 * sizes.segments, **options).view(sizes.segments, 3)
        response = torch.full((sizes.segments // sizes.samples,), sizes.length, **options)
        prompt = torch.full_like(response, sizes.length // 4)
        tokens = where.integers(30_000, int(response.sum() + prompt.sum()))
        first = torch.zeros_like(length)
        position, offsets = vrpo_kernels.mask_select(
            length, counter, first, length // 2, seed=SEED, by_rank=True, backend="reference"
        )
        return cls(length, counter, response, prompt, tokens, position, offsets, sizes.samples)

    def select(self, by_rank: bool, backend: str = "auto") -> tuple[Tensor, Tensor]:
        count = self.length // 2 if by_rank else torch.full_like(self.length, 2**31)
        num_rows = len(self.position) if by_rank else None
        return vrpo_kernels.mask_select(
            self.length,
            self.counter,
            torch.zeros_like(self.length),
            count,
            seed=SEED,
            by_rank=by_rank,
            num_rows=num_rows,
            backend=backend,
        )

    def pack(self, backend: str = "auto") -> tuple[Tensor, ...]:
        batch = (self.tokens, self.prompt, self.response, self.position, self.offsets)
        return tuple(
            vrpo_kernels.pack_masked(*batch, num_samples=self.samples, mask_token_id=0, backend=backend)
        )

    def sums(self, weight: Tensor, backend: str = "auto") -> tuple[Tensor, Tensor]:
        rows = (weight, self.position, self.offsets, self.response)
        total = self.response.shape[0] * int(self.length[0])
        return vrpo_kernels.token_weight_sums(
            *rows, num_samples=self.samples, num_tokens=total, backend=backend
        )


def _draw_shape(sizes: Sizes) -> str:
    return f"{sizes.segments} x {sizes.length} tokens"


def _prepare_select(where: Where, by_rank: bool) -> Prepared:
    draw = Draw.make(where)
    return Prepared(
        lambda: draw.select(by_rank),
        lambda: _same_bits(draw.select(by_rank), draw.select(by_rank, "reference")),
    )


def _prepare_pack(where: Where) -> Prepared:
    draw = Draw.make(where)
    return Prepared(draw.pack, lambda: _same_bits(draw.pack(), draw.pack("reference")))


def _prepare_sums(where: Where) -> Prepared:
    draw = Draw.make(where)
    weight = 1 + torch.arange(len(draw.position), device=where.device).remainder(8).float()

    def check() -> None:
        _same_bits(draw.sums(weight), draw.sums(weight, "reference"))

    return Prepared(lambda: draw.sums(weight), check)


def _prepare_philox(where: Where) -> Prepared:
    blocks = where.sizes.segments * where.sizes.length // 4
    counter = torch.arange(blocks, device=where.device)
    zero = torch.zeros_like(counter)

    def check() -> None:
        words = vrpo_kernels.philox4x32(0, zero[:1], zero[:1], zero[:1], zero[:1])
        expected = tuple(torch.tensor([word], device=where.device) for word in PHILOX_OF_ZERO)
        _same_bits(words, expected)

    return Prepared(lambda: vrpo_kernels.philox4x32(SEED, counter, zero, zero, zero), check)


def _prepare_segment_sum(where: Where, backward: bool) -> Prepared:
    sizes = where.sizes
    size, total = sizes.length, sizes.segments * sizes.length
    value = torch.randn(total, generator=where.generator(), device=where.device).requires_grad_(backward)
    offsets = torch.arange(0, total + 1, size, device=where.device)
    upstream = torch.randn(sizes.segments, generator=where.generator(), device=where.device)

    def run() -> tuple[Tensor, ...]:
        sums = vrpo_kernels.segment_sum(value, offsets)
        return (sums, *(torch.autograd.grad(sums, value, upstream) if backward else ()))

    def check() -> None:
        sums, *gradient = run()
        truth = value.detach().double().view(-1, size).sum(dim=1)
        rounding = torch.finfo(torch.float32).eps
        if not torch.allclose(sums.double(), truth, rtol=rounding, atol=1e-6 * rounding):
            raise AssertionError("sums are off by more than a rounding")
        _same_bits(gradient, [upstream.repeat_interleave(size)] if backward else [])

    return Prepared(run, check)


def _prepare_gather(where: Where, backward: bool) -> Prepared:
    sizes = where.sizes
    hidden = where.normal(2 * sizes.rows, sizes.hidden).requires_grad_(backward)
    row_N = torch.arange(0, 2 * sizes.rows, 2, device=where.device)
    upstream = where.normal(sizes.rows, sizes.hidden)

    def run() -> tuple[Tensor, ...]:
        rows = vrpo_kernels.gather_rows(hidden, row_N)
        return (rows, *(torch.autograd.grad(rows, hidden, upstream) if backward else ()))

    def check() -> None:
        expected = [hidden.detach()[row_N]]
        if backward:
            expected.append(torch.zeros_like(hidden).index_put((row_N,), upstream))
        _same_bits(run(), expected)

    return Prepared(run, check)


def _prepare_rotary(where: Where, backward: bool) -> Prepared:
    sizes = where.sizes
    shape = (1, sizes.length, sizes.heads, sizes.head_size)
    query, key = (
        where.normal(*shape).add(shift).transpose(1, 2).requires_grad_(backward) for shift in (0, 1)
    )
    frequency = 1e4 ** -torch.linspace(0, 1, sizes.head_size // 2, device=where.device)
    angle = (torch.arange(sizes.length, device=where.device)[:, None] * frequency)[None]
    upstream = [where.normal(*shape).transpose(1, 2) for _ in range(2)]

    def run(backend: str = "auto") -> tuple[Tensor, ...]:
        turned = vrpo_kernels.rotary(query, key, angle.cos(), angle.sin(), backend=backend)
        return (*turned, *(torch.autograd.grad(turned, (query, key), upstream) if backward else ()))

    def check() -> None:
        found = run()
        _same_bits(found, run("reference"))
        half = sizes.head_size // 2
        low, high = (part.detach().double() for part in query.split(half, dim=-1))
        truth = low * angle.cos()[:, None] - high * angle.sin()[:, None]
        error = (found[0].detach().double()[..., :half] - truth).norm() / truth.norm()
        testing.assert_ratios({"query": (error / testing.ROUNDOFF[where.dtype]).item()})

    return Prepared(run, check)


def _selected_shape(sizes: Sizes) -> str:
    return f"{sizes.rows} of {2 * sizes.rows} rows, D={sizes.hidden}"


def _rotary_shape(sizes: Sizes) -> str:
    return f"{sizes.heads} heads of {sizes.head_size}, {sizes.length} positions"


PASSES = (("forward", False), ("forward and backward", True))
MICROS = [
    *(
        Micro(
            "mask_select",
            mode,
            _draw_shape,
            functools.partial(_prepare_select, by_rank=by_rank),
            floating=False,
            needs_extension=True,
        )
        for mode, by_rank in (("by rank", True), ("by word", False))
    ),
    Micro("pack_masked", "forward", _draw_shape, _prepare_pack, floating=False, needs_extension=True),
    Micro("token_weight_sums", "forward", _draw_shape, _prepare_sums, floating=False, needs_extension=True),
    Micro("philox4x32", "forward", _draw_shape, _prepare_philox, floating=False),
    *(
        Micro(
            "segment_sum",
            mode,
            _draw_shape,
            functools.partial(_prepare_segment_sum, backward=backward),
            floating=False,
        )
        for mode, backward in PASSES
    ),
    *(
        Micro("gather_rows", mode, _selected_shape, functools.partial(_prepare_gather, backward=backward))
        for mode, backward in PASSES
    ),
    *(
        Micro("rotary", mode, _rotary_shape, functools.partial(_prepare_rotary, backward=backward))
        for mode, backward in PASSES
    ),
]
