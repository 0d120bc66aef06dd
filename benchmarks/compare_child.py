"""One side of `python -m benchmarks compare`: a process with the kernels of one revision, timed on request.

The benchmarks are those of this checkout on both sides; only `vrpo_kernels` differs. Requests and answers are
lines of JSON, on standard input and on what standard output was at the start; whatever libraries print goes
to standard error.
"""

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HARNESS = Path(__file__).resolve().parents[1]
START = """
import sys
sys.path.insert(0, sys.argv[1])
import vrpo_kernels
sys.path.insert(0, sys.argv[2])
from benchmarks.compare_child import serve
serve()
"""


class Side:
    """The process of one side, as its parent sees it.

    Args:
        name: "base" or "head".
        root: the folder whose `vrpo_kernels` it imports.
    """

    def __init__(self, name: str, root: Path, *, device: str, sizes: str, threads: int) -> None:
        self.name = name
        command = [sys.executable, "-P", "-c", START, str(root), str(HARNESS)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment, **pipes)
        hello = self.ask(do="start", device=device, sizes=sizes, threads=threads)
        if not Path(hello["kernels"]).is_relative_to(root.resolve()):
            raise RuntimeError(f"{name} imported {hello['kernels']}, not the copy in {root}")

    def ask(self, **request: object) -> dict:
        """The answer to one request.

        Errors: RuntimeError if the process has ended.
        """
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; the empty answer below says so
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"the process of {self.name} ended with {self._process.wait()} (its errors are above)"
            )
        return json.loads(line)

    def close(self) -> None:
        """Lets the process end."""
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()


class _Server:
    """What runs in the process of a side."""

    def __init__(self, device: str, sizes: str, threads: int) -> None:
        import torch

        from benchmarks.micro.micro import SIZES
        from benchmarks.micro.registry import MICROS

        if device == "cpu":
            torch.set_num_threads(threads)
        self.device, self.sizes = device, SIZES[sizes]
        self.micros = {micro.name: micro for micro in MICROS}
        self.clock = time.process_time if device == "cpu" and threads == 1 else time.perf_counter
        self.run: Callable[[], object] | None = None

    def prepare(self, name: str, dtype: str) -> dict:
        """Makes one benchmark ready. {} if it is, else {"wrong": ...} or {"missing": ...}."""
        from benchmarks.cases import DTYPES
        from benchmarks.micro.micro import Where, synchronised

        self.run = None
        gc.collect()
        try:
            prepared = self.micros[name].prepare(Where(self.device, DTYPES[dtype], self.sizes))
            prepared.check()
        except AssertionError as error:
            return {"wrong": _line(error)}
        except (AttributeError, ImportError, NotImplementedError, TypeError, ValueError) as error:
            return {"missing": f"{type(error).__name__}: {_line(error)}"}
        self.run = synchronised(prepared.run, self.device)
        self.run()
        return {}

    def time(self, calls: int) -> dict:
        """Milliseconds of one call, the mean of so many."""
        self.run()  # what the other side has put out of the caches comes back
        start = self.clock()
        for _ in range(calls):
            self.run()
        return {"ms": 1e3 * (self.clock() - start) / calls}


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def serve() -> None:
    """Answers requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    server = None
    for line in sys.stdin:
        request = json.loads(line)
        kind = request.pop("do")
        if kind == "start":
            server = _Server(**request)
            answer = {"kernels": sys.modules["vrpo_kernels"].__file__}
        else:
            answer = getattr(server, kind)(**request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
