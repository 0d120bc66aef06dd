"""What the timed stages of `make gpu` share: options, the clock, the work list, rows that are saved at once.

A stage is a list of tasks, each of which gives rows of one CSV file. A task that raises becomes a row with
the message in `note`, and the next one runs. If the device itself is lost (after a fault every CUDA call
fails), the process ends with LOST, and `benchmarks/gpu.py` starts the stage again behind the task it
announced last.
"""

import argparse
import gc
import importlib.util
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.gpu_reached import print_done, print_plan
from benchmarks.record import RESULTS, append, now, output_of, provenance

LOST = 70
"""Exit status of a stage whose device is lost."""

PROVENANCE = ("date", "git", "dirty", "device", "driver", "torch", "triton")
TIMES = ("ms_p20", "ms_p50", "ms_p80", "host_ms", "reps", "peak_MiB")
BESIDE = ("units", "unit_ms", "pct_of_gemm", "pct_p20", "pct_p80")
"""Columns of a measurement beside its unit, the bare GEMM: how many units the work needs, the unit's median
in the same loop, median over median in %, and the 20th and 80th percentile of that ratio repeat by repeat."""

SUSTAINED = ("joule", "watt", "sm_mhz")
"""Columns of a call repeated without pause: energy of one call, power, clock of the SMs at the end."""

RUN_AHEAD_FILLS = 9  # writes of 512 MiB, 0.18 ms each on an H100


class _Meter:
    """Energy of the current GPU since this was made, and its clock, from NVML."""

    def __init__(self) -> None:
        self.clock, self.missing, self._nvml = 0, "", None
        if importlib.util.find_spec("pynvml") is None:
            self.missing = "no energy without the package nvidia-ml-py"
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = f"GPU-{torch.cuda.get_device_properties().uuid}"
            self._device = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            self._start = pynvml.nvmlDeviceGetTotalEnergyConsumption(self._device)
            self._nvml = pynvml
        except pynvml.NVMLError as error:
            self.missing = f"no energy: {error}"

    def read_clock(self) -> None:
        if self._nvml is not None:
            self.clock = self._nvml.nvmlDeviceGetClockInfo(self._device, self._nvml.NVML_CLOCK_SM)

    def joule(self) -> float | None:
        if self._nvml is None:
            return None
        return 1e-3 * (self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device) - self._start)


@dataclass(frozen=True)
class Task:
    """One entry of a work list.

    Attributes:
        name: what the log calls it.
        columns: columns of its row that are known before it runs.
        run: returns further columns, or a list of them for several rows, or None for no row.
    """

    name: str
    columns: dict[str, object]
    run: Callable[[], dict | list[dict] | None]


@dataclass
class Bench:
    """One stage: where it runs, where its rows go, how long it may take.

    Attributes:
        device: "cuda", or "cpu" for a rehearsal in Triton's interpreter.
        dtype: of the operands; float16 in a rehearsal, because the interpreter multiplies bfloat16 wrongly.
        tiny: True for the rehearsal: sizes of a few dozen.
        warm: True to run everything once, without timing and without rows: it only compiles.
        path, fields: the CSV file.
        until: seconds since the epoch; no task begins later.
        skip: tasks before this one are left out.
        share: (i, n): with `warm`, every n-th task beginning with task i.
    """

    device: str
    dtype: torch.dtype
    tiny: bool
    warm: bool
    path: Path
    fields: Sequence[str]
    until: float
    skip: int = 0
    share: tuple[int, int] = (0, 1)
    rows: list[dict] = field(default_factory=list)

    def __post_init__(self) -> None:
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        self.facts = {**provenance(self.device), "driver": driver.partition("\n")[0]}

    @property
    def backend(self) -> str:
        """Backend to ask the ops for: also a rehearsal runs the Triton kernels."""
        return "triton"

    @property
    def dtype_name(self) -> str:
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    def save(self, **values) -> None:
        """One row, on disk when this returns."""
        if self.warm:
            return
        self.rows.append(values)
        append([{**self.facts, "date": now(), **values}], self.path, self.fields)
        shown = (f"{key}={value}" for key, value in values.items() if value not in ("", None))
        print(f"  [{self.path.name}]", *shown, flush=True)

    def run(self, tasks: Iterable[Task], planned: Iterable[Task] | None = None) -> int:
        """Runs the list; returns how many tasks raised.

        planned: the same list once more, whose names are printed before anything runs. `tasks` may be a
        generator that frees, between two tasks, what only the first of them needed.
        """
        failed = 0
        if planned is not None:
            print_plan([task.name for task in planned][self.skip :])
        for index, task in enumerate(tasks):
            if index < self.skip or (self.warm and index % self.share[1] != self.share[0]):
                continue
            if time.time() > self.until:
                print(f"out of time before task {index}: {task.name}", flush=True)
                break
            print(f"task {index}: {task.name}", flush=True)
            failed += not self._run_one(task)
            if not self.warm:
                print_done(task.name)
            else:
                self.clear()  # tests that run beside it need the memory
        return failed

    def _run_one(self, task: Task) -> bool:
        try:
            found = task.run()
            rows = [found] if isinstance(found, dict) else found or []
            for row in rows:
                self.save(**{**task.columns, **row})
            return True
        except Exception as error:
            traceback.print_exc()
            sys.stderr.flush()
            message = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        # Outside the handler: the traceback, and with it the tensors of its frames, is gone.
        self.save(**task.columns, note=message)
        self._require_device()
        return False

    def _require_device(self) -> None:
        """After an exception: frees what it left, and ends the process if the device is lost."""
        if self.device != "cuda":
            return
        try:
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
            torch.zeros(1, device="cuda").item()
        except Exception as error:
            print(f"the device is lost: {error}".splitlines()[0], flush=True)
            os._exit(LOST)  # destructors would only fail again, some without end

    def measure(self, run: Callable[[], object], *, seconds: float = 0.25) -> dict[str, object]:
        """Milliseconds of `run` with a cold L2 (20th, 50th, 80th percentile) and memory above the start.

        host_ms: median time until `run` returns; device work of about 1.6 ms is queued before each call, so
        that the host launches ahead as it does in a training step. Where host_ms exceeds ms_p50 by more than
        that, the host was too slow all the same.
        """
        run()  # compiles, fills the allocator
        if self.warm:
            self.synchronize()
            return dict.fromkeys(TIMES, "")
        peak = self._peak(run)
        (samples,) = self._samples([run], seconds, ahead=True)
        return self._figures(samples, peak)

    def measure_beside(
        self,
        run: Callable[[], object],
        unit: Callable[[], object],
        units: int,
        *,
        seconds: float = 0.3,
        ahead: bool = True,
    ) -> dict[str, object]:
        """As `measure`, and the columns BESIDE: `run` and `unit` are timed in turn, repeat by repeat.

        A GPU at its power limit changes its clocks with what it has just done; only what ran at the same
        moment can be compared.

        Args:
            units: how many times the work of `unit` the work of `run` is.
            ahead: False to call both on an idle device, so that launching them counts.
        """
        run()
        if self.warm:
            self.synchronize()
            return dict.fromkeys((*TIMES, *BESIDE), "")
        unit()
        peak = self._peak(run)
        unit_samples, samples = self._samples([unit, run], seconds, ahead)
        found = self._figures(samples, peak)
        unit_ms = _quantile([elapsed for elapsed, _ in unit_samples], 0.5)
        pairs = zip(unit_samples, samples, strict=True)
        ratios = [100 * units * one[0] / whole[0] for one, whole in pairs]
        percent = 100 * units * unit_ms / _quantile([elapsed for elapsed, _ in samples], 0.5)
        shown = (f"{value:.1f}" for value in (percent, _quantile(ratios, 0.2), _quantile(ratios, 0.8)))
        return {**found, **dict(zip(BESIDE, (units, f"{unit_ms:.4f}", *shown), strict=True))}

    def sustained(self, run: Callable[[], object], seconds: float = 1.0) -> dict[str, object]:
        """Mean milliseconds and energy of `run`, repeated for so long after half as long to warm up.

        The driver's energy counter moves every 20 to 100 ms: good to some percent. Where there is none (a
        slice of a GPU, no package nvidia-ml-py), the time alone.
        """
        self._repeat(run, 0.5 * seconds)
        meter = _Meter()
        start = time.perf_counter()
        count = self._repeat(run, seconds, meter.read_clock)
        elapsed = time.perf_counter() - start
        found = {"ms_p50": f"{1e3 * elapsed / count:.4f}", "reps": count}
        joule = meter.joule()
        if joule is None:
            return {**found, "note": meter.missing}
        values = (f"{joule / count:.3f}", f"{joule / elapsed:.0f}", meter.clock)
        return {**found, **dict(zip(SUSTAINED, values, strict=True))}

    def _repeat(
        self, run: Callable[[], object], seconds: float, at_end: Callable[[], None] = lambda: None
    ) -> int:
        """Calls `run` for so long, the device never idle; returns how often. at_end: while it still runs."""
        count, deadline, waiting = 0, time.perf_counter() + seconds, None
        while time.perf_counter() < deadline:
            for _ in range(8):
                run()
            count += 8
            behind, waiting = waiting, torch.cuda.Event()
            waiting.record()
            if behind is not None:
                behind.synchronize()
        at_end()
        torch.cuda.synchronize()
        return count

    def _samples(
        self, runs: Sequence[Callable[[], object]], seconds: float, ahead: bool
    ) -> list[list[tuple[float, float]]]:
        """(device ms, host ms) of every repeat of every run, all runs in each repeat."""
        samples: list[list[tuple[float, float]]] = [[] for _ in runs]
        deadline = time.monotonic() + (0.0 if self.tiny else seconds)
        least = 1 if self.tiny else 7
        while len(samples[0]) < least or (time.monotonic() < deadline and len(samples[0]) < 200):
            for run, own in zip(runs, samples, strict=True):
                own.append(self._time_once(run, ahead))
        return samples

    def _figures(self, samples: list[tuple[float, float]], peak: str) -> dict[str, object]:
        times, host = ([sample[index] for sample in samples] for index in (0, 1))
        values = (*(_quantile(times, q) for q in (0.2, 0.5, 0.8)), _quantile(host, 0.5))
        return dict(zip(TIMES, (*(f"{value:.4f}" for value in values), len(times), peak), strict=True))

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def _peak(self, run: Callable[[], object]) -> str:
        if self.device != "cuda":
            return ""
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:.1f}"

    def _time_once(self, run: Callable[[], object], ahead: bool = True) -> tuple[float, float]:
        """(milliseconds of the device, milliseconds until the call returned)."""
        if self.device != "cuda":
            start = time.perf_counter()
            run()
            return (1e3 * (time.perf_counter() - start),) * 2
        if not hasattr(self, "_flush"):
            self._flush = torch.empty(2**27, dtype=torch.int32, device="cuda")  # 512 MiB, beyond any L2
        for _ in range(RUN_AHEAD_FILLS if ahead else 1):
            self._flush.zero_()
        if not ahead:
            torch.cuda.synchronize()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        called = time.perf_counter()
        result = run()
        called = time.perf_counter() - called
        end.record()
        end.synchronize()
        del result
        return start.elapsed_time(end), 1e3 * called

    def clear(self) -> None:
        """Gives freed memory back, between sizes."""
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def parse(description: str, file: str, fields: Sequence[str], arguments: list[str] | None) -> Bench:
    """The Bench of a stage's command line."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS / "gpu", help="folder of the CSV files")
    parser.add_argument("--until", type=float, default=float("inf"), help="epoch seconds to stop at")
    parser.add_argument("--skip", type=int, default=0, help="number of tasks to leave out")
    parser.add_argument("--tiny", action="store_true", help="rehearsal on a CPU; needs TRITON_INTERPRET=1")
    parser.add_argument("--warm", metavar="I/N", help="only compile, every N-th task beginning with task I")
    options = parser.parse_args(arguments)
    share = tuple(int(part) for part in (options.warm or "0/1").split("/"))
    return Bench(
        device="cpu" if options.tiny else "cuda",
        dtype=torch.float16 if options.tiny else torch.bfloat16,
        tiny=options.tiny,
        warm=options.warm is not None,
        path=options.output / file,
        fields=(*PROVENANCE, *fields),
        until=options.until,
        skip=options.skip,
        share=share,
    )
