"""Everything a first session with a GPU has to find out, in one command and in about nine minutes.

    make gpu     or     python3 -m benchmarks.gpu [--output DIR] [--seconds 550] [--stages tests,kernels,...]

Needs a CUDA machine whose python3 (`make gpu PYTHON=...`) has torch >= 2.11, triton >= 3.6, numpy and pytest;
for `step` transformers, peft and 48 GiB of device memory; for all tests within their time pytest-xdist,
pytest-timeout and 16 cores; for the energy of a call nvidia-ml-py. No network, no virtual environment,
nothing to install or build: the kernels are compiled as they are first used. Each stage is a process of its
own, because a fault takes the CUDA context of the process with it; one that fails, hangs or exceeds its time
is ended and reported, and the next goes on. A stage's time is its share of what is left, so whatever one does
not use goes to those after it.

    tests      everything marked gpu
    warm       meanwhile: compiles what the timed stages will launch       (Triton's cache)
    sanitizer  meanwhile: compute-sanitizer's memcheck and racecheck, if that tool is installed
    kernels    linear_cross_entropy in every mode and form: time, memory, errors against fp64;
               where the time goes                                         kernels.csv, profile.txt
    tiles      the sweep that `tiles.py` is corrected from                 tiles.csv
    memory     masks, packing, cross_entropy against the copy bandwidth    memory.csv
    step       a whole VRPO step at LLaDA-8B's shape                       step.csv, profile.txt
    rivals     linear_cross_entropy of other packages, where installed     rivals.csv
    compile    the ahead-of-time compile tests, in the time that is left; only if asked for

summary.txt has the environment, how each stage ended and what it did not reach, the tests that failed and
what the sanitizer found: it and the files above hold no path of this machine and can be committed; `python -m
benchmarks gpu-table` makes tables of them. log.txt has all that was said, the state of the GPU before and
during it, and a digest of the files. Rows are on disk as soon as they are measured; each carries date, git
revision, device, driver and versions. --tiny rehearses all of it on a CPU in Triton's interpreter: figures
without meaning, but every line runs.
"""

import argparse
import importlib.util
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_digest import digest
from benchmarks.gpu_machine import describe_machine, has_device, watch_clocks
from benchmarks.gpu_process import Child, Log, Outcome
from benchmarks.gpu_stages import DEFAULT, ROOT, STAGES, Part, Stage, plan
from benchmarks.record import now, revision

TASK_MARGIN, ITEM_MARGIN = 3.0, 6.0
"""Seconds before its limit after which a stage begins no task, or a command no item."""

CACHE = Path(tempfile.gettempdir()) / f"vrpo-gpu-{os.getuid()}"


@dataclass(frozen=True)
class Line:
    """One line of the table at the end, and what of its output the summary shows below it."""

    name: str
    seconds: float
    outcome: str
    failed: bool
    kept: tuple[str, ...] = ()


class Session:
    """Runs stages one after another and remembers how they ended."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        options.output.mkdir(parents=True, exist_ok=True)
        self.log = Log(options.output / "log.txt")
        self.end = time.monotonic() + options.seconds
        self.lines: list[Line] = []
        self._children: dict[int, Child] = {}
        self._stopped = False

    def environment(self, part: Part) -> dict[str, str]:
        """Variables of a child: everything of ours, and what makes it find the sources and speak at once."""
        paths = [str(ROOT), *map(str, self.options.rivals), os.environ.get("PYTHONPATH", "")]
        own = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "PYTHONFAULTHANDLER": "1",
            "HF_HUB_OFFLINE": "1",
            # One place that can be written, so that what one stage compiles serves the next.
            "TRITON_CACHE_DIR": str(CACHE / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor"),
        }
        if self.options.revision:
            own["VRPO_REVISION"] = self.options.revision
        return {**os.environ, **own, **part.variables}

    def run(self, stage: Stage, left: list[Stage]) -> None:
        """Runs all parts of a stage within its share of the time that `left`, itself first, divide."""
        remaining = self.end - time.monotonic()
        total = sum(other.weight for other in left)
        limit = remaining * stage.weight / total if total else remaining
        # A rehearsal has small models, and nothing to compile.
        least = max(self.options.least, 0.0 if self.options.tiny else stage.least)
        if limit < least:
            self.skip(stage.name, f"no time left ({max(0.0, limit):.0f} s, it needs {least:.0f})")
            return
        self.log.line(f"stage {stage.name}: at most {limit:.0f} s")
        until = time.monotonic() + limit
        with ThreadPoolExecutor(len(stage.parts)) as pool:
            ends = [pool.submit(self._guarded, part, until) for part in stage.parts]
            for part, end in zip(stage.parts, ends, strict=True):
                if not part.optional:
                    end.result()
            names = {part.name for part in stage.parts if part.optional}
            for child in [child for child in list(self._children.values()) if child.name in names]:
                child.end()
            self.lines += [end.result() for end in ends]

    def skip(self, name: str, why: str) -> None:
        """A stage that does not run: a line of the table, no failure."""
        self.lines.append(Line(name, 0.0, f"skipped: {why}", failed=False))

    def _guarded(self, part: Part, until: float) -> Line:
        try:
            return self._run_part(part, until)
        except Exception as error:  # an error of this file must not cost the stages after it
            self.log.line(traceback.format_exc(), part.name)
            return Line(part.name, 0.0, f"not run: {type(error).__name__}: {error}", failed=True)

    def _run_part(self, part: Part, until: float) -> Line:
        start, skip, restarts = time.monotonic(), 0, 0
        while True:
            outcome = self._run_once(part, until, skip)
            died = outcome.code not in (0, 1, 2) and outcome.task >= skip
            if self._stopped or not (part.resumes and died) or until - time.monotonic() < self.options.least:
                break
            skip, restarts = outcome.task + 1, restarts + 1
            why = f"{self._words(outcome)} in task {outcome.task}"
            self.log.line(f"{part.name}: {why}; goes on with the next one")
        words, failed = self._words(outcome), bool(outcome.code or restarts)
        if part.judge:
            words, failed = part.judge(outcome)
        if restarts:
            words += f", started again {restarts} times behind a task that ended it"
        failed = failed and not part.optional
        self.log.line(f"{part.name}: {words} after {time.monotonic() - start:.0f} s")
        if failed:
            for line in outcome.lines[-12:]:
                self.log.line(line, f"{part.name}, last lines")
        return Line(part.name, time.monotonic() - start, words, failed, tuple(part.keep(outcome.lines)))

    def _words(self, outcome: Outcome) -> str:
        if outcome.why:
            return outcome.why
        meaning = {0: "ok", 70: "exit status 70, its device was lost"}
        return meaning.get(outcome.code, f"exit status {outcome.code}")

    def _run_once(self, part: Part, until: float, skip: int) -> Outcome:
        arguments = list(part.arguments)
        if part.resumes or part.takes_until:
            # Clean stop before the limit. A point in time, on the wall clock that parent and child share:
            # imports alone have taken from 5 to 22 s.
            stop = time.time() + (until - time.monotonic()) - (TASK_MARGIN if part.resumes else ITEM_MARGIN)
            arguments += ["--until", f"{stop:.1f}"]
        arguments += ["--skip", str(skip)] if part.resumes else []
        command = [*(part.program or []), sys.executable, *arguments]
        child = Child(part.name, command, self.environment(part), ROOT, self.log)
        child.start()
        self._children[id(child)] = child
        try:
            return child.wait(until, part.silence)
        finally:
            del self._children[id(child)]

    def close(self) -> None:
        """Ends whatever still runs, and lets nothing start again."""
        self._stopped = True
        for child in list(self._children.values()):
            child.end()

    def digest(self) -> None:
        """Prints what the files say; a file it cannot read is no reason to fail."""
        try:
            for line in digest(self.options.output):
                self.log.line(line, "digest")
        except Exception as error:
            self.log.line(f"{type(error).__name__}: {error}", "digest")

    def table(self) -> list[str]:
        """The stages, a line each, with what is kept of them."""
        lines = ["stage              seconds  outcome"]
        for line in self.lines:
            lines.append(f"{line.name:18s} {line.seconds:7.1f}  {line.outcome}")
            lines += [f"{'':27s} {text}" for text in line.kept]
        return lines

    def finish(self, environment: list[str]) -> int:
        """Prints the table, writes the summary; returns 1 if a stage failed."""
        table = self.table()
        for line in table:
            self.log.line(line)
        head = [f"{now()}, git {self.options.revision or revision()[0]}", *environment, "", *table, ""]
        (self.options.output / "summary.txt").write_text("\n".join(head), encoding="utf-8")
        return int(any(line.failed for line in self.lines))


def merge_profiles(folder: Path) -> None:
    """One file with all profiles: the step's is appended to the kernels'."""
    other = folder / "profile_step.txt"
    if other.exists():
        with (folder / "profile.txt").open("a", encoding="utf-8") as stream:
            stream.write(other.read_text(encoding="utf-8"))
        other.unlink()


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = Path(os.environ.get("OUT") or Path(__file__).parent / "results" / "gpu")
    parser.add_argument(
        "--output",
        type=Path,
        default=default,
        help="folder of all files (the environment's OUT, else results/gpu)",
    )
    parser.add_argument("--seconds", type=float, default=550, help="time for all of it (550)")
    parser.add_argument("--stages", type=lambda text: text.split(","), default=list(DEFAULT))
    parser.add_argument("--revision", default="", help="git revision, where there is no repository")
    parser.add_argument(
        "--rivals", type=Path, nargs="+", default=[], help="folders with more packages, for every stage"
    )
    parser.add_argument(
        "--tests", nargs="+", default=["tests/*/test_gpu*.py"], help="which files the stage `tests` runs"
    )
    parser.add_argument("--tiny", action="store_true", help="rehearsal on a CPU")
    parser.add_argument("--least", type=float, default=8, help="seconds below which no stage starts (8)")
    options = parser.parse_args(arguments)
    unknown = set(options.stages) - set(STAGES)
    if unknown:
        parser.error(f"unknown stages {sorted(unknown)}; there are {', '.join(STAGES)}")
    options.output = options.output.resolve()
    options.rivals = [path.resolve() for path in options.rivals]
    sys.path += map(str, options.rivals)  # where their versions are found
    return options


def main(arguments: list[str] | None = None) -> int:
    """0 if every stage ended well, 1 if one failed, 2 if there is no GPU."""
    options = _options(arguments)
    if not options.tiny and not has_device():
        print("make gpu needs a CUDA device, and neither nvidia-smi nor torch sees one")
        return 2
    session = Session(options)

    def stopped(number: int, _frame: object) -> None:
        session.close()  # the stages are in sessions of their own: nobody else tells them
        sys.exit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stopped)
    stop = threading.Event()
    watcher = threading.Thread(target=watch_clocks, args=(session.log, stop), daemon=True)
    try:
        environment = describe_machine(session.log)
        watcher.start()
        stages = plan(options)
        for index, stage in enumerate(stages):
            if stage.name == "step" and importlib.util.find_spec("transformers") is None:
                session.skip("step", "the package transformers is not installed")
                continue
            session.run(stage, stages[index:])
            if stage.name == "step":
                merge_profiles(options.output)
        if "sanitizer" in options.stages and not any(line.name == "memcheck" for line in session.lines):
            session.skip("sanitizer", "no compute-sanitizer on this machine")
        session.digest()
        return session.finish(environment)
    finally:
        stop.set()
        session.close()
        session.log.line(f"files are in {options.output}")


if __name__ == "__main__":
    sys.exit(main())
