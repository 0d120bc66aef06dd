"""Micro benchmarks of cross_entropy, of the ELBOs and of token_logps."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import vrpo_kernels
from benchmarks import bench_cross_entropy
from benchmarks.micro.micro import Micro, Prepared, Sizes, Where
from vrpo_kernels import testing


def _logits_shape(sizes: Sizes) -> str:
    return f"N={sizes.rows} of {2 * sizes.rows} V={sizes.classes}"


def _hidden_shape(sizes: Sizes) -> str:
    return f"N={sizes.rows} of {2 * sizes.rows} D={sizes.hidden} V={sizes.classes}"


def _prepare_cross_entropy(where: Where, mode: str) -> Prepared:
    inputs = bench_cross_entropy.make_inputs(
        2 * where.sizes.rows, where.sizes.classes, where.dtype, where.device
    )

    def op(logits: Tensor, targets: Tensor, rows: Tensor) -> Tensor:
        return vrpo_kernels.cross_entropy(logits, targets, rows)

    overwritten = inputs.logits.clone()
    run = {
        "forward": lambda: op(inputs.logits, inputs.targets, inputs.rows),
        "forward and backward": lambda: bench_cross_entropy.differentiate(op, inputs, inputs.logits),
        "in place": lambda: bench_cross_entropy.in_place(inputs, overwritten),
    }[mode]

    def check() -> None:
        testing.assert_ratios({"nll and dlogits": bench_cross_entropy.gate(op, inputs)})
        if mode == "in place":
            logits = inputs.logits.clone()
            bench_cross_entropy.in_place(inputs, logits)
            _, dlogits = bench_cross_entropy.differentiate(op, inputs, inputs.logits)
            testing.assert_bitwise_equal(logits, dlogits, "gradient in place")

    return Prepared(run, check)


@dataclass(frozen=True)
class Batch:
    """Two sequences, every second token masked: tokens, masked (B, L); weights, upstream gradient (B,)."""

    tokens: Tensor
    masked: Tensor
    weights: Tensor
    upstream: Tensor

    @classmethod
    def make(cls, where: Where) -> "Batch":
        """N masked tokens of 2 N."""
        length = where.sizes.rows
        tokens = where.integers(where.sizes.classes, 2, length)
        masked = torch.arange(2 * length, device=where.device).view(2, length) % 2 == 1
        weights = torch.tensor([2.0, 1.25], device=where.device)
        return cls(tokens, masked, weights, torch.tensor([0.5, -1.5], device=where.device))

    def logps(self, logits: Tensor) -> Tensor:
        """log softmax(logits)[token] where masked, 0 elsewhere; at least in fp32."""
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        taken = wide.log_softmax(-1).gather(-1, self.tokens[..., None])[..., 0]
        return torch.where(self.masked, taken, 0.0)

    def elbo(self, logits: Tensor) -> Tensor:
        """The sum of these over each sequence, times its weight."""
        logps = self.logps(logits)
        return logps.sum(dim=1) * self.weights.to(logps.dtype)


def _gradients(
    op: Callable[..., Tensor], leaves: tuple[Tensor, ...], upstream: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """(value, gradients of the leaves)."""
    leaves = tuple(leaf.detach().requires_grad_() for leaf in leaves)
    value = op(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, upstream.to(value.dtype))


def _check(
    op: Callable[..., Tensor], formula: Callable[..., Tensor], leaves: tuple[Tensor, ...], upstream: Tensor
) -> None:
    """Value and gradients of every leaf, (..., size) each, against the formula."""
    value, found = _gradients(op, leaves, upstream)
    truth, true = _gradients(formula, tuple(leaf.double() for leaf in leaves), upstream)
    base32, _ = _gradients(formula, tuple(leaf.float() for leaf in leaves), upstream)
    _, base = _gradients(formula, leaves, upstream)
    floor = testing.fp32_floor(leaves[0].dtype, leaves[0].shape[-1] if len(leaves) > 1 else 1)
    ratios = {"value": testing.fp32_error_ratio(value, truth, base32, floor)}
    for index, one in enumerate(zip(found, true, base, strict=True)):
        ratios[f"gradient {index}"] = testing.matrix_error_ratio(*(part.flatten(0, -2) for part in one))
    testing.assert_ratios(ratios)


def _prepare_from_logits(where: Where, backward: bool) -> Prepared:
    batch, sizes = Batch.make(where), where.sizes
    logits = where.normal(2, sizes.rows, sizes.classes, scale=2.0)

    def op(logits: Tensor) -> Tensor:
        return vrpo_kernels.elbo_from_logits(
            logits, batch.tokens, batch.masked, batch.weights, num_masked=sizes.rows
        )

    def run() -> object:
        return _gradients(op, (logits,), batch.upstream) if backward else op(logits)

    return Prepared(run, lambda: _check(op, batch.elbo, (logits,), batch.upstream))


def _prepare_from_hidden(where: Where, name: str, mode: str) -> Prepared:
    """elbo_from_hidden or token_logps."""
    batch, sizes = Batch.make(where), where.sizes
    hidden = where.normal(2, sizes.rows, sizes.hidden)
    weight = where.normal(sizes.classes, sizes.hidden, scale=2 * sizes.hidden**-0.5, seed=1)
    upstream = batch.upstream
    if name == "token_logps":
        signed = torch.arange(2 * sizes.rows, device=where.device).view(2, sizes.rows).remainder(5) - 2.0
        upstream = signed / sizes.rows

    def op(hidden: Tensor, weight: Tensor) -> Tensor:
        if name == "token_logps":
            return vrpo_kernels.token_logps(hidden, weight, batch.tokens, batch.masked, num_wanted=sizes.rows)
        return vrpo_kernels.elbo_from_hidden(
            hidden, weight, batch.tokens, batch.masked, batch.weights, num_masked=sizes.rows
        )

    def formula(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight)
        return batch.logps(logits) if name == "token_logps" else batch.elbo(logits)

    run = {
        "no gradient": lambda: op(hidden, weight),
        "frozen head": lambda: _gradients(lambda leaf: op(leaf, weight), (hidden,), upstream),
        "trained head": lambda: _gradients(op, (hidden, weight), upstream),
    }[mode]
    return Prepared(run, lambda: _check(op, formula, (hidden, weight), upstream))


def _micros() -> list[Micro]:
    found = []
    for mode in ("forward", "forward and backward", "in place"):
        prepare = functools.partial(_prepare_cross_entropy, mode=mode)
        found.append(Micro("cross_entropy", mode, _logits_shape, prepare, needs_extension=True))
    for mode, backward in (("forward", False), ("forward and backward", True)):
        prepare = functools.partial(_prepare_from_logits, backward=backward)
        found.append(Micro("elbo_from_logits", mode, _logits_shape, prepare, needs_extension=True))
    modes = ("no gradient", "frozen head", "trained head")
    for name, mode in itertools.product(("elbo_from_hidden", "token_logps"), modes):
        prepare = functools.partial(_prepare_from_hidden, name=name, mode=mode)
        found.append(Micro(name, mode, _hidden_shape, prepare, needs_extension=True))
    return found


MICROS = _micros()
