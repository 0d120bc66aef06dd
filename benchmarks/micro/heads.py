"""Micro benchmarks of linear_cross_entropy: every mode and head, metrics, both passes of a replay, shards."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

import vrpo_kernels
from benchmarks.cases import HEADS
from benchmarks.micro.micro import Micro, Prepared, Sizes, Where
from vrpo_kernels import testing

OF_EVERY_HEAD = ("no gradient", "frozen head", "trained, tiles kept")
KEEP = 2**40  # bytes: always enough for the kept tiles
Call = Callable[..., Tensor]
"""(hidden, weight, targets, **settings of the head) -> nll."""


@dataclass(frozen=True)
class Problem:
    """hidden (N, D), weight (V, D), targets (N,), upstream (N,) fp32; bias (V,) or None, soft-cap or None."""

    hidden: Tensor
    weight: Tensor
    targets: Tensor
    upstream: Tensor
    bias: Tensor | None
    softcap: float | None

    @classmethod
    def make(cls, where: Where, head: str = "plain") -> "Problem":
        """Logits of standard deviation 2, row gradients of both signs over four decades."""
        sizes = where.sizes
        upstream = testing.wide_range_upstream(sizes.rows, torch.Generator().manual_seed(0))
        has_bias, softcap = HEADS[head]
        return cls(
            where.normal(sizes.rows, sizes.hidden),
            where.normal(sizes.classes, sizes.hidden, scale=2 * sizes.hidden**-0.5, seed=1),
            where.integers(sizes.classes, sizes.rows),
            upstream.to(where.device),
            where.normal(sizes.classes, seed=2) if has_bias else None,
            softcap,
        )

    def run(self, op: Call, need_hidden: bool, need_weight: bool) -> tuple[Tensor | None, ...]:
        """nll, dhidden, dweight, dbias; None where a gradient is not wanted."""
        hidden = self.hidden.detach().requires_grad_(need_hidden)
        weight = self.weight.detach().requires_grad_(need_weight)
        settings: dict[str, object] = {}  # a plain head is called as before there were others
        if self.bias is not None:
            settings["bias"] = self.bias.detach().requires_grad_(need_weight)
        if self.softcap is not None:
            settings["softcap"] = self.softcap
        with torch.set_grad_enabled(need_hidden or need_weight):
            nll = op(hidden, weight, self.targets, **settings)
        if need_hidden or need_weight:
            nll.backward(self.upstream)
        dbias = None if self.bias is None else settings["bias"].grad
        return nll.detach(), hidden.grad, weight.grad, dbias

    def check(
        self, nll: Tensor, dhidden: Tensor | None, dweight: Tensor | None, dbias: Tensor | None
    ) -> None:
        """Holds results to the tolerance policy."""
        inputs = (self.hidden, self.weight, self.targets, self.upstream)
        head = {} if self.bias is None else {"bias": self.bias, "dbias": dbias}
        head |= {} if self.softcap is None else {"softcap": self.softcap}
        ratios = testing.linear_cross_entropy_ratios(nll, dhidden, dweight, *inputs, **head)
        testing.assert_ratios(ratios)


def _shape(sizes: Sizes) -> str:
    return f"N={sizes.rows} D={sizes.hidden} V={sizes.classes}"


def _prepare(
    where: Where, call: Callable[..., Tensor], need_hidden: bool, need_weight: bool, head: str = "plain"
) -> Prepared:
    problem = Problem.make(where, head)
    run = functools.partial(problem.run, call, need_hidden, need_weight)
    return Prepared(run, lambda: problem.check(*run()))


def _keeping(kept_tile_bytes: int) -> Call:
    def call(hidden: Tensor, weight: Tensor, targets: Tensor, **settings: object) -> Tensor:
        options = {**settings, "kept_tile_bytes": kept_tile_bytes}
        return vrpo_kernels.linear_cross_entropy(hidden, weight, targets, **options)

    return call


def _statistics(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return vrpo_kernels.linear_cross_entropy_statistics(hidden, weight, targets)[0]


def _prepare_metrics(where: Where) -> Prepared:
    """Value and row metrics, without gradients."""
    problem = Problem.make(where)

    def run() -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        return vrpo_kernels.linear_cross_entropy(
            problem.hidden, problem.weight, problem.targets, return_metrics=True
        )

    def check() -> None:
        nll, (entropy, log_sum_exp, top1) = run()
        problem.check(nll, None, None, None)
        exact = (torch.float64, torch.float32)
        truth, baseline = (problem.hidden.to(dtype) @ problem.weight.to(dtype).T for dtype in exact)
        floor = testing.fp32_floor(where.dtype, where.sizes.hidden)
        ratios = {}
        for name, found, formula in (
            ("entropy", entropy, lambda z: torch.special.entr(z.softmax(1)).sum(1)),
            ("log_sum_exp", log_sum_exp, lambda z: z.logsumexp(1)),
        ):
            ratios[name] = testing.fp32_error_ratio(found, formula(truth), formula(baseline), floor)
        testing.assert_ratios(ratios)
        testing.assert_bitwise_equal(top1, truth.argmax(1) == problem.targets, "top1")

    return Prepared(run, check)


def _prepare_replay(where: Where) -> Prepared:
    """The second pass alone; the first one is made once."""
    problem = Problem.make(where)
    first = vrpo_kernels.linear_cross_entropy_statistics(problem.hidden, problem.weight, problem.targets)

    def call(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return vrpo_kernels.linear_cross_entropy_replay(hidden, weight, targets, *first)[0]

    run = functools.partial(problem.run, call, True, True)
    return Prepared(run, lambda: problem.check(*run()))


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

    def add(op: str, mode: str, prepare: Callable[[Where], Prepared]) -> None:
        found.append(Micro(op, mode, _shape, prepare, needs_extension=True))

    for mode, kept, need in (
        ("no gradient", 0, (False, False)),
        ("frozen head", 0, (True, False)),
        ("head only", KEEP, (False, True)),
        ("trained, tiles kept", KEEP, (True, True)),
        ("trained, recomputed", 0, (True, True)),
    ):
        options = {"call": _keeping(kept), "need_hidden": need[0], "need_weight": need[1]}
        for head in HEADS if mode in OF_EVERY_HEAD else ("plain",):
            shown = mode if head == "plain" else f"{mode}, {head}"
            add(name, shown, functools.partial(_prepare, head=head, **options))
    add(name, "no gradient, metrics", _prepare_metrics)
    options = {"call": _statistics, "need_hidden": False, "need_weight": False}
    add(f"{name}_statistics", "forward", functools.partial(_prepare, **options))
    add(f"{name}_replay", "forward and backward", _prepare_replay)
    for mode, need in (("no gradient", (False, False)), ("trained head", (True, True))):
        prepare = functools.partial(_prepare_sharded, need_hidden=need[0], need_weight=need[1])
        add(f"vocab_parallel_{name}", f"one rank, {mode}", prepare)
    return found


MICROS = _micros()
