"""The VRPO step against public code and a hand assembly, technique by technique, beside what it must cost.

    python -m benchmarks step [--device cuda] [--threads 2] [--weights LoRA] [--quick]
    python -m benchmarks step --figure docs/figures/step_waterfall.png [--output FILE.csv]

Each case (a size, a length mix, so many pairs) is measured by itself. Every variant takes the step once: its
gradient has to be that of public code on the same masks and weights, else the case ends; this run gives the
peak memory, too. Then rounds, in which all variants and the bare products of the floor take turns; the least
of the rounds counts. One row per variant goes to benchmarks/results/step.csv as soon as its case is done.

Columns: S masked copies, T their tokens, N masked rows, fill T over what a padded batch of all holds. ms the
least of the rounds, peak_MiB the growth during the step (CPU: of the resident set, CUDA: of the allocator).
gflop and floor_ms what the step needs (`floors.py`) and what its bare products take at the rates of this run;
mfu_pct the operations at the fastest of these rates; bytes_ms its least traffic at the rate of a copy.
speedup is over public code, speedup_hand over the hand assembly in one batch, at K samples of the paper's
masks. On a CPU the operators of one step of ours by kind go to step_profile.csv beside it.

On a CPU in float32, 1 thread by its own clock; on CUDA LLaDA-8B's shape with LoRA, under bfloat16 autocast,
with activation checkpointing for everybody.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bare_products import BareProducts
from benchmarks.flags import check_device, positive
from benchmarks.record import RESULTS, append, provenance
from benchmarks.step import floors
from benchmarks.step.figure import draw
from benchmarks.step.lengths import MIXES, make_batch
from benchmarks.step.profile import shares
from benchmarks.step.setup import SIZES, WEIGHTS, Models, gradient_error
from benchmarks.step.variants import CACHED, MAX_TOKENS, Stepper, Variant, batched, ladder
from benchmarks.step_timing import free_memory
from benchmarks.timing import clock_name, describe, peak_memory, time_once

OUTPUT, QUICK_OUTPUT = RESULTS / "step.csv", Path("runs/step_quick.csv")
FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads", "clock"),
    *("size", "parameters", "dtype", "weights", "checkpointing", "mix", "pairs", "fill"),
    *("variant", "baseline", "design", "K", "max_tokens", "S", "T", "N", "gradient_error"),
    *("ms", "ms_median", "ms_max", "rounds", "peak_MiB", "speedup", "speedup_hand"),
    *("gflop", "floor_ms", "pct_of_floor", "gflops_bare", "mfu_pct", "bytes_MiB", "bytes_ms", "note"),
)
# (size, mix, pairs)
CPU_CASES = (
    ("1M", "gsm8k", 8),
    ("1M", "ultrafeedback-like", 8),
    ("9M", "gsm8k", 4),
    ("9M", "ultrafeedback-like", 4),
    ("30M", "gsm8k", 2),
)
QUICK_CASES = (("1M", "gsm8k", 2), ("1M", "ultrafeedback-like", 2))
CUDA_CASES = (("LLaDA-8B", "gsm8k", 4), ("LLaDA-8B", "ultrafeedback-like", 2))
PROFILED = "+ small packs"
PROFILE_FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads"),
    *("size", "mix", "pairs", "weights", "variant", "kind", "share"),
)
# Of the gradient, relative: the order of sums differs.
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Measured:
    """A variant's times in ms and the growth of memory in its first step, in MiB."""

    stepper: Stepper
    error: float
    peak_mib: float | None
    samples: list[float]


class Case:
    """One size, mix and number of pairs; `run` measures it."""

    def __init__(self, args: argparse.Namespace, size: str, mix: str, pairs: int):
        self.args, self.name, self.mix = args, size, mix
        self.size = SIZES[size]
        self.batch = make_batch(MIXES[mix](pairs), self.size.mask_token_id)
        self.models: dict[str, Models] = {}

    def run(self) -> None:
        """The gate, the clock, the rows. Errors: RuntimeError for a gradient that is not public code's."""
        args = self.args
        variants = ladder(args.samples, args.fewer, args.max_tokens)
        if args.weights == "LoRA":
            variants |= batched(args.samples, args.max_tokens)
        if args.variants:
            variants = {name: variants[name] for name in variants if name in args.variants}
        found = {name: m for name, m in self._gated(variants).items() if m is not None}
        rates = self._time(found)
        for name, measured in found.items():
            self._row(name, measured, found, rates)
        if args.device == "cpu" and PROFILED in found:
            self._profile(found[PROFILED].stepper)

    def _profile(self, stepper: Stepper) -> None:
        known = provenance("cpu") | {"threads": torch.get_num_threads()}
        case = {"size": self.name, "mix": self.mix, "pairs": self.batch.num_examples}
        known |= case | {"weights": self.args.weights, "variant": PROFILED}
        found = shares(stepper)
        path = self.args.output.with_name(f"{self.args.output.stem}_profile.csv")
        append(
            [known | {"kind": kind, "share": f"{s:.4f}"} for kind, s in found.items()], path, PROFILE_FIELDS
        )
        told = ", ".join(f"{kind} {share:.0%}" for kind, share in found.items())
        print(f"[step] {self.name}, {self.mix}, profile: {told}", flush=True)

    def _models(self, variant: Variant) -> Models:
        if variant.trains not in self.models:
            self.models[variant.trains] = Models(
                self.size,
                self.args.device,
                self.args.weights,
                checkpointing=self.args.device == "cuda",
                top_layers=self.size.layers // 2 if variant.trains == "top" else 0,
            )
        return self.models[variant.trains]

    def _gated(self, variants: dict[str, Variant]) -> dict[str, Measured | None]:
        found: dict[str, Measured | None] = {}
        gradients: dict[str, dict[str, Tensor]] = {}
        for name, variant in variants.items():
            models = self._models(variant)
            stepper = Stepper(variant, models, self.batch)
            stepper.prepare()
            try:
                if models.device == "cuda":
                    stepper()  # compiles
                peak = peak_memory(stepper, models.device)
            except torch.OutOfMemoryError as failure:
                found[name] = None
                self._write({"variant": name, "baseline": variant.baseline, "note": describe(failure)})
                free_memory(models.device)
                continue
            gradient = models.gradients()
            if name in {other.baseline for other in variants.values()}:
                gradients[name] = gradient
            error = gradient_error(gradient, gradients.get(variant.baseline, gradient))
            if not error <= ALLOWED_ERROR[models.dtype]:
                raise RuntimeError(
                    f"{self.name}, {self.mix}: the gradient of {name!r} differs from that of "
                    f"{variant.baseline!r} by {error:.2g} of its norm, allowed are "
                    f"{ALLOWED_ERROR[models.dtype]:.0e}; nothing of this case was timed"
                )
            found[name] = Measured(stepper, error, peak, [])
        return found

    def _time(self, found: dict[str, Measured]) -> dict[str, float]:
        """Fills the samples; rates of the bare products in FLOP/s, and of a copy in bytes/s."""
        args, models = self.args, next(iter(self.models.values()))
        first = next(iter(found.values())).stepper
        counts = floors.Counts.of(first.drawn)
        tokens = min(int(counts.tokens), args.max_tokens)
        rows = max(1, round(tokens * counts.rows / counts.tokens))
        products = BareProducts(self.size, tokens, rows, args.device, models.dtype)
        copied, nbytes = floors.copy_of(args.device)
        bare = {"layer": products.layer, "head": products.head, "copy": copied}
        threads, best = torch.get_num_threads(), dict.fromkeys(bare, float("inf"))

        def clock(run: Callable[[], object]) -> float:
            return time_once(run, args.device, threads)

        started = time.monotonic()
        for count in range(args.rounds):
            if count and time.monotonic() - started > args.seconds:
                break
            for name, run in bare.items():
                best[name] = min(best[name], *(clock(run) for _ in range(3)))
            for measured in found.values():
                measured.samples.append(clock(measured.stepper))
        rates = floors.bare_rates(products, best["layer"], best["head"])
        return rates | {"copy": 1e3 * nbytes / best["copy"]}

    def _row(
        self, name: str, measured: Measured, found: dict[str, Measured], rates: dict[str, float]
    ) -> None:
        stepper, variant = measured.stepper, measured.stepper.variant
        counts, least = floors.Counts.of(stepper.drawn), min(measured.samples)
        work = floors.step_work(variant, stepper.models, counts)
        nbytes, floor = (
            floors.step_bytes(variant, stepper.models, counts),
            floors.floor_ms(work, rates),
        )
        fastest = max(rate for kind, rate in rates.items() if kind != "copy")

        def over(other: str) -> object:
            return min(found[other].samples) / least if other in found else ""

        length_S = stepper.drawn.cu_seqlens_S1.diff()
        self._write(
            {
                "variant": name,
                "baseline": variant.baseline,
                "design": variant.design,
                "K": variant.num_samples,
                "max_tokens": variant.max_tokens if variant.how in ("ours", "one batched pass") else "",
                "S": stepper.drawn.num_segments,
                "T": int(counts.tokens),
                "N": int(counts.rows),
                "fill": counts.tokens / (len(length_S) * stepper.drawn.max_seqlen),
                "gradient_error": f"{measured.error:.1e}",
                "ms": least,
                "ms_median": statistics.median(measured.samples),
                "ms_max": max(measured.samples),
                "rounds": len(measured.samples),
                "peak_MiB": "" if measured.peak_mib is None else measured.peak_mib,
                "speedup": over("public code"),
                "speedup_hand": over("hand assembly"),
                "gflop": 1e-9 * work.flops,
                "floor_ms": floor,
                "pct_of_floor": 100 * floor / least,
                "gflops_bare": 1e-9 * fastest,
                "mfu_pct": 100 * work.flops / (1e-3 * least * fastest),
                "bytes_MiB": nbytes / 2**20,
                "bytes_ms": 1e3 * nbytes / rates["copy"],
            }
        )

    def _write(self, values: dict[str, object]) -> None:
        args, models = self.args, next(iter(self.models.values()))
        threads = torch.get_num_threads()
        known = provenance(args.device) | {"threads": threads, "clock": clock_name(args.device, threads)}
        parameters = sum(weight.numel() for weight in models.base.parameters())
        columns = {
            "size": self.name,
            "parameters": parameters,
            "dtype": str(models.dtype).removeprefix("torch."),
            "weights": args.weights,
            "checkpointing": models.checkpointing,
            "mix": self.mix,
            "pairs": self.batch.num_examples,
        }
        spelled = {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in values.items()}
        append([{**known, **columns, **spelled}], args.output, FIELDS)
        shown = ("ms", "peak_MiB", "speedup", "speedup_hand", "pct_of_floor", "gradient_error", "note")
        told = (f"{key}={spelled[key]}" for key in shown if key in spelled)
        print(f"[step] {self.name}, {self.mix}, {values['variant']}:", *told, flush=True)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="cases of these sizes only")
    parser.add_argument("--mixes", nargs="+", choices=MIXES, help="cases of these length mixes only")
    parser.add_argument("--pairs", type=positive, help="instead of each case's own number")
    parser.add_argument("--weights", choices=WEIGHTS, help="that train; full on a CPU, LoRA on CUDA")
    parser.add_argument("--variants", nargs="+", help="these variants only; public code comes with them")
    parser.add_argument("--samples", type=positive, default=8, help="K of the paper's masks")
    parser.add_argument("--fewer", type=positive, default=4, help="K of the default masks")
    parser.add_argument("--max-tokens", type=positive, help="of our small packs; 2048 on a CPU")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, help="of the clock; 5, quick 2")
    parser.add_argument("--seconds", type=float, default=120, help="of a case, after which no round begins")
    parser.add_argument("--quick", action="store_true", help=f"two pairs, to {QUICK_OUTPUT}")
    parser.add_argument("--output", type=Path, help=f"CSV file, appended to; {OUTPUT.name} of the results")
    parser.add_argument("--figure", type=Path, help="draw the file's rows there and measure nothing")
    parser.add_argument("--size", default="9M", help="of the model that --figure shows")
    args = parser.parse_args(arguments)
    if args.figure is None:
        check_device(parser, args.device)
    args.max_tokens = args.max_tokens or (CACHED if args.device == "cpu" else MAX_TOKENS)
    args.rounds = args.rounds or (2 if args.quick else 5)
    args.output = args.output or (QUICK_OUTPUT if args.quick else OUTPUT)
    args.weights = args.weights or ("LoRA" if args.device == "cuda" else "full")
    if args.variants:
        known = ladder(1, 1, 1) | batched(1, 1)
        unknown = [name for name in args.variants if name not in known]
        if unknown:
            parser.error(f"--variants: {unknown[0]!r} is none of {', '.join(known)}")
        wanted = set(args.variants)
        args.variants = {*wanted, *(known[name].baseline for name in wanted)}
    return args


def cases(args: argparse.Namespace) -> list[tuple[str, str, int]]:
    """(size, mix, pairs) of all cases. Errors: ValueError if none is left."""
    own = QUICK_CASES if args.quick else CPU_CASES if args.device == "cpu" else CUDA_CASES
    if args.sizes and not args.quick and {size for size, _, _ in own}.isdisjoint(args.sizes):
        own = tuple((size, mix, 2) for size in args.sizes for mix in MIXES)
    chosen = [
        (size, mix, args.pairs or pairs)
        for size, mix, pairs in own
        if (not args.sizes or size in args.sizes) and (not args.mixes or mix in args.mixes)
    ]
    if not chosen:
        raise ValueError("no case has one of these --sizes and one of these --mixes")
    return chosen


def main(arguments: Sequence[str]) -> int:
    """Measures, or draws what was measured."""
    args = parse(arguments)
    if args.figure is not None:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(args.output, size=args.size).savefig(args.figure, dpi=110)
        return 0
    torch.set_num_threads(args.threads)
    for case in cases(args):
        Case(args, *case).run()
        free_memory(args.device)
    return 0
