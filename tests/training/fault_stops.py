"""Where a run of test_faults.py is stopped, and the process that is stopped there: a fork.

A stop is SIGKILL at a file-system call on the run's folder; in the middle of a file that is written, or is to
be brought to the disk (it is then cut at a byte); at an event of the training loop; after some time. Or
SIGTERM at an event, or a disk that is full from a call or a file on.
"""

import dataclasses
import errno
import gc
import os
import random
import signal
import stat
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from tqdm import tqdm
from transformers import TrainerCallback

from vrpo.training.checkpoints import INCOMPLETE

# Where the stops of a chain are, and how often. Most fall into the writing of files.
PLACES = {"call": 8, "file": 7, "event": 3, "time": 2, "SIGTERM": 2, "full": 2}
KILLS = ("call", "file", "event", "time")
# What a run is about when it touches a file, and how often it is stopped there, as far as it does.
PHASES = {
    "checkpoint": 8,
    "deletion": 3,
    "model": 2,
    "base": 2,
    "precomputation": 2,
    "reading": 2,
    "other": 1,
    "step": 1,
}
NO_ROOM = 75  # exit code of a run that told of a full disk
FIRST = {"base": 1, "precomputation": 3}  # so many stops of a run are in what it begins with, if it does
HANGS, LONGEST = 124, 120.0
ENDS = (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM, NO_ROOM)

TORCH_ERROR = RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
RUST_ERROR = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where a run is stopped: at the count-th occurrence in a phase; in a file at this fraction of its bytes.

    place "full" is at the count-th call or file, whichever `of` says.
    """

    place: str
    phase: str = ""
    count: int = 0
    fraction: float = 0.0
    seconds: float = 0.0
    of: str = ""


def draw(random_numbers: random.Random, seen: Counter, seconds: float, left: float, number: int) -> Stop:
    """The number-th stop of a run, at something that is still to come.

    Args: seen: (place, phase) -> occurrences in whole runs; left: the share of the steps that is left.
    """
    place = random_numbers.choices(list(PLACES), weights=list(PLACES.values()))[0]
    begins = [phase for phase, count in FIRST.items() if left == 1 and number < count and seen["call", phase]]
    if begins:
        place = random_numbers.choice(["call", "file", "call", "file", "full"])
    of = random_numbers.choice(["call", "file"]) if place == "full" else place
    of = "event" if of in ("SIGTERM", "time") else of
    over = {"reading"} if left == 1 else {"base", "precomputation"}
    if left == 0 and of != "event":
        over |= {"checkpoint", "deletion"}
    phases = begins or sorted(phase for where, phase in seen if where == of and phase not in over)
    phase = random_numbers.choices(phases, weights=[PHASES[phase] for phase in phases])[0]
    # A part of what is left: a chain takes several stops.
    part = {"checkpoint": left / 2, "deletion": left / 2, "step": left / 2, "precomputation": 0.25}
    most = max(1, int(seen[of, phase] * part.get(phase, 1)))
    count = random_numbers.randint(1, most)
    return Stop(place, phase, count, random_numbers.random(), random_numbers.uniform(0, seconds / 2), of)


class Watch(TrainerCallback):
    """Counts what a stop can be placed at, and stops there. One for each process; it cannot be taken off."""

    def __init__(self, stop: Stop | None, folder: Path):
        self.stop, self.folder = stop, f"{folder}{os.sep}"
        self.seen: Counter = Counter()
        self.is_full = False

    def begin(self) -> None:
        sys.addaudithook(self._hook)
        second = lambda args: args[1]  # noqa: E731
        torch.save = self._cut(torch.save, second, TORCH_ERROR)
        serialize = safetensors.torch.serialize_file
        safetensors.torch.serialize_file = self._cut(serialize, second, RUST_ERROR)
        no_room = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file")
        Path.write_text = self._cut(Path.write_text, lambda args: args[0], no_room)
        # Not on the disk yet: what a kernel that stops as well leaves of it.
        os.fsync = self._cut(os.fsync, lambda args: os.readlink(f"/proc/self/fd/{args[0]}"), no_room)
        for name in dir(TrainerCallback):
            if name.startswith("on_"):
                setattr(self, name, self._event)

    def _phase(self, path: Any) -> str | None:
        """None: not of the run's folder."""
        name = os.fsdecode(path) if isinstance(path, str | bytes | Path) else ""
        if not name.startswith(self.folder):
            return None
        first, *rest = Path(name[len(self.folder) :]).parts or ("",)
        if first == INCOMPLETE:
            second = rest[0] if rest else "checkpoint"
            if second.endswith(".deleted"):
                return "deletion"
            return "checkpoint" if second.startswith("checkpoint") else "model"
        if first.startswith("checkpoint-"):
            return "reading"
        for start, phase in (("base_model", "base"), ("reference_elbos", "precomputation")):
            if first.startswith(start):
                return phase
        is_model = Path(first).suffix in (".safetensors", ".json", ".md", ".png", ".bin")
        return "model" if is_model and not rest else "other"

    def _is_at(self, place: str, phase: str) -> bool:
        self.seen[place, phase] += 1
        stop = self.stop
        if stop is None or (place, phase) != (stop.of, stop.phase):
            return False
        return self.seen[place, phase] == stop.count

    def _hook(self, event: str, args: tuple) -> None:
        if event != "open" and not event.startswith(("os.", "shutil.")):
            return
        phase = self._phase(args[0] if args else None)
        if phase is None:
            return
        if phase == "reading" and event == "os.rename":
            phase = "deletion"
        if self._is_at("call", phase):
            self._stop()
        if self.is_full and _writes(event, args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), os.fsdecode(args[0]))

    def _cut(self, write: Callable, path_of: Callable[[tuple], Any], error: Exception) -> Callable:
        """write, which leaves a part of the file and dies, or raises what it does on a full disk."""

        def cut(*args, **kwargs):
            result = write(*args, **kwargs)
            path = path_of(args)
            phase = self._phase(path)
            if phase is None or not stat.S_ISREG(os.stat(path).st_mode):
                return result
            if self._is_at("file", phase):
                os.truncate(path, int(os.path.getsize(path) * self.stop.fraction))
                self._stop()
            if self.is_full:
                raise error
            return result

        return cut

    def _event(self, args, state, control, **kwargs) -> None:
        if self._is_at("event", "step"):
            self._stop()

    def _stop(self) -> None:
        if self.stop.place == "full":
            self.is_full = True
        else:
            os.kill(os.getpid(), signal.SIGTERM if self.stop.place == "SIGTERM" else signal.SIGKILL)


def _writes(event: str, args: tuple) -> bool:
    if event == "open":
        return bool((args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    return event == "os.mkdir"


def prepare_to_fork() -> None:
    """Once, when all is imported: the collections of a child are of its own objects, its locks its own."""
    tqdm.set_lock(threading.RLock())  # by default a semaphore of all forks, which one may hold as it dies
    gc.collect()
    gc.freeze()


def fork(work: Callable[[], None], output: Path) -> int:
    """A process that does the work, with all that is imported here; what it prints goes to a file."""
    child = os.fork()
    if child == 0:
        os._exit(_child(work, output))
    return child


def _child(work: Callable[[], None], output: Path) -> int:
    gc.disable()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    try:
        work()
        return 0
    except SystemExit as error:
        return error.code
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        return NO_ROOM if _tells_of_no_room(error) else 1


def _tells_of_no_room(error: BaseException) -> bool:
    """By an OSError of one line, whatever noticed it."""
    if not isinstance(error, OSError) or "\n" in str(error):
        return False
    causes = (error, error.__cause__)
    return any(getattr(cause, "errno", None) == errno.ENOSPC for cause in causes) or any(
        cause in (TORCH_ERROR, RUST_ERROR) for cause in causes
    )


def start(train: Callable[[Path, list], dict], folder: Path, stop: Stop | None) -> tuple[int, Path]:
    """A fork that trains in folder/out; (its exit code, negative for a signal; where its result is)."""
    result, save = folder / "result.pt", torch.save

    def work() -> None:
        watch = Watch(stop, folder / "out")
        watch.begin()
        end = train(folder / "out", [watch])
        save(end | {"seen": watch.seen}, result)

    child = fork(work, folder / "output.txt")
    if stop is not None and stop.place == "time":
        time.sleep(stop.seconds)
        os.kill(child, signal.SIGKILL)  # not reaped yet: the number is still the child's
    return wait(child), result


def wait(child: int) -> int:
    """The exit code of a fork, negative for a signal; HANGS, and it is killed, after LONGEST seconds."""
    until = time.monotonic() + LONGEST
    while time.monotonic() < until:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return HANGS
