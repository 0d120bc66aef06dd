"""How time and memory of a VRPO step grow: measured here, and modelled for LLaDA-8B on H100s.

    python -m benchmarks scaling [--quick] [--device cuda] [--axes samples depth ...]
    python -m benchmarks scaling --figure docs/figures/step_growth.png

From a centre one axis at a time: K, length of the responses, pairs, vocabulary, width, depth, and on a CPU
one and two processes. A step is reference, policy, loss and backward pass in one graph, all weights trained,
without the optimizer; float32 on a CPU, bfloat16 on CUDA. Before anything is measured, the gradient at the
centre is that of the objective as it is written down: sample by sample, full logits, float64 (float32 on
CUDA); and two processes have the gradient of one, or no figure. Rows of benchmarks/results/scaling.csv:

kind = measured: the fastest of rounds in which the points of an axis take turns, and beside it
    gflop         the cost model's arithmetic (vrpo.planning) of one process
    gemm_gflops   rate of the bare products of this point's sizes, torch.mm, in the same rounds
    floor_ms      gflop at that rate; pct_of_floor: how much of the measured time it is
    peak_MiB      growth above the weights, of tensors alone; model_MiB: the cost model's
kind = modelled: the cost model alone, no clock; K, length, ... of one LLaDA-8B, by LoRA on one H100 or all
    weights on eight; model_ms_least and model_ms_most per step of 64 pairs, model_MiB of one GPU, all of it.
    On CUDA measured rows have the model's times too, of the step without the optimizer.

--figure draws the last rows of each axis in the file and measures nothing.
"""

import argparse
import csv
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import scaling_h100
from benchmarks.bare_products import BareProducts
from benchmarks.flags import check_device, positive
from benchmarks.memory_steps import peak_of_tensors
from benchmarks.record import RESULTS, append, check_columns, provenance
from benchmarks.scaling_processes import PROCESSES, measure_processes
from benchmarks.scaling_steps import AXES, Modelled, Point, Step, modelled, shape_of
from benchmarks.step_setup import LLADA_8B, Size
from benchmarks.step_timing import free_memory
from benchmarks.timing import Timing, clock_name, describe, interleaved
from vrpo.planning import ModelShape

OUTPUT, QUICK_OUTPUT = RESULTS / "scaling.csv", Path("runs/scaling_quick.csv")
FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads", "dtype"),
    *("kind", "axis", "value", "setup", "layers", "hidden", "mlp", "vocabulary"),
    *("prompt", "response", "K", "pairs", "processes", "parameters", "tokens", "rows"),
    *("gflop", "gemm_gflops", "floor_ms", "ms", "ms_median", "pct_of_floor", "rounds", "clock"),
    *("peak_MiB", "model_MiB", "model_ms_least", "model_ms_most", "gradient_error", "note"),
)
ALLOWED_ERROR = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


def _size(layers: int, hidden: int, classes: int, prompt: int, response: int) -> Size:
    heads, mlp = max(1, hidden // 64), 3 * hidden
    return Size(layers, hidden, heads, mlp, classes, classes - 1, prompt, response, (0, 0, 0, 0), gemm=0)


CENTRE = Point(_size(4, 256, 4096, 64, 128), num_samples=4, pairs=2)
VALUES = {
    "samples": (1, 2, 4, 8, 16),
    "response": (32, 64, 128, 256, 512),
    "pairs": (1, 2, 4, 8),
    "vocabulary": (1024, 4096, 16384, 65536),
    "width": (64, 128, 256, 512),
    "depth": (1, 2, 4, 8, 16),
    "processes": PROCESSES,
}
QUICK_CENTRE = Point(_size(2, 128, 1024, 32, 32), num_samples=2, pairs=2)
QUICK_VALUES = {
    "samples": (1, 2, 4),
    "response": (16, 32, 64),
    "pairs": (1, 2, 4),
    "vocabulary": (512, 1024, 4096),
    "width": (64, 128, 256),
    "depth": (1, 2, 4),
    "processes": PROCESSES,
}
# Four layers of LLaDA-8B and its head, so that axes fit one GPU with all weights trained.
CUDA_CENTRE = Point(replace(LLADA_8B, layers=4), num_samples=2, pairs=1)
CUDA_VALUES = {
    "samples": (1, 2, 4),
    "response": (256, 512, 1024),
    "pairs": (1, 2),
    "vocabulary": (32768, 126464),
    "width": (2048, 4096),
    "depth": (2, 4, 8),
}
CUDA_QUICK_VALUES = {"samples": (1, 2)}


class Bench:
    """The device, the centre and the file of one run."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, args.device
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.provenance = provenance(self.device) | {
            "threads": args.threads,
            "dtype": str(self.dtype).removeprefix("torch."),
        }

    def run(self) -> None:
        """The gate, then axis by axis: an axis that is measured is in the file."""
        error = self.check()
        for axis in self.args.axes:
            if axis == "processes":
                self.processes()
            else:
                self.axis(axis, error)
            self.modelled(axis)

    def check(self) -> float:
        """The error of the centre's gradient. RuntimeError if it is beyond what rounding does."""
        step = Step(self.args.centre, self.device, self.dtype)
        error = step.gradient_error()
        del step
        free_memory(self.device)
        return self._allowed(
            "the gradient at the centre", "the plain objective's; nothing is measured", error
        )

    def _allowed(self, what: str, wanted: str, error: float) -> float:
        allowed = ALLOWED_ERROR[self.dtype]
        if not error <= allowed:
            raise RuntimeError(f"{what} is {error:.2g} of its norm (allowed {allowed:.0e}) off {wanted}")
        return error

    def axis(self, axis: str, error: float) -> None:
        """The rows of all points of an axis, in turns."""
        args, runs, built, peaks, notes = self.args, {}, {}, {}, {}
        for value in args.values[axis]:
            point = args.centre.at(axis, value)
            try:
                step = Step(point, self.device, self.dtype)
                peaks[value] = peak_of_tensors(step, self.device) / 2**20
                step.forget()
            except torch.OutOfMemoryError as failure:
                notes[value] = describe(failure)
                continue
            bare = BareProducts(
                point.size, len(step.pack.tokens_T), len(step.pack.row_N), self.device, self.dtype
            )
            built[value] = step, bare
            runs |= {f"{value}": step, f"{value} layer": bare.layer, f"{value} head": bare.head}
        timings = interleaved(
            runs,
            device=self.device,
            threads=args.threads,
            repeats=args.rounds,
            deadline=time.monotonic() + args.seconds,
            keep_going=True,
            memory=False,
        )
        for value, (step, bare) in built.items():
            timing, products = timings[f"{value}"], [timings[f"{value} {name}"] for name in ("layer", "head")]
            pack = step.pack
            columns = {"tokens": len(pack.tokens_T), "rows": len(pack.row_N), "peak_MiB": peaks[value]}
            if step.point == args.centre:
                columns["gradient_error"] = error
            model = modelled(step.point, len(pack.row_N), self.dtype, self.device)
            if timing.failure:
                notes[value] = timing.failure
            else:
                rate = bare.gflops(*(min(product.samples) for product in products))
                clock = clock_name(self.device, args.threads)
                columns |= self._times(timing, model, rate) | {"clock": clock}
            self.measured(axis, step.point, model, columns | {"note": notes.get(value, "")})
        for value in sorted(notes.keys() - built.keys()):
            point = args.centre.at(axis, value)
            self.measured(axis, point, None, {"note": notes[value]})
        del runs, built, timings
        free_memory(self.device)

    def _times(self, timing: Timing, model: Modelled, rate: float) -> dict[str, object]:
        ms, floor = min(timing.samples), 1e3 * model.gflop / rate
        columns = {
            "gemm_gflops": rate,
            "floor_ms": floor,
            "ms": ms,
            "ms_median": timing.quantile(0.5),
            "pct_of_floor": 100 * floor / ms,
            "rounds": len(timing.samples),
        }
        if self.device == "cuda":
            least, most = model.seconds_on_h100
            columns |= {"model_ms_least": 1e3 * least, "model_ms_most": 1e3 * most}
        return columns

    def processes(self) -> None:
        """The rows of one and two processes, by the wall clock."""
        centre = self.args.centre
        found = measure_processes(centre, self.args.rounds, self.args.seconds)
        error = found["2"]["gradient_error"]
        self._allowed("the gradient of two processes", "that of one; no row is written", error)
        pack = centre.pack(centre.batch())
        for processes in PROCESSES:
            point, own = centre.at("processes", processes), found[str(processes)]
            model = modelled(point, len(pack.row_N), self.dtype, "cpu")
            columns = {"tokens": len(pack.tokens_T), "rows": len(pack.row_N), "clock": "wall"}
            columns |= {"peak_MiB": own["peak_MiB"], "gradient_error": error if processes > 1 else None}
            columns |= self._times(Timing(own["ms"]), model, own["gflops"])
            self.measured("processes", point, model, columns)

    def measured(self, axis: str, point: Point, model: Modelled | None, columns: dict[str, object]) -> None:
        """One row of a point; model: None where not even the draw was made."""
        shape = shape_of(point.size)
        known = {} if model is None else {"gflop": model.gflop, "model_MiB": model.mib}
        sizes = {"prompt": point.size.prompt, "response": point.size.response, "K": point.num_samples}
        sizes |= {"pairs": point.pairs, "processes": point.processes}
        self._row("measured", axis, point.value(axis), "full", shape, sizes | known | columns)

    def modelled(self, axis: str) -> None:
        """The rows of LLaDA-8B on H100s; no time where it does not fit."""
        for name, value, plan in scaling_h100.plans(axis):
            setup, notes = plan.setup, ["replay"] if plan.setup.replays else []
            arithmetic = sum(plan.flops.values()) - plan.flops["attention"]  # which is in the others
            columns = {
                "prompt": setup.prompt_length,
                "response": setup.response_length,
                "K": setup.num_samples,
                "pairs": setup.pairs_per_step,
                "processes": plan.machine.num_gpus,
                "gflop": 1e-9 * arithmetic,
                "model_MiB": plan.peak_gib * 2**10,
            }
            if plan.fits:
                columns["model_ms_least"], columns["model_ms_most"] = (1e3 * s for s in plan.seconds)
            else:
                notes.append("does not fit")
            columns["note"] = ", ".join(notes)
            self._row("modelled", axis, value, name, plan.shape, columns)

    def _row(
        self,
        kind: str,
        axis: str,
        value: int,
        setup: str,
        shape: ModelShape,
        columns: dict[str, object],
    ) -> None:
        where = self.provenance if kind == "measured" else self._modelled_where(setup)
        row = {
            "kind": kind,
            "axis": axis,
            "value": value,
            "setup": setup,
            "layers": shape.num_layers,
            "hidden": shape.hidden_size,
            "mlp": shape.intermediate_size,
            "vocabulary": shape.vocab_size,
            "parameters": shape.total_parameters,
        } | {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in columns.items()}
        append([where | row], self.args.output, FIELDS)
        if kind == "measured":
            shown = ("floor_ms", "ms", "pct_of_floor", "peak_MiB", "model_MiB", "note")
            print(f"[{axis} {value}]", *(f"{key}={row[key]}" for key in shown if row.get(key)), flush=True)

    def _modelled_where(self, setup: str) -> dict[str, object]:
        """Provenance of figures of no machine: when and of which revision."""
        known = {name: self.provenance[name] for name in ("date", "git", "dirty")}
        dtype = "bfloat16" if setup == "LoRA" else "float32 under autocast"
        return known | {"device": "H100, modelled", "dtype": dtype}


def last_rows(path: Path) -> list[dict[str, str]]:
    """Of each kind and axis the rows of the last run. Errors: ValueError if there are none."""
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    last = {(row["kind"], row["axis"]): row["date"] for row in rows}
    if not last:
        raise ValueError(f"{path} has no rows")
    return [row for row in rows if row["date"] == last[row["kind"], row["axis"]]]


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line; centre and values depend on the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks scaling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="a smaller centre and two rounds, a minute")
    parser.add_argument("--axes", nargs="+", choices=AXES, help="some only")
    parser.add_argument("--threads", type=positive, default=1)
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument(
        "--seconds", type=positive, default=25, help="of an axis; no further round after them"
    )
    parser.add_argument("--output", type=Path, help=f"CSV file; with --quick {QUICK_OUTPUT}")
    parser.add_argument("--figure", type=Path, help="draw the file's rows there and measure nothing")
    args = parser.parse_args(arguments)
    args.output = args.output or (QUICK_OUTPUT if args.quick else OUTPUT)
    if args.figure is not None:
        return args
    check_device(parser, args.device)
    if args.device == "cuda":
        args.centre, args.values = CUDA_CENTRE, CUDA_QUICK_VALUES if args.quick else CUDA_VALUES
    else:
        args.centre, args.values = (QUICK_CENTRE, QUICK_VALUES) if args.quick else (CENTRE, VALUES)
    args.axes = args.axes or list(args.values)
    for axis in args.axes:
        if axis not in args.values:
            parser.error(f"--axes {axis} is not measured on {args.device}: {', '.join(args.values)} are")
    args.rounds = min(args.rounds, 2) if args.quick else args.rounds
    return args


def main(arguments: Sequence[str]) -> int:
    """Measures, or draws what was measured."""
    args = parse(arguments)
    if args.figure is not None:
        from benchmarks.scaling_figure import draw

        args.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(last_rows(args.output)).savefig(args.figure, dpi=110)
        return 0
    check_columns(args.output, FIELDS)
    torch.set_num_threads(args.threads)
    Bench(args).run()
    return 0
