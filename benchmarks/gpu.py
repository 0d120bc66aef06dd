"""Everything a first session with a GPU should measure, in one command and under eight minutes.

    make gpu        or        python3 -m benchmarks.gpu [--seconds 460] [--rows 4096] [--skip-tests]

Needs a CUDA machine whose python3 (`make gpu PYTHON=...`) has torch >= 2.11, triton >= 3.6, numpy and pytest.
No network, no virtual environment, nothing to install or build: the kernels are compiled as they are first
used. It does, in this order, and says what it had no time for:

1. tests/kernels/test_gpu.py and test_triton_compile.py                 -> results/gpu_tests.txt
2. the copy bandwidth and the bare GEMM rate of this run (the roofs)    -> results/gpu.csv, provider "roof"
3. linear_cross_entropy in every mode, in % of its floor at that rate   -> results/gpu.csv, provider "vrpo"
4. the tile sweep that `tiles.py` is to be corrected from               -> results/gpu_tiles.csv
5. cross_entropy and mask_select against the copy bandwidth             -> results/gpu.csv
6. `python -m benchmarks kernels`, the table with all rivals, in the time that is left

Every row of linear_cross_entropy is gated: its nll must agree with an fp64 computation of some rows, or no
time is written. Rows are appended; each carries date, git revision, device, driver and versions.
"""

import argparse
import importlib.util
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import triton

from benchmarks.record import RESULTS, append, output_of, provenance
from vrpo_kernels.cross_entropy.op import cross_entropy
from vrpo_kernels.linear_cross_entropy import kernel, linear_cross_entropy
from vrpo_kernels.linear_cross_entropy.tiles import Tiles, tiles_for
from vrpo_kernels.mask_select.op import mask_select

HIDDEN, CLASSES = 4096, 126464  # LLaDA-8B's head
NLL_TOLERANCE = 3e-6  # of the largest nll, against fp64 on the same 16-bit inputs
FIELDS = (
    *("date", "git", "dirty", "device", "driver", "torch", "triton"),
    *("op", "provider", "mode", "dtype", "N", "D", "V", "case"),
    *("ms_p20", "ms_p50", "ms_p80", "reps", "peak_MiB", "units", "pct_of_roof", "nll_err"),
)


def _provenance() -> dict[str, str]:
    """The columns that say what was run where."""
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {**provenance("cuda"), "driver": driver}


class Report:
    """Appends rows to CSV files and prints them."""

    def __init__(self) -> None:
        self.provenance = _provenance()
        RESULTS.mkdir(exist_ok=True)

    def row(self, file: str, **values) -> None:
        """One measured row; unknown columns raise."""
        append([{**self.provenance, **values}], RESULTS / file, FIELDS)
        shown = (f"{key}={value}" for key, value in values.items() if key not in ("D", "V", "dtype"))
        print(f"[{file}]", *shown, flush=True)


def measure(run: Callable[[], object], *, seconds: float = 0.35) -> dict[str, object]:
    """Milliseconds (20th, 50th, 80th percentile) of `run` with a cold L2, and peak memory above the start."""
    run()  # compiles, fills the allocator
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    flush = torch.empty(2**27, dtype=torch.int32, device="cuda")  # 512 MiB, beyond any L2
    times: list[float] = []
    deadline = time.monotonic() + seconds
    while len(times) < 5 or (time.monotonic() < deadline and len(times) < 200):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    times.sort()
    low, middle, high = (times[int(len(times) * q)] for q in (0.2, 0.5, 0.8))
    return {
        "ms_p20": f"{low:.4f}",
        "ms_p50": f"{middle:.4f}",
        "ms_p80": f"{high:.4f}",
        "reps": len(times),
        "peak_MiB": f"{peak / 2**20:.1f}",
    }


class Head:
    """Inputs of one size, the truth for some of its rows, and the matmul unit of this run."""

    def __init__(self, rows: int, *, peaked: bool = False) -> None:
        generator = torch.Generator("cuda").manual_seed(rows)
        normal = {"generator": generator, "device": "cuda", "dtype": torch.bfloat16}
        self.weight = torch.randn(CLASSES, HIDDEN, **normal)
        self.targets = torch.randint(CLASSES, (rows,), generator=generator, device="cuda")
        self.hidden = torch.randn(rows, HIDDEN, **normal).mul_(HIDDEN**-0.5)
        if peaked:  # 16 nats on the target's logit: p(target) above 0.97 in most rows
            self.hidden += self.weight[self.targets] * (16.0 / HIDDEN)
        self.dnll = torch.randn(rows, generator=generator, device="cuda").mul_(0.01)
        self.some = torch.arange(0, rows, max(1, rows // 16), device="cuda")
        logits = self.hidden[self.some].double() @ self.weight.double().T
        self.truth = torch.nn.functional.cross_entropy(logits, self.targets[self.some], reduction="none")

    def error(self, nll: torch.Tensor) -> float:
        """Largest nll error of the checked rows, relative to the largest nll."""
        return float((nll[self.some] - self.truth).abs().max() / self.truth.abs().max())

    def columns(self) -> dict[str, object]:
        """Size columns of a CSV row."""
        return {"dtype": "bf16", "N": self.hidden.shape[0], "D": HIDDEN, "V": CLASSES}


def gemm_unit(report: Report, head: Head) -> float:
    """Milliseconds of one unit, hidden @ weight^T into bf16 by cuBLAS: what percentages refer to."""
    out = torch.empty(head.hidden.shape[0], CLASSES, dtype=torch.bfloat16, device="cuda")
    found = measure(lambda: torch.mm(head.hidden, head.weight.t(), out=out), seconds=1.0)
    unit = float(found["ms_p50"])
    rate = 2 * head.hidden.shape[0] * HIDDEN * CLASSES / unit / 1e9
    case = f"bare GEMM, {rate:.0f} TFLOP/s"
    report.row("gpu.csv", op="mm", provider="roof", mode="1u", units=1, case=case, **head.columns(), **found)
    return unit


def copy_rate(report: Report) -> float:
    """GB/s of a device copy, read plus written."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    found = measure(lambda: target.copy_(source))
    rate = 2 * source.numel() * 2 / float(found["ms_p50"]) / 1e6
    report.row("gpu.csv", op="copy", provider="roof", case=f"{rate:.0f} GB/s", **found)
    return rate


def _modes(head: Head, gemm: str) -> dict[str, tuple[int, Callable[[], torch.Tensor]]]:
    """mode -> (matmul units, a run that returns nll), forward and backward together."""

    def run(need_hidden: bool, need_weight: bool, kept_tile_bytes: int) -> torch.Tensor:
        hidden = head.hidden.detach().requires_grad_(need_hidden)
        weight = head.weight.detach().requires_grad_(need_weight)
        nll = linear_cross_entropy(hidden, weight, head.targets, gemm=gemm, kept_tile_bytes=kept_tile_bytes)
        if need_hidden or need_weight:
            nll.backward(head.dnll)
        return nll.detach()

    return {
        "no gradient": (1, lambda: run(False, False, 0)),
        "frozen head": (2, lambda: run(True, False, 0)),
        "trained, tiles kept": (3, lambda: run(True, True, 2**40)),
        "trained, recomputed": (4, lambda: run(True, True, 0)),
    }


def modes(report: Report, head: Head, unit: float, case: str, deadline: float) -> None:
    """linear_cross_entropy through its public function, in all modes and both GEMM forms."""
    for gemm in ("cublas", "fused"):
        for mode, (units, run) in _modes(head, gemm).items():
            if time.monotonic() > deadline:
                print(f"out of time before {mode}, {gemm}, {case}")
                return
            error = head.error(run())
            columns = {"op": "linear_cross_entropy", "mode": mode, "provider": f"vrpo {gemm}", "case": case}
            if not error <= NLL_TOLERANCE:
                print(f"RED, no time written: nll error {error:.1e} in {columns}")
                continue
            found = measure(run)
            percent = f"{100 * units * unit / float(found['ms_p50']):.1f}"
            report.row(
                "gpu.csv",
                **columns,
                units=units,
                pct_of_roof=percent,
                nll_err=f"{error:.1e}",
                **head.columns(),
                **found,
            )


def _tile_cases(base: Tiles) -> list[tuple[str, Tiles]]:
    """(mode, tiles) in order of what is learnt from them."""
    cases: list[tuple[str, Tiles]] = []
    for rows, cols in itertools.product((1024, 2048, 4096), (4096, 8192, 16384, 32768)):
        cases.append(("frozen head", replace(base, gemm="cublas", rows=rows, cols=cols)))
    for block_rows, block_cols, stages in ((128, 256, 4), (128, 256, 3), (128, 128, 4), (256, 128, 3)):
        for rows, cols in ((1024, 8192), (4096, 8192), (4096, 32768)):
            shape = {"block_rows": block_rows, "block_cols": block_cols, "num_stages": stages}
            cases.append(("frozen head", replace(base, gemm="fused", rows=rows, cols=cols, **shape)))
    for slice_cols in (1024, 2048, 4096, 8192, 16384):
        cases.append(("dW from kept", replace(base, slice_cols=slice_cols)))
    for rows, cols in itertools.product((2048, 4096), (2048, 4096, 8192, 16384)):
        cases.append(("sweep", replace(base, sweep_rows=rows, sweep_cols=cols)))
    return cases


def tile_sweep(report: Report, head: Head, unit: float, deadline: float) -> None:
    """Times the backend's own functions over tile shapes; `tiles.py` is corrected from the best rows."""
    major, minor = torch.cuda.get_device_capability()
    base = tiles_for((major, minor), head.hidden.element_size())
    arguments = (head.hidden, head.weight, head.targets)
    kept_forward = kernel.forward(*arguments, gemm="cublas", want_dhidden=False, keep_tiles=True)
    statistics, kept, shift = kept_forward[1], kept_forward[3], kept_forward[4]
    for mode, tiles in _tile_cases(base):
        if time.monotonic() > deadline:
            print("out of time in the tile sweep")
            return

        def run(mode=mode, tiles=tiles):
            if mode == "frozen head":
                return kernel.forward(
                    *arguments, gemm=tiles.gemm, want_dhidden=True, keep_tiles=False, tiles=tiles
                )
            if mode == "sweep":
                wanted = {"want_dhidden": True, "want_dweight": True}
                return kernel.sweep(head.dnll, *arguments, statistics, gemm=tiles.gemm, tiles=tiles, **wanted)
            return kernel.dweight(
                head.dnll, *arguments, statistics, kept, shift, gemm=tiles.gemm, tiles=tiles
            )

        units = {"frozen head": 2, "sweep": 3}.get(mode, 1)
        try:
            first = run()
        except triton.runtime.errors.OutOfResources as error:
            print(f"{mode} {tiles}: {error}")
            continue
        error = head.error(first[0]) if mode == "frozen head" else 0.0
        if not error <= NLL_TOLERANCE:
            print(f"RED, no time written: nll error {error:.1e} in {tiles}")
            continue
        del first
        found = measure(run, seconds=0.2)
        report.row(
            "gpu_tiles.csv",
            op="linear_cross_entropy",
            provider=f"vrpo {tiles.gemm}",
            mode=mode,
            units=units,
            case=str(tiles).removeprefix("Tiles"),
            pct_of_roof=f"{100 * units * unit / float(found['ms_p50']):.1f}",
            nll_err=f"{error:.1e}",
            **head.columns(),
            **found,
        )


def direct_dweight(report: Report, head: Head, unit: float) -> None:
    """What dW would cost if cuBLAS wrote it in 16 bits itself, all classes at once.

    `kernel.dweight` goes through fp32 slices instead, because cuBLAS may add partial sums of a 16-bit result
    in 16 bits. The gap between the two is the price of that.
    """
    kept = torch.randn(head.hidden.shape[0], CLASSES, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(head.weight)
    found = measure(lambda: torch.mm(kept.t(), head.hidden, out=out))
    percent = f"{100 * unit / float(found['ms_p50']):.1f}"
    columns = {"op": "linear_cross_entropy", "provider": "cublas, 16-bit dW", "mode": "dW from kept"}
    report.row("gpu_tiles.csv", **columns, units=1, pct_of_roof=percent, **head.columns(), **found)


def memory_bound(report: Report, rate: float) -> None:
    """cross_entropy and mask_select, in % of the copy bandwidth."""
    rows = 4096
    logits = torch.randn(rows, CLASSES, dtype=torch.bfloat16, device="cuda").requires_grad_()
    targets = torch.randint(CLASSES, (rows,), device="cuda")
    dnll = torch.randn(rows, device="cuda")

    def both() -> None:
        logits.grad = None
        cross_entropy(logits, targets).backward(dnll)

    size = {"dtype": "bf16", "N": rows, "V": CLASSES}
    for mode, passes, run in (
        ("forward", 1, lambda: cross_entropy(logits.detach(), targets)),
        ("forward and backward", 3, both),
    ):
        found = measure(run)
        moved = passes * logits.numel() * 2 / float(found["ms_p50"]) / 1e6
        percent = f"{100 * moved / rate:.1f}"
        report.row(
            "gpu.csv", op="cross_entropy", provider="vrpo", mode=mode, pct_of_roof=percent, **size, **found
        )
    for segments, length in ((64, 512), (64, 4096), (8, 65536)):
        length_S = torch.full((segments,), length, device="cuda")
        count_S = length_S // 2
        counter_S3 = torch.arange(3 * segments, device="cuda").view(segments, 3)
        total = segments * (length // 2)
        draw = (length_S, counter_S3, torch.zeros_like(length_S), count_S)
        found = measure(lambda draw=draw, n=total: mask_select(*draw, seed=7, by_rank=True, num_rows=n))
        case = f"{segments} segments of {length}"
        report.row("gpu.csv", op="mask_select", provider="vrpo", mode="by rank", N=total, case=case, **found)


def run_tests(seconds: float) -> bool:
    """The GPU tests in a child process; their output goes to results/gpu_tests.txt."""
    folder = RESULTS.parent.parent / "tests" / "kernels"
    files = [str(folder / name) for name in ("test_gpu.py", "test_triton_compile.py")]
    # The suite's conftest needs the trainer's packages, which a bare machine may lack.
    options = ["--noconftest", "-q", "-W", "default", "-p", "no:cacheprovider", "--durations=10"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", "4"]  # most of the time is compilation on the host
    command = [sys.executable, "-m", "pytest", *options, *files]
    path = RESULTS / "gpu_tests.txt"
    with path.open("w") as stream:
        stream.write(" ".join(f"{key}={value}" for key, value in _provenance().items()) + "\n")
        stream.flush()
        try:
            done = subprocess.run(
                command, stdout=stream, stderr=subprocess.STDOUT, timeout=seconds, cwd=RESULTS.parents[1]
            )
            passed = done.returncode == 0
        except subprocess.TimeoutExpired:
            stream.write(f"\nstopped after {seconds:.0f} s\n")
            passed = False
    print(path.read_text()[-3000:], flush=True)
    return passed


def run_rivals(seconds: float) -> None:
    """`python -m benchmarks kernels` in a child process, for at most `seconds`."""
    try:
        subprocess.run(
            [sys.executable, "-m", "benchmarks", "kernels"], timeout=seconds, cwd=RESULTS.parents[1]
        )
    except subprocess.TimeoutExpired:
        print(f"the rivals' table was stopped after {seconds:.0f} s")


def main() -> int:
    """Runs everything within the time given; returns 0 only if the tests passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=460, help="time for all of it (460)")
    parser.add_argument("--rows", type=int, default=4096, help="masked rows N of the main size (4096)")
    parser.add_argument("--skip-tests", action="store_true", help="measure only")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("make gpu needs a CUDA device, and torch sees none")
        return 2
    start = time.monotonic()
    report = Report()
    passed = True if options.skip_tests else run_tests(0.4 * options.seconds)

    def until(share: float) -> float:
        return start + share * options.seconds

    rate = copy_rate(report)
    head = Head(options.rows)
    unit = gemm_unit(report, head)
    modes(report, head, unit, "flat logits", until(0.55))
    direct_dweight(report, head, unit)
    tile_sweep(report, head, unit, until(0.75))
    memory_bound(report, rate)
    for rows, peaked in ((options.rows, True), (1024, False)):
        if time.monotonic() < until(0.8):
            del head
            torch.cuda.empty_cache()
            head = Head(rows, peaked=peaked)
            modes(
                report,
                head,
                gemm_unit(report, head),
                "peaked logits" if peaked else "flat logits",
                until(0.85),
            )
    del head
    torch.cuda.empty_cache()
    run_rivals(max(10.0, until(1.0) - time.monotonic()))
    print(
        f"{time.monotonic() - start:.0f} s; tests {'passed' if passed else 'FAILED'}; rows are in {RESULTS}"
    )
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
