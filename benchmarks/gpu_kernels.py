"""The stage `kernels` of `make gpu`: linear_cross_entropy through its public functions, in all modes.

    python3 -m benchmarks.gpu_kernels [--output DIR] [--until EPOCH] [--skip TASKS] [--warm I/N] [--tiny]

For LLaDA's head (D = 4096, V = 126464) at N = 4096 first, then other N, peaked logits and other heads: every
mode and GEMM form with time beside the bare GEMM of the same moment, memory, errors of nll and gradients
against fp64, and whether two runs give the same bits. Time is written also where the verdict is RED, because
a first session has to learn both. Rows "host included" start on an idle device: a loop whose host does not
run ahead pays that. Rows "sustained" repeat a call without pause for a second, and have its energy. Rows go
to kernels.csv, where the time goes inside one call at N = 4096 to profile.txt.
"""

import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from benchmarks.gpu_bench import BESIDE, SUSTAINED, TIMES, Bench, Task, parse
from benchmarks.gpu_profile import profile
from benchmarks.gpu_truth import ERRORS, Head, Heads, Size
from vrpo_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    plan_linear_cross_entropy,
)

FORMS = ("cublas", "fused")
FIELDS = (
    *("op", "provider", "mode", "gemm", "dtype", "N", "D", "V", "case"),
    *(*TIMES, *BESIDE, "tflops"),
    *(*ERRORS, *SUSTAINED, "note"),
)
KEEP = 2**40  # bytes: always enough for the kept tiles

LLADA, DREAM, LLADA2_MINI = (4096, 126464), (3584, 152064), (2048, 157184)
"""(D, V) of heads."""

HOST_SIZE = Size(512, *LLADA)
BOTH_FORMS = {LLADA[1], DREAM[1]}  # V of the heads that are timed in the other form too


def sizes(bench: Bench) -> list[Size]:
    """In the order of what is learnt from them; for compiling, only those that launch something new."""
    if bench.tiny:
        return [Size(9, 16, 150, peaked=True)]
    if bench.warm:
        heads = (DREAM, LLADA2_MINI)
        return [*(Size(rows, *LLADA) for rows in (4096, 1024, 512, 4100)), *(Size(4096, *h) for h in heads)]
    llada = [Size(rows, *LLADA) for rows in (4096, 1024, 512, 4100, 16384)]
    others = [Size(4096, *LLADA, peaked=True), Size(4096, *DREAM), Size(4096, *LLADA2_MINI)]
    return [*llada, *others]


def other_heads(bench: Bench) -> list[Size]:
    """Heads with a soft-cap or a bias, at the first size."""
    first = sizes(bench)[0]
    return [replace(first, head=head) for head in ("softcap", "bias")]


Result = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]
"""(nll, dhidden, dweight, dbias); None where a gradient was not asked for."""


def _settings(head: Head, gemm: str, bias: Tensor | None) -> dict[str, object]:
    """Keyword arguments of the ops; those of a head only where it has them."""
    settings = {"backend": head.bench.backend, "gemm": gemm}
    if head.size.head != "plain":
        settings |= {"bias": bias, "softcap": head.softcap}
    return settings


def _leaves(head: Head, need_weight: bool) -> tuple[Tensor, Tensor, Tensor | None, list[Tensor]]:
    """hidden, weight, bias, and those of them that want a gradient."""
    hidden, weight = head.hidden.detach().requires_grad_(), head.weight.detach().requires_grad_(need_weight)
    bias = None if head.bias is None else head.bias.detach().requires_grad_(need_weight)
    wanted = [leaf for leaf in (hidden, weight, bias) if leaf is not None and leaf.requires_grad]
    return hidden, weight, bias, wanted


def _result(nll: Tensor, gradients: tuple[Tensor, ...]) -> Result:
    return nll.detach(), *gradients, *[None] * (3 - len(gradients))


def _one_pass(head: Head, gemm: str, need_weight: bool, kept_tile_bytes: int) -> Result:
    hidden, weight, bias, wanted = _leaves(head, need_weight)
    options = {**_settings(head, gemm, bias), "kept_tile_bytes": kept_tile_bytes}
    nll = linear_cross_entropy(hidden, weight, head.targets, **options)
    return _result(nll, torch.autograd.grad(nll, wanted, head.dnll))


def _no_gradient(head: Head, gemm: str) -> Result:
    nll = linear_cross_entropy(head.hidden, head.weight, head.targets, **_settings(head, gemm, head.bias))
    return _result(nll, ())


def _replay(head: Head, gemm: str) -> Result:
    """Both passes: statistics without gradients, then gradients from them."""
    hidden, weight, bias, wanted = _leaves(head, True)
    options = _settings(head, gemm, bias)
    nll, statistics = linear_cross_entropy_statistics(hidden, weight, head.targets, **options)
    value, _drift = linear_cross_entropy_replay(hidden, weight, head.targets, nll, statistics, **options)
    return _result(nll, torch.autograd.grad(value, wanted, head.dnll))


MODES: dict[str, tuple[int, Callable[[Head, str], Result]]] = {
    "no gradient": (1, _no_gradient),
    "frozen head": (2, lambda head, gemm: _one_pass(head, gemm, False, 0)),
    "trained, tiles kept": (3, lambda head, gemm: _one_pass(head, gemm, True, KEEP)),
    "trained, recomputed": (4, lambda head, gemm: _one_pass(head, gemm, True, 0)),
    "replay, both passes": (4, _replay),
}
"""mode -> (matmul units, forward and backward)."""
MODES_OF_OTHER_HEADS = ("no gradient", "frozen head", "trained, tiles kept")


def same_bits(first: Result, second: Result) -> bool:
    """True if two results agree in every bit."""
    pairs = zip(first, second, strict=True)
    return all(torch.equal(a, b) for a, b in pairs if a is not None)


def product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out (fp32) = a @ b for 16-bit factors; PyTorch has that for CUDA only."""
    if a.is_cuda:
        torch.mm(a, b, torch.float32, out=out)
    else:
        torch.mm(a.float(), b.float(), out=out)


class Unit:
    """The unit of a head: hidden @ weight^T by cuBLAS into 16 bits, timed in turn with what refers to it."""

    def __init__(self, head: Head) -> None:
        self.head = head
        self._out: Tensor | None = None

    def __call__(self) -> None:
        if self._out is None:
            self._out = self._empty(self.head.bench.dtype)
        torch.mm(self.head.hidden, self.head.weight.t(), out=self._out)

    def _empty(self, dtype: torch.dtype) -> Tensor:
        size = self.head.size
        return torch.empty(size.rows, size.classes, dtype=dtype, device=self.head.bench.device)

    def measure(self, run: Callable[[], object], units: int, **options) -> dict[str, object]:
        """`Bench.measure_beside` with this unit, and the rate of the work."""
        found = self.head.bench.measure_beside(run, self, units, **options)
        if found["ms_p50"] == "":
            return found
        size = self.head.size
        rate = 2e-9 * units * size.rows * size.hidden * size.classes / float(found["ms_p50"])
        return {**found, "tflops": f"{rate:.1f}"}

    def rows(self) -> list[dict]:
        """The unit against itself, and the same product with fp32 output."""
        wide = self._empty(torch.float32)
        into_fp32 = functools.partial(product, self.head.hidden, self.head.weight.t(), wide)
        runs = (("16 bits", self), ("fp32", into_fp32))
        return [{"provider": f"bare GEMM into {into}", **self.measure(run, 1)} for into, run in runs]


class Problems:
    """The head in use with its unit; another size frees the unit, whose result is large."""

    def __init__(self, bench: Bench) -> None:
        self._heads = Heads(bench)
        self._unit: Unit | None = None

    def get(self, size: Size) -> tuple[Head, Unit]:
        """(head, unit) of this size."""
        if self._unit is None or self._unit.head.size != size:
            self._unit = None
            self._unit = Unit(self._heads.get(size))
        return self._unit.head, self._unit


def mode_row(head: Head, unit: Unit, mode: str, gemm: str) -> dict[str, object]:
    """One mode and form: errors and repeatability first, then time."""
    count, call = MODES[mode]
    errors: dict[str, object] = {}
    if not head.bench.warm:
        first, second = call(head, gemm), call(head, gemm)
        errors = dict(head.errors(*first))
        repeats = same_bits(first, second)
        errors["repeats"] = "same bits" if repeats else "DIFFER"
        if not repeats:
            errors["verdict"] = "RED"
        del first, second
    return {**unit.measure(lambda: call(head, gemm), count), **errors}


def host_row(head: Head, unit: Unit, mode: str, gemm: str) -> dict[str, object]:
    """The same from an idle device: what a loop pays whose host does not run ahead."""
    count, call = MODES[mode]
    return unit.measure(lambda: call(head, gemm), count, ahead=False)


def floor_row(head: Head) -> dict[str, object]:
    """The nll of cuBLAS's fp32 logits under an fp64 softmax: what the tensor cores' sums alone cost."""
    total = torch.full((head.size.rows,), -torch.inf, dtype=torch.float64, device=head.bench.device)
    target = torch.zeros_like(total)
    for first in range(0, head.size.classes, 8192):
        weight = head.weight[first : first + 8192]
        logits = torch.empty(head.size.rows, len(weight), device=head.bench.device)
        product(head.hidden, weight.t(), logits)
        total = torch.logaddexp(total, torch.logsumexp(logits.double(), dim=1))
        inside = (head.targets >= first) & (head.targets < first + len(weight))
        column = (head.targets - first).clamp(0, len(weight) - 1)
        target += torch.where(inside, logits.gather(1, column[:, None])[:, 0].double(), 0.0)
    return head.errors(total - target)


def default_form(bench: Bench) -> str:
    """The GEMM form that a call with gemm="auto" takes."""
    operands = (torch.empty(1, 16, dtype=bench.dtype, device=bench.device) for _ in range(2))
    return plan_linear_cross_entropy(*operands, backend=bench.backend).gemm


class WorkList:
    """The tasks of this stage, in groups."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.problems = bench, Problems(bench)

    def columns(self, size: Size, **more: str) -> dict[str, object]:
        """What is known of a row beforehand."""
        shape = {"N": size.rows, "D": size.hidden, "V": size.classes, "case": size.case}
        return {"op": "linear_cross_entropy", "dtype": self.bench.dtype_name, **shape, **more}

    def modes(self, size: Size, gemm: str, modes: Iterable[str] = MODES) -> Iterator[Task]:
        """Modes in one form."""
        for mode in modes:
            name = f"N={size.rows} D={size.hidden} V={size.classes}, {size.case}: {mode}, {gemm}"
            columns = self.columns(size, provider="vrpo", mode=mode, gemm=gemm)
            yield Task(name, columns, lambda mode=mode: mode_row(*self.problems.get(size), mode, gemm))

    def around(self, size: Size) -> Iterator[Task]:
        """The bare GEMM, and the error that the tensor cores' sums alone make."""
        columns = {**self.columns(size), "op": "mm"}
        yield Task("bare GEMM", columns, lambda: self.problems.get(size)[1].rows())
        provider = "cublas logits, fp64 softmax"
        known = self.columns(size, provider=provider)
        yield Task(provider, known, lambda: floor_row(self.problems.get(size)[0]))

    def host(self, size: Size, gemm: str) -> Iterator[Task]:
        """Every mode from an idle device."""
        for mode in MODES:
            name = f"{mode}, host included"
            columns = self.columns(size, provider="vrpo, host included", mode=mode, gemm=gemm)
            yield Task(name, columns, lambda mode=mode: host_row(*self.problems.get(size), mode, gemm))

    def sustained(self, size: Size, gemm: str) -> Iterator[Task]:
        """The bare GEMM and three modes without pause, with their energy; on CUDA only."""
        modes = ("no gradient", "frozen head", "trained, tiles kept")
        runs: dict[str, Callable[[], object]] = {"": lambda: self.problems.get(size)[1]()}
        for mode in modes:
            runs[mode] = lambda call=MODES[mode][1]: call(self.problems.get(size)[0], gemm)
        for mode, run in runs.items():
            provider = "vrpo, sustained" if mode else "bare GEMM, sustained"
            columns = self.columns(size, provider=provider, mode=mode, gemm=gemm if mode else "")
            columns |= {
                "units": MODES[mode][0] if mode else 1,
                "op": "linear_cross_entropy" if mode else "mm",
            }
            yield Task(f"{provider}, {mode}", columns, lambda run=run: self.bench.sustained(run))

    def profiles(self, size: Size, gemm: str) -> Iterator[Task]:
        """Where the time goes inside one call."""
        path = self.bench.path.with_name("profile.txt")
        for mode, (_units, call) in list(MODES.items())[: 1 if self.bench.tiny else None]:

            def run(mode=mode, call=call):
                head, _unit = self.problems.get(size)
                profile(self.bench, f"{mode}, {gemm}, N={size.rows}", lambda: call(head, gemm), path)

            yield Task(f"profile of {mode}, {gemm}", {"op": "profile", "mode": mode, "gemm": gemm}, run)


def tasks(bench: Bench) -> Iterator[Task]:
    """The work list, a generator: a head is made when its first task runs.

    The default form of every size goes first; both forms of the first size, which the tables compare. Heads
    with a soft-cap or a bias come behind the plain ones, in three modes.
    """
    work, default = WorkList(bench), default_form(bench)
    (other,) = set(FORMS) - {default}
    first, *more = sizes(bench)
    if bench.warm:
        for size, gemm in itertools.product((first, *more), (default, other)):
            yield from work.modes(size, gemm)
        for size in other_heads(bench):
            yield from work.modes(size, default, MODES_OF_OTHER_HEADS)
        return
    yield from work.around(first)
    yield from work.modes(first, default)
    yield from work.modes(first, other)
    for gemm in (default, other):
        yield from work.profiles(first, gemm)
    if bench.device == "cuda":
        yield from work.sustained(first, default)
    for size in more:
        yield from work.around(size)
        yield from work.modes(size, default)
        if size == HOST_SIZE:
            yield from work.host(size, default)
    for size in other_heads(bench):
        yield from work.modes(size, default, MODES_OF_OTHER_HEADS)
    if bench.tiny:
        yield from work.host(first, default)
    for size in more:
        if size.classes in BOTH_FORMS:
            yield from work.modes(size, other)


def main(arguments: list[str] | None = None) -> int:
    """0 if every task ran and every verdict is "ok"."""
    bench = parse(__doc__, "kernels.csv", FIELDS, arguments)
    failed = bench.run(tasks(bench), tasks(bench))
    red = [row for row in bench.rows if row.get("verdict") == "RED"]
    for row in red:
        print("RED:", *(f"{key}={value}" for key, value in row.items() if value not in ("", None)))
    print(f"{len(bench.rows)} rows, {failed} tasks raised, {len(red)} RED")
    return 1 if failed or red else 0


if __name__ == "__main__":
    sys.exit(main())
