"""The stage `kernels` of `make gpu`: linear_cross_entropy through its public functions, in all modes.

    python3 -m benchmarks.gpu_kernels [--output DIR] [--until EPOCH] [--skip TASKS] [--warm I/N] [--tiny]

For LLaDA's head (D = 4096, V = 126464) at N = 4096 first, then other N, Dream's head and peaked logits: the
bare GEMM of this run, then every mode and GEMM form with time, memory, errors of nll and gradients against
fp64, and whether two runs give the same bits. Time is written also where the verdict is RED, because a
first session has to learn both. Rows go to kernels.csv, and where the time goes inside one call at N = 4096
to profile.txt.
"""

import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from benchmarks.gpu_bench import TIMES, Bench, Task, parse
from benchmarks.gpu_profile import profile
from benchmarks.gpu_truth import ERRORS, Head, Heads, Size
from vrpo_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
)

FORMS = ("cublas", "fused")
FIELDS = (
    *("op", "provider", "mode", "gemm", "dtype", "N", "D", "V", "case"),
    *(*TIMES, "units", "unit_ms", "pct_of_gemm", "tflops", "predicted_ms"),
    *(*ERRORS, "note"),
)
KEEP = 2**40  # bytes: always enough for the kept tiles

PREDICTED = {
    "no gradient": {512: 0.88, 1024: 1.68, 4096: 6.52, 4100: 7.83, 16384: 25.9},
    "frozen head": {512: 1.71, 1024: 3.30, 4096: 13.0, 4100: 15.6, 16384: 51.8},
    "trained, tiles kept": {512: 2.41, 1024: 4.68, 4096: 18.5, 4100: 21.1, 16384: 73.5},
    "trained, recomputed": {512: 4.37, 1024: 7.31, 4096: 26.3, 4100: 31.1, 16384: 102.0},
}
"""ms for LLaDA's head on an H100 by a model of waves and bandwidth (785 TF/s at full waves, 2.95 TB/s; tiles
of 1024 x 8192; dW as one matmul with 16-bit output), written down before the first run on a GPU."""

LLADA, DREAM = (4096, 126464), (3584, 152064)


def sizes(bench: Bench) -> list[Size]:
    """In the order of what is learnt from them; for compiling, only those that launch something new."""
    if bench.tiny:
        return [Size(9, 16, 150, peaked=True)]
    if bench.warm:
        return [*(Size(rows, *LLADA) for rows in (4096, 1024, 512, 4100)), Size(4096, *DREAM)]
    llada = [Size(rows, *LLADA) for rows in (4096, 1024, 512, 4100, 16384)]
    return [*llada, Size(4096, *DREAM), Size(4096, *LLADA, peaked=True)]


Result = tuple[Tensor, Tensor | None, Tensor | None]
"""(nll, dhidden, dweight); None where a gradient was not asked for."""


def _one_pass(head: Head, gemm: str, need_weight: bool, kept_tile_bytes: int) -> Result:
    hidden, weight = head.hidden.detach().requires_grad_(), head.weight.detach().requires_grad_(need_weight)
    options = {"backend": head.bench.backend, "gemm": gemm, "kept_tile_bytes": kept_tile_bytes}
    nll = linear_cross_entropy(hidden, weight, head.targets, **options)
    wanted = (hidden, weight) if need_weight else (hidden,)
    gradients = torch.autograd.grad(nll, wanted, head.dnll)
    return nll.detach(), gradients[0], gradients[1] if need_weight else None


def _no_gradient(head: Head, gemm: str) -> Result:
    options = {"backend": head.bench.backend, "gemm": gemm}
    return linear_cross_entropy(head.hidden, head.weight, head.targets, **options), None, None


def _replay(head: Head, gemm: str) -> Result:
    """Both passes: statistics without gradients, then gradients from them."""
    options = {"backend": head.bench.backend, "gemm": gemm}
    hidden, weight = head.hidden.detach().requires_grad_(), head.weight.detach().requires_grad_()
    nll, statistics = linear_cross_entropy_statistics(hidden, weight, head.targets, **options)
    value, _drift = linear_cross_entropy_replay(hidden, weight, head.targets, nll, statistics, **options)
    gradients = torch.autograd.grad(value, (hidden, weight), head.dnll)
    return nll.detach(), *gradients


MODES: dict[str, tuple[int, Callable[[Head, str], Result]]] = {
    "no gradient": (1, _no_gradient),
    "frozen head": (2, lambda head, gemm: _one_pass(head, gemm, False, 0)),
    "trained, tiles kept": (3, lambda head, gemm: _one_pass(head, gemm, True, KEEP)),
    "trained, recomputed": (4, lambda head, gemm: _one_pass(head, gemm, True, 0)),
    "replay, both passes": (4, _replay),
}
"""mode -> (matmul units, forward and backward)."""


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


class Units:
    """The unit: hidden @ weight^T by cuBLAS into 16 bits.

    Saved when a size is first met, and timed again beside each figure that refers to it: a GPU at its power
    limit changes its clocks, and a mode is to be compared with the GEMM of its moment.
    """

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._found: dict[Size, float] = {}

    def now(self, head: Head) -> float:
        """Milliseconds of one unit at this moment, the median of five."""
        out = torch.empty(head.size.rows, head.size.classes, dtype=head.bench.dtype, device=self.bench.device)
        run = functools.partial(torch.mm, head.hidden, head.weight.t(), out=out)
        return float(self.bench.measure(run, seconds=0.0)["ms_p50"])

    def save(self, head: Head, when: str) -> None:
        """Times the bare GEMM with 16-bit and with fp32 output."""
        size = head.size
        for dtype, into in ((head.bench.dtype, "16 bits"), (torch.float32, "fp32")):
            out = torch.empty(size.rows, size.classes, dtype=dtype, device=self.bench.device)
            run = functools.partial(torch.mm, head.hidden, head.weight.t(), out=out)
            if dtype is torch.float32:
                run = functools.partial(product, head.hidden, head.weight.t(), out)
            found = self.bench.measure(run, seconds=0.4)
            ms = float(found["ms_p50"])
            if dtype is head.bench.dtype:
                self._found.setdefault(size, ms)
            rate = 2e-9 * size.rows * size.hidden * size.classes / ms
            percent = f"{100 * self._found[size] / ms:.1f}"
            columns = {"op": "mm", "provider": f"bare GEMM into {into}", "mode": when, "units": 1}
            columns |= {"pct_of_gemm": percent, "tflops": f"{rate:.1f}"}
            self.bench.save(**columns, **head.columns(), **found)

    def figures(self, head: Head, units: int, found: dict[str, object]) -> dict[str, object]:
        """The columns that refer to the unit."""
        if self.bench.warm:
            return {}
        if head.size not in self._found:
            self.save(head, "at the start")
        ms, size, unit = float(found["ms_p50"]), head.size, self.now(head)
        rate = 2e-9 * units * size.rows * size.hidden * size.classes / ms
        shown = {"pct_of_gemm": f"{100 * units * unit / ms:.1f}", "tflops": f"{rate:.1f}"}
        return {"units": units, "unit_ms": f"{unit:.4f}", **shown}


def mode_row(head: Head, units: Units, mode: str, gemm: str) -> dict[str, object]:
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
    found = head.bench.measure(lambda: call(head, gemm))
    predicted = ""
    if (head.size.hidden, head.size.classes) == LLADA:
        predicted = PREDICTED.get(mode, {}).get(head.size.rows, "")
    return {**found, **units.figures(head, count, found), **errors, "predicted_ms": predicted}


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


def tasks(bench: Bench) -> Iterator[Task]:
    """The work list, a generator: a head is made when its first task runs."""
    heads, units = Heads(bench), Units(bench)
    for index, size in enumerate(sizes(bench)):

        def columns(size=size, **more) -> dict[str, object]:
            shape = {"N": size.rows, "D": size.hidden, "V": size.classes, "case": size.case}
            return {"op": "linear_cross_entropy", "dtype": bench.dtype_name, **shape, **more}

        for gemm in FORMS:
            for mode in MODES:
                name = f"N={size.rows} D={size.hidden} V={size.classes}, {size.case}: {mode}, {gemm}"

                def run(size=size, mode=mode, gemm=gemm):
                    return mode_row(heads.get(size), units, mode, gemm)

                yield Task(name, columns(provider="vrpo", mode=mode, gemm=gemm), run)
        if bench.warm:
            continue
        provider = "cublas logits, fp64 softmax"
        yield Task(provider, columns(provider=provider), lambda size=size: floor_row(heads.get(size)))
        yield Task("bare GEMM again", {}, lambda size=size: units.save(heads.get(size), "at the end"))
        if index == 0:
            for gemm in FORMS:
                for mode, (_units, call) in list(MODES.items())[: 1 if bench.tiny else None]:

                    def profiled(size=size, call=call, mode=mode, gemm=gemm):
                        head, path = heads.get(size), bench.path.with_name("profile.txt")
                        profile(bench, f"{mode}, {gemm}, N={size.rows}", lambda: call(head, gemm), path)

                    known = {"op": "profile", "mode": mode, "gemm": gemm}
                    yield Task(f"profile of {mode}, {gemm}", known, profiled)


def main(arguments: list[str] | None = None) -> int:
    """0 if every task ran and every verdict is "ok"."""
    bench = parse(__doc__, "kernels.csv", FIELDS, arguments)
    failed = bench.run(tasks(bench))
    red = [row for row in bench.rows if row.get("verdict") == "RED"]
    for row in red:
        print("RED:", *(f"{key}={value}" for key, value in row.items() if value not in ("", None)))
    print(f"{len(bench.rows)} rows, {failed} tasks raised, {len(red)} RED")
    return 1 if failed or red else 0


if __name__ == "__main__":
    sys.exit(main())
