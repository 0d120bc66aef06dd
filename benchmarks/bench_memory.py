"""Peak memory of one training step against K, and what a replay costs: gradient_mode joint and replay.

    python -m benchmarks memory [--device cuda] [--samples 1 2 4 ...] [--repeats 7] [--output FILE.csv]
    python -m benchmarks memory --figure docs/figures/memory.png [--output FILE.csv]

One pair, one pack of 2 masked copies (--segments-per-pack), all weights trained or LoRA (r = 16), with and
without gradient checkpointing; reference, policy, loss and backward pass, no optimizer. Sizes: on a CPU a
model of 4 layers in float32, on CUDA LLaDA-8B's shape in bfloat16. First the gate: each mode has the joint
gradient, else nothing is measured. Then, each row written as soon as it is there:

1. memory, for every K: peak_MiB is the growth during the step, of tensors alone (CPU: every allocation, by
   the profiler; CUDA: the allocator's peak); gradients_MiB of it are the gradients; rss_MiB the growth of the
   process as the kernel sees it; base_MiB the weights, which were there before; pack_KiB all masked copies on
   the CPU, the one thing that must grow with K
2. time, at --time-samples in two packs: the modes in turns, least of the rounds; cost_pct over joint.
   "replay, head anew" computes the logits in its second pass again, which a replay does not: its first pass
   left the log-sum-exps. Once more with a wide head.

--figure draws the memory rows of the file instead. What does not fit is a row with a note.
"""

import argparse
import csv
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.memory_steps import (
    MODES,
    SEGMENTS_PER_PACK,
    SIZES,
    WEIGHTS,
    Packs,
    Training,
    make_packs,
    peak_of_tensors,
    size_of,
)
from benchmarks.record import RESULTS, append, provenance
from benchmarks.step_timing import forget_gradients, free_memory
from benchmarks.timing import clock_name, describe, interleaved, peak_memory

OUTPUT = RESULTS / "step_memory.csv"
FIELDS = (
    *("date", "git", "dirty", "device", "torch", "triton", "threads"),
    *("what", "size", "dtype", "weights", "checkpointing", "mode", "K", "T", "N", "packs", "pack_tokens"),
    *("base_MiB", "peak_MiB", "gradients_MiB", "rss_MiB", "pack_KiB"),
    *("ms_min", "ms_median", "cost_pct", "rounds", "clock", "gradient_error", "note"),
)
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
GATE_SAMPLES = 2
TIME_SEGMENTS_PER_PACK = 8  # as many as a device is busy with: small packs cost launches, not arithmetic
# Of the gradient, relative: rounding differs with the cut.
ALLOWED_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


class Bench:
    """The device, the sizes and the file of one run."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.device = args, args.device
        self.dtype = torch.bfloat16 if self.device == "cuda" else torch.float32
        self.provenance = provenance(self.device) | {"threads": torch.get_num_threads()}

    def run(self) -> None:
        """Everything, case by case."""
        default = "LLaDA-8B" if self.device == "cuda" else "small"
        name = self.args.size or default
        wide = ["small, wide head"] if name == "small" else []
        for weights, checkpointing in itertools.product(WEIGHTS, (False, True)):
            case = {"weights": weights, "checkpointing": checkpointing}
            training = self.open(name, case)
            for num_samples, mode in itertools.product(self.args.samples, MODES[:2]):
                self.memory(training, name, case, num_samples, mode)
            del training
            for size in [name, *wide] if self.args.repeats else []:
                self.time(self.open(size, case), size, case)

    def open(self, name: str, case: dict) -> Training:
        """A model that has passed the gate."""
        free_memory(self.device)
        training = Training(SIZES[name], self.device, self.dtype, **case)
        packs = make_packs(SIZES[name], GATE_SAMPLES, self.args.segments_per_pack)
        for mode in MODES[1:]:
            error = training.gradient_error(mode, packs)
            if not error <= ALLOWED_ERROR[self.dtype]:
                raise RuntimeError(
                    f"{name}, {case}: the gradient of {mode!r} differs from the joint one by {error:.2g} of "
                    f"its norm, allowed are {ALLOWED_ERROR[self.dtype]:.0e}; nothing was measured"
                )
        return training

    def row(self, what: str, name: str, case: dict, mode: str, packs: Packs, values: dict) -> None:
        """One row to the file and to the screen."""
        weights, checkpointing = case["weights"], case["checkpointing"]
        columns = {
            "what": what,
            "size": name,
            "dtype": str(self.dtype).removeprefix("torch."),
            **case,
            "mode": mode,
            "K": packs.whole.num_samples,
            "T": len(packs.whole.tokens_T),
            "N": len(packs.whole.row_N),
            "packs": 1 if mode == "joint" else len(packs.cut),
            "pack_tokens": max(len(pack.tokens_T) for pack in packs.cut),
        }
        spelled = {key: f"{v:.5g}" if isinstance(v, float) else v for key, v in values.items()}
        append([{**self.provenance, **columns, **spelled}], self.args.output, FIELDS)
        label = f"{name}, {weights}, checkpointing {checkpointing}, K = {columns['K']}, {mode}"
        print(f"[{what}] {label}:", *(f"{key}={value}" for key, value in spelled.items()), flush=True)

    def memory(self, training: Training, name: str, case: dict, num_samples: int, mode: str) -> None:
        """The row of one K and mode."""
        packs = make_packs(SIZES[name], num_samples, self.args.segments_per_pack)
        values: dict[str, object] = {"pack_KiB": packs.nbytes / 2**10}
        try:
            values |= self._peaks(training, mode, packs)
        except torch.OutOfMemoryError as error:
            values["note"] = describe(error)
        forget_gradients(training.model)
        free_memory(self.device)
        self.row("memory", name, case, mode, packs, values)

    def _peaks(self, training: Training, mode: str, packs: Packs) -> dict[str, object]:
        def step() -> None:
            training.step(mode, packs)

        step()  # whatever the first call sets up
        forget_gradients(training.model)
        resident = peak_memory(step, "cpu") if self.device == "cpu" else None
        forget_gradients(training.model)
        peak = peak_of_tensors(step, self.device)
        gradients = size_of([parameter.grad for parameter in training.trained()])
        weights = [*training.model.parameters(), *training.reference.model.parameters()]
        base = size_of(list({id(weight): weight for weight in weights}.values()))
        found = {"base_MiB": base, "peak_MiB": peak, "gradients_MiB": gradients}
        known = {} if resident is None else {"rss_MiB": float(resident)}
        return {key: value / 2**20 for key, value in found.items()} | known

    def time(self, training: Training, name: str, case: dict) -> None:
        """The rows of all modes, timed in turns."""
        packs = make_packs(SIZES[name], self.args.time_samples, self.args.time_segments_per_pack)

        def step(mode: str) -> Callable[[], object]:
            return lambda: training.step(mode, packs)

        threads = torch.get_num_threads()
        timings = interleaved(
            {mode: step(mode) for mode in MODES},
            device=self.device,
            threads=threads,
            repeats=self.args.repeats,
            keep_going=True,
        )
        joint = min(timings["joint"].samples, default=None)
        for mode, timing in timings.items():
            values: dict[str, object] = {"clock": clock_name(self.device, threads), "note": timing.failure}
            if timing.samples:
                least = min(timing.samples)
                values |= {"ms_min": least, "ms_median": timing.quantile(0.5), "rounds": len(timing.samples)}
                values |= {"gradient_error": training.gradient_error(mode, packs)} if joint else {}
                values |= {"cost_pct": 100 * (least / joint - 1)} if joint else {}
            self.row("time", name, case, mode, packs, values)
        forget_gradients(training.model)


def read(path: Path, what: str) -> list[dict[str, str]]:
    """The rows of one kind. Errors: ValueError if there are none."""
    with path.open(newline="") as stream:
        rows = [row for row in csv.DictReader(stream) if row["what"] == what]
    if not rows:
        raise ValueError(f"{path} has no rows of {what!r}")
    return rows


def draw(path: Path):
    """The figure of a file's memory rows: peak memory against K, with and without checkpointing."""
    from matplotlib.figure import Figure

    rows = [row for row in read(path, "memory") if row["peak_MiB"]]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for axis, checkpointing in zip(axes, ("False", "True"), strict=True):
        for (weights, colour), (mode, style) in itertools.product(
            zip(WEIGHTS, ("tab:blue", "tab:orange"), strict=True), (("joint", "--"), ("replay", "-"))
        ):
            wanted = {"weights": weights, "checkpointing": checkpointing, "mode": mode}
            points = [row for row in rows if wanted.items() <= row.items()]
            values = [float(row["peak_MiB"]) for row in points]
            label = f"{weights}, {mode}"
            axis.plot([int(row["K"]) for row in points], values, style, color=colour, marker="o", label=label)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.set_xlabel("K, samples of each response")
        axis.set_title("gradient checkpointing" if checkpointing == "True" else "no gradient checkpointing")
    first = rows[0]
    axes[0].set_ylabel("peak memory of a step above the weights, MiB")
    axes[0].legend()
    figure.suptitle(
        f"Peak memory of tensors in one step on one pair; size {first['size']!r}, {first['dtype']}, packs of "
        f"{first['pack_tokens']} tokens"
    )
    return figure


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line. Its sizes depend on the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--size", choices=SIZES, help="of the model; small on a CPU, LLaDA-8B on CUDA")
    parser.add_argument("--samples", type=int, nargs="*", default=list(SAMPLES), help="K of the memory rows")
    parser.add_argument("--time-samples", type=int, default=8, help="K of the time rows")
    parser.add_argument("--segments-per-pack", type=int, default=SEGMENTS_PER_PACK, help="of the memory rows")
    parser.add_argument(
        "--time-segments-per-pack", type=int, default=TIME_SEGMENTS_PER_PACK, help="the same in the time rows"
    )
    parser.add_argument("--repeats", type=int, default=7, help="rounds of the timing; 0 for none")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--figure", type=Path, help="draw the file's memory rows there and measure nothing")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    """Measures, or draws what was measured."""
    args = parse(arguments)
    if args.figure is not None:
        args.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(args.output).savefig(args.figure, dpi=110)
        return 0
    torch.set_num_threads(args.threads)
    Bench(args).run()
    return 0
