"""The stages of `make gpu`: which processes, with which arguments, for which share of the time."""

import argparse
import functools
import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.gpu_findings import read_findings
from benchmarks.gpu_process import Outcome
from benchmarks.gpu_reached import counts_of_tests, not_reached

ROOT = Path(__file__).resolve().parents[1]
DEFAULT = ("tests", "warm", "sanitizer", "kernels", "tiles", "memory", "step", "rivals")
STAGES = (*DEFAULT, "compile")
COMPILE_TESTS = ["tests/kernels/test_triton_compile.py"]
SANITIZERS = ("compute-sanitizer", "/usr/local/cuda/bin/compute-sanitizer")
LEAST = {"memory": 20.0, "step": 60.0}
WARMERS = 4
TEST_SECONDS = 60
INTERPRETED = {"TRITON_INTERPRET": "1"}
WARM_RIVALS = (4096, 1024, 512)
SANITIZED = ("fused", "fused-sweep", "sweep", "fold", "masks")  # gpu_sanitize.PARTS, which needs Triton
TINY_CASE = {"rows": "20", "size": "16", "classes": "300", "dtypes": "fp32", "threads": "1", "repeats": "1"}


@dataclass(frozen=True)
class Part:
    """One process of a stage.

    Attributes:
        name: what its lines in the log begin with.
        arguments: what follows the interpreter, or a whole command if `program` is set.
        program: a program to start instead of the interpreter.
        takes_until: it takes --until (epoch seconds), after which it begins nothing new.
        resumes: it announces tasks and takes --until and --skip: started again behind a task that killed it.
        silence: seconds without a line after which it counts as hanging.
        optional: it ends with the other parts at the latest, and its end is no failure.
        judge: says from how it ended whether it failed, (words, failed); without it the exit status does.
        keep: says which of its lines go to the summary.
        variables: environment variables of its own.
    """

    name: str
    arguments: list[str]
    program: list[str] | None = None
    takes_until: bool = False
    resumes: bool = False
    silence: float | None = None
    optional: bool = False
    judge: Callable[[Outcome], tuple[str, bool]] | None = None
    keep: Callable[[list[str]], list[str]] = lambda lines: []
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Parts that run side by side.

    Attributes:
        weight: share of the time that is left, against the stages after it; about the seconds it takes on an
            H100 and 15 % more.
        least: seconds below which it is not started, because they would go to imports and compilation.
    """

    name: str
    weight: float
    parts: list[Part]
    least: float = 0.0


def _pytest(name: str, files: list[str], options: argparse.Namespace, workers: int, *more: str) -> Part:
    # The suite's conftest needs the trainer's packages, which a bare machine may lack.
    arguments = ["-m", "pytest", "--noconftest", "-v", "-rA", "-W", "default", "-p", "no:cacheprovider"]
    arguments += ["--durations=15", "--tb=short", *more, *files]
    if importlib.util.find_spec("xdist") is not None:
        # Most of the time is compilation on the host. The plugin replaces a worker whose device is lost.
        arguments += ["-n", str(min(workers, 2) if options.tiny else workers), "-p", "benchmarks.gpu_pytest"]
        if importlib.util.find_spec("pytest_timeout") is not None:
            # A kernel that never ends cannot be interrupted: the worker makes way for a new one.
            arguments += ["--timeout", str(TEST_SECONDS), "--timeout-method", "thread"]
    return Part(name, arguments, keep=counts_of_tests, variables={"OMP_NUM_THREADS": "2"})


def _tests(options: argparse.Namespace) -> list[Part]:
    """Everything marked gpu; tests that need much of the device's memory one by one, from the start."""
    found = [path for pattern in options.tests for path in ROOT.glob(pattern)]
    found = sorted({path.relative_to(ROOT).as_posix() for path in found})
    large = [path for path in found if path.endswith("_large.py")]
    others = [path for path in found if path not in large]
    parts = [_pytest("tests", others, options, 7, "-m", "gpu")]
    return parts + ([_pytest("large tests", large, options, 1, "-m", "gpu")] if large else [])


def _warmers(options: argparse.Namespace) -> list[Part]:
    count, tiny = 1 if options.tiny else WARMERS, ["--tiny"] if options.tiny else []
    shares = [f"{index}/{count}" for index in range(count)]
    # Each size is compiled by itself: in processes side by side, or the last would not be ready.
    shares += [f"rivals-{rows}" for rows in (WARM_RIVALS[:1] if tiny else WARM_RIVALS)]
    few = {"OMP_NUM_THREADS": "1", **(INTERPRETED if options.tiny else {})}
    parts = []
    for share in shares:
        arguments = ["-m", "benchmarks.gpu_warm", share, *tiny]
        parts.append(Part(f"warm {share}", arguments, optional=share.startswith("rivals"), variables=few))
    return parts


def _sanitizers(options: argparse.Namespace) -> list[Part]:
    tool = next(filter(None, map(shutil.which, SANITIZERS)), None)
    if tool is None or importlib.util.find_spec("benchmarks.gpu_sanitize") is None:
        return []
    parts = []
    # Libraries probe the driver with calls that fail on purpose: those are no findings. Hazards in shared
    # memory are internal to their kernel: those of cuBLAS are set aside when the output is read. Asked to
    # leave its kernels alone, racecheck broke them ("failed to handle a hardware exception").
    memcheck = ["--report-api-errors", "no"]
    for name, more, set_aside in (("memcheck", memcheck, False), ("racecheck", [], True)):
        command = [tool, "--tool", name, "--error-exitcode", "9", *more]
        # Without PyTorch's caching allocator a write beyond a tensor is a write beyond an allocation.
        variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "OMP_NUM_THREADS": "1"}
        variables |= INTERPRETED if options.tiny else {}
        arguments = ["-m", "benchmarks.gpu_sanitize", *SANITIZED]
        judge = functools.partial(_judge_sanitizer, set_aside=set_aside)
        parts.append(Part(name, arguments, program=command, judge=judge, variables=variables))
    return parts


def _judge_sanitizer(outcome: Outcome, *, set_aside: bool) -> tuple[str, bool]:
    found = read_findings(outcome.lines, set_aside=set_aside)
    if outcome.why:
        return found.cut(outcome.why, SANITIZED)
    return found.verdict(outcome.code, SANITIZED)


def _timed(name: str, weight: float, options: argparse.Namespace) -> Stage:
    """A stage written for this command: a list of tasks, each of which takes seconds."""
    arguments = ["-m", f"benchmarks.gpu_{name}", "--output", str(options.output)]
    arguments += ["--tiny"] if options.tiny else []
    variables = INTERPRETED if options.tiny else {}
    part = Part(name, arguments, resumes=True, silence=45, keep=not_reached, variables=variables)
    return Stage(name, weight, [part], LEAST.get(name, 0.0))


def _command(name: str, weight: float, options: argparse.Namespace, file: str, *more: str) -> Stage:
    """A command of `python3 -m benchmarks` that takes --until."""
    arguments = ["-m", "benchmarks", name, "--output", str(options.output / file), *more]
    stage = file.removesuffix(".csv")
    part = Part(stage, arguments, takes_until=True, keep=not_reached)
    return Stage(stage, weight, [part], LEAST.get(stage, 0.0))


def plan(options: argparse.Namespace) -> list[Stage]:
    """All stages asked for, in order; those that check run side by side, since nothing there is timed."""
    wanted, parts = options.stages, []
    for name, make in (
        ("tests", lambda: _tests(options)),
        ("warm", lambda: _warmers(options)),
        ("sanitizer", lambda: _sanitizers(options)),
    ):
        parts += make() if name in wanted else []
    rivals = ["--rows", *map(str, WARM_RIVALS), "--heads", "plain", "softcap", "bias"]
    rivals += ["--compiled"] if "warm" in wanted else []
    if options.tiny:
        rivals = [word for name, value in TINY_CASE.items() for word in (f"--{name}", value)]
    stages = [
        Stage("checks", 135, parts),
        _timed("kernels", 75, options),
        _timed("tiles", 45, options),
        _timed("memory", 25, options),
        _command("gpu-step", 125, options, "step.csv", *(["--tiny"] if options.tiny else [])),
        _command("kernels", 135, options, "rivals.csv", *rivals),
        Stage("compile", 0, [_pytest("compile", COMPILE_TESTS, options, 8)]),
    ]
    return [stage for stage in stages if stage.parts and stage.name in (*wanted, "checks")]
