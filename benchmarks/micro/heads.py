"""Micro benchmarks of linear_cross_entropy: every mode, the two passes of a replay, a sharded head."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import vrpo_kernels
from benchmarks.micro.micro import Micro, Prepared, Sizes, Where
from vrpo_kernels import testing

KEEP = 2**40  # bytes: always enough for the kept tiles
Call = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden, weight, targets) -> nll."""


@dataclass(frozen=True)
class Problem:
    """hidden (N, D), weight (V, D), targets (N,), upstream (N,) fp32."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor

    @classmethod
    def make(cls, where: Where) -> "Problem":
        """Logits of standard deviation 2, row gradients of both signs over four decades."""
        sizes = where.sizes
        upstream = testing.wide_range_upstream(sizes.rows, torch.Generator().manual_seed(0))
        return cls(
            where.normal(sizes.rows, sizes.hidden),
            where.normal(sizes.classes, sizes.hidden, scale=2 * sizes.hidden**-0.5, seed=1),
            where.integers(sizes.classes, sizes.rows),
            upstream.to(where.device),
        )

    def run(
        self, op: Call, need_hidden: bool, need_weight: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """nll, dhidden, dweight; None where a gradient is not wanted."""
        hidden = self.hidden.detach().requires_grad_(need_hidden)
        weight = self.weight.detach().requires_grad_(need_weight)
        with torch.set_grad_enabled(need_hidden or need_weight):
            nll = op(hidden, weight, self.targets)
        if need_hidden or need_weight:
            nll.backward(self.upstream)
        return nll.detach(), hidden.grad, weight.grad

    def check(self, nll: Tensor, dhidden: Tensor | None, dweight: Tensor | None) -> None:
        """Holds results to the tolerance policy."""
        inputs = (self.hidden, self.weight, self.targets, self.upstream)
        testing.assert_ratios(testing.linear_cross_entropy_ratios(nll, dhidden, dweight, *inputs))


def _shape(sizes: Sizes) -> str:
    return f"N={sizes.rows} D={sizes.hidden} V={sizes.classes}"


def _prepare(where: Where, call: Callable[..., Tensor], need_hidden: bool, need_weight: bool) -> Prepared:
    problem = Problem.make(where)
    run = functools.partial(problem.run, call, need_hidden, need_weight)
    return Prepared(run, lambda: problem.check(*run()))


def _plain(kept_tile_bytes: int) -> Call:
    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return vrpo_kernels.linear_cross_entropy(hidden, weight, targets, kept_tile_bytes=kept_tile_bytes)

    return call


def _statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return vrpo_kernels.linear_cross_entropy_statistics(hidden, weight, targets)[0]


def _prepare_replay(where: Where) -> Prepared:
    """The second pass alone; the first one is made once."""
    problem = Problem.make(where)
    first = vrpo_kernels.linear_cross_entropy_statistics(problem.hidden, problem.weight, problem.targets)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return vrpo_kernels.linear_cross_entropy_replay(hidden, weight, targets, *first)[0]

    run = functools.partial(problem.run, call, True, True)
    return Prepared(run, lambda: problem.check(*run()))


@functools.cache
def _group(device: str) -> "dist.ProcessGroup":
    """A group of this process alone."""
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return dist.group.WORLD


def _prepare_sharded(where: Where, need_hidden: bool, need_weight: bool) -> Prepared:
    group = _group(where.device)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return vrpo_kernels.vocab_parallel_linear_cross_entropy(
            hidden, weight, targets, group=group, first_class=0
        )

    return _prepare(where, call, need_hidden, need_weight)


def _micros() -> list[Micro]:
    name, found = "linear_cross_entropy", []
    for mode, kept, need in (
        ("no gradient", 0, (False, False)),
        ("frozen head", 0, (True, False)),
        ("head only", KEEP, (False, True)),
        ("trained, tiles kept", KEEP, (True, True)),
        ("trained, recomputed", 0, (True, True)),
    ):
        prepare = functools.partial(_prepare, call=_plain(kept), need_hidden=need[0], need_weight=need[1])
        found.append(Micro(name, mode, _shape, prepare, needs_extension=True))
    prepare = functools.partial(_prepare, call=_statistics, need_hidden=False, need_weight=False)
    found.append(Micro(f"{name}_statistics", "forward", _shape, prepare, needs_extension=True))
    found.append(
        Micro(f"{name}_replay", "forward and backward", _shape, _prepare_replay, needs_extension=True)
    )
    for mode, need in (("no gradient", (False, False)), ("trained head", (True, True))):
        prepare = functools.partial(_prepare_sharded, need_hidden=need[0], need_weight=need[1])
        found.append(
            Micro(f"vocab_parallel_{name}", f"one rank, {mode}", _shape, prepare, needs_extension=True)
        )
    return found


MICROS = _micros()
