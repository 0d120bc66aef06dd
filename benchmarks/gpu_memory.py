"""The stage `memory` of `make gpu`: the kernels that move bytes, against the copy bandwidth of this run.

    python3 -m benchmarks.gpu_memory [--output DIR] [--until EPOCH] [--skip TASKS] [--warm I/N] [--tiny]

cross_entropy of logits, mask_select beside a loop over torch.randperm, pack_masked, token_weight_sums and
gather_rows. Bytes are those that have to move (each input read and each output written once per pass). Rows
go to memory.csv.
"""

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.gpu_bench import TIMES, Bench, Task, parse
from vrpo_kernels.cross_entropy import cross_entropy
from vrpo_kernels.mask_select import mask_select
from vrpo_kernels.pack_masked import pack_masked, token_weight_sums
from vrpo_kernels.rows import gather_rows

FIELDS = (
    *("op", "mode", "dtype", "case", "N", "V"),
    *(*TIMES, "MB", "GB_per_s", "pct_of_copy", "Gpositions_per_s", "note"),
)
NUM_SAMPLES, PROMPT = 8, 64
MOST_LOOPED = 64  # segments of the largest loop over torch.randperm


@dataclass(frozen=True)
class Sizes:
    """How much is moved. segments: (segments, positions of each)."""

    copy: int
    rows: int
    classes: int
    segments: tuple[tuple[int, int], ...]
    tokens: int
    masked: int
    hidden: int


SEGMENTS = ((64, 512), (64, 4096), (4096, 4096), (65536, 512), (8, 65536))
FULL = Sizes(2**29, 4096, 126464, SEGMENTS, 65536, 16384, 4096)
TINY = Sizes(2**10, 5, 300, ((8, 20),), 40, 10, 16)


class Bandwidth:
    """Bytes per second of a device copy, read plus written; measured when it is first asked for."""

    def __init__(self, bench: Bench, numel: int) -> None:
        self.bench, self.numel = bench, numel
        self._rate: float | None = None

    def rate(self) -> float:
        if self._rate is None:
            # Zeros would be moved with less power, and so faster, than real data.
            source = torch.randn(self.numel, device=self.bench.device).to(self.bench.dtype)
            target = torch.empty_like(source)
            found = self.bench.measure(lambda: target.copy_(source))
            moved = 2 * source.numel() * source.element_size()
            self._rate = 1e3 * moved / float(found["ms_p50"])
            self.bench.save(op="copy", mode="roof", N=self.numel, **found, **self._figures(moved, found))
        return self._rate

    def _figures(self, moved: int, found: dict) -> dict[str, str]:
        speed = 1e3 * moved / float(found["ms_p50"])
        percent = f"{100 * speed / self._rate:.1f}"
        return {"MB": f"{moved / 1e6:.1f}", "GB_per_s": f"{speed / 1e9:.1f}", "pct_of_copy": percent}

    def row(self, run: Callable[[], object], moved: int, positions: int = 0) -> dict[str, object]:
        """Times `run`, which has to move `moved` bytes and looks at `positions` positions."""
        found = self.bench.measure(run, seconds=0.1)
        if self.bench.warm:
            return {}
        self.rate()
        figures = self._figures(moved, found)
        if positions:
            figures["Gpositions_per_s"] = f"{1e-6 * positions / float(found['ms_p50']):.2f}"
        return {**found, **figures}


def size_of(*tensors: Tensor) -> int:
    """Bytes of these tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Logits:
    """Inputs of cross_entropy."""

    def __init__(self, bench: Bench, sizes: Sizes) -> None:
        options = {"device": bench.device}
        self.logits = torch.randn(sizes.rows, sizes.classes, **options).to(bench.dtype)
        self.targets = torch.randint(sizes.classes, (sizes.rows,), **options)
        self.dnll = torch.randn(sizes.rows, **options)
        self.options = {"backend": bench.backend}

    def forward(self) -> Tensor:
        return cross_entropy(self.logits, self.targets, **self.options)

    def both(self) -> Tensor:
        """(N, V) gradient."""
        leaf = self.logits.detach().requires_grad_()
        nll = cross_entropy(leaf, self.targets, **self.options)
        return torch.autograd.grad(nll, leaf, self.dnll)[0]


class Draw:
    """Inputs of the masking ops: equal segments, half of each masked, K samples per response."""

    def __init__(self, bench: Bench, segments: int, length: int) -> None:
        options = {"dtype": torch.int64, "device": bench.device}
        self.length = torch.full((segments,), length, **options)
        self.counter = torch.arange(3 * segments, **options).view(segments, 3)
        self.first = torch.zeros(segments, **options)
        self.half = self.length // 2
        self.half_word = torch.full((segments,), 2**31, **options)
        self.response = torch.full((segments // NUM_SAMPLES,), length, **options)
        self.prompt = torch.full_like(self.response, PROMPT)
        tokens = (segments // NUM_SAMPLES) * (PROMPT + length)
        self.tokens = torch.randint(1, 30_000, (tokens,), **options)
        self.options = {"backend": bench.backend}
        self.positions = segments * length

    def by_rank(self) -> tuple[Tensor, Tensor]:
        total = len(self.length) * (int(self.positions) // len(self.length) // 2)
        draw = (self.length, self.counter, self.first, self.half)
        return mask_select(*draw, seed=7, by_rank=True, num_rows=total, **self.options)

    def by_word(self, num_rows: int | None) -> tuple[Tensor, Tensor]:
        draw = (self.length, self.counter, self.first, self.half_word)
        return mask_select(*draw, seed=7, by_rank=False, num_rows=num_rows, **self.options)

    def randperm_loop(self) -> tuple[Tensor, Tensor]:
        """The rival of `by_rank`: one torch.randperm per segment, not reproducible elsewhere."""
        half, options = int(self.positions) // len(self.length) // 2, {"device": self.length.device}
        length = int(self.positions) // len(self.length)
        chosen = [torch.randperm(length, **options)[:half].sort().values for _ in range(len(self.length))]
        offsets = torch.arange(0, half * len(chosen) + 1, half, **options)
        return torch.cat(chosen), offsets

    @functools.cached_property
    def masked(self) -> tuple[Tensor, Tensor]:
        """(position_N, offsets_S1)."""
        return self.by_rank()

    def pack(self) -> tuple[Tensor, ...]:
        batch = (self.tokens, self.prompt, self.response, *self.masked)
        return tuple(pack_masked(*batch, num_samples=NUM_SAMPLES, mask_token_id=0, **self.options))

    @functools.cached_property
    def weight(self) -> Tensor:
        return torch.ones(len(self.masked[0]), device=self.length.device)

    def sums(self) -> tuple[Tensor, Tensor]:
        rows = (self.weight, *self.masked, self.response)
        total = self.positions // NUM_SAMPLES
        return token_weight_sums(*rows, num_samples=NUM_SAMPLES, num_tokens=total, **self.options)


def logits_tasks(bench: Bench, roof: Bandwidth, sizes: Sizes) -> Iterator[Task]:
    """cross_entropy: one pass forward; backward reads again and writes."""
    held: list[Logits] = []

    def row(passes: int, name: str) -> dict[str, object]:
        if not held:
            held.append(Logits(bench, sizes))
        return roof.row(getattr(held[0], name), passes * size_of(held[0].logits))

    columns = {"op": "cross_entropy", "dtype": bench.dtype_name, "N": sizes.rows, "V": sizes.classes}
    for mode, passes, name in (("forward", 1, "forward"), ("forward and backward", 3, "both")):
        yield Task(f"cross_entropy {mode}", {**columns, "mode": mode}, functools.partial(row, passes, name))
    held.clear()
    bench.clear()


def draw_tasks(bench: Bench, roof: Bandwidth, segments: int, length: int) -> Iterator[Task]:
    """The masking ops on one batch."""
    case = {"case": f"{segments} segments of {length}", "N": segments * length // 2}

    @functools.cache
    def draw() -> Draw:
        return Draw(bench, segments, length)

    def by_rank() -> dict[str, object]:
        d = draw()
        moved = size_of(d.length, d.counter, d.first, d.half, *d.by_rank())
        return roof.row(d.by_rank, moved, d.positions)

    def loop() -> dict[str, object]:
        d = draw()
        return roof.row(d.randperm_loop, size_of(*d.randperm_loop()), d.positions)

    def by_word(known: bool) -> dict[str, object]:
        d = draw()
        found = d.by_word(None)
        rows = len(found[0]) if known else None
        moved = size_of(d.length, d.counter, d.first, d.half_word, *found)
        return roof.row(lambda: d.by_word(rows), moved, d.positions)

    def pack() -> dict[str, object]:
        d = draw()
        return roof.row(d.pack, size_of(d.tokens, *d.masked, *d.pack()), d.positions)

    def sums() -> dict[str, object]:
        d = draw()
        return roof.row(d.sums, size_of(d.weight, *d.masked, *d.sums()), d.positions)

    rival = (("torch.randperm", "loop over the segments", loop),) if segments <= MOST_LOOPED else ()
    for op, mode, run in (
        ("mask_select", "by rank", by_rank),
        *rival,
        ("mask_select", "by word, number of rows known", functools.partial(by_word, True)),
        ("mask_select", "by word, number of rows asked for", functools.partial(by_word, False)),
        ("pack_masked", f"{NUM_SAMPLES} samples", pack),
        ("token_weight_sums", f"{NUM_SAMPLES} samples", sums),
    ):
        yield Task(f"{op} {mode}, {case['case']}", {"op": op, "mode": mode, **case}, run)


def gather_tasks(bench: Bench, roof: Bandwidth, sizes: Sizes) -> Iterator[Task]:
    """gather_rows: N rows out of T, and back into zeros."""

    def run() -> dict[str, object]:
        hidden = torch.randn(sizes.tokens, sizes.hidden, device=bench.device).to(bench.dtype)
        row_N = torch.arange(0, sizes.tokens, sizes.tokens // sizes.masked, device=bench.device)
        hidden.requires_grad_()
        dhidden = hidden.detach()[: len(row_N)].clone()

        def both() -> Tensor:
            return torch.autograd.grad(gather_rows(hidden, row_N), hidden, dhidden)[0]

        # Forward reads and writes N rows; backward reads N, writes T zeros and N rows.
        return roof.row(both, 4 * size_of(dhidden) + size_of(hidden) + 2 * size_of(row_N))

    case = f"{sizes.masked} of {sizes.tokens} rows, D = {sizes.hidden}"
    columns = {"op": "gather_rows", "mode": "forward and backward", "case": case, "dtype": bench.dtype_name}
    yield Task(f"gather_rows {case}", {**columns, "N": sizes.masked}, run)


def tasks(bench: Bench) -> Iterator[Task]:
    """The work list."""
    sizes = TINY if bench.tiny else FULL
    roof = Bandwidth(bench, sizes.copy)
    yield from logits_tasks(bench, roof, sizes)
    yield from gather_tasks(bench, roof, sizes)
    for segments, length in sizes.segments:
        yield from draw_tasks(bench, roof, segments, length)


def main(arguments: list[str] | None = None) -> int:
    """0 if every task ran."""
    bench = parse(__doc__, "memory.csv", FIELDS, arguments)
    failed = bench.run(tasks(bench), tasks(bench))
    print(f"{len(bench.rows)} rows, {failed} tasks raised")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
