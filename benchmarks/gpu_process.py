"""A stage of `make gpu` as a child process: copied to a log as it speaks, ended with all it started."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_TASK = re.compile(r"task (\d+): ")
_GRACE = 2.0  # seconds between the polite signal and the other one


class Log:
    """A file and the console, one line at a time; safe to use from the threads that read the stages."""

    def __init__(self, path: Path) -> None:
        self._lock, self._path = threading.Lock(), path

    def line(self, text: str, name: str = "gpu") -> None:
        """Writes `[name] text` to both at once; the file is closed again, whatever comes."""
        text = f"[{name}] {text}\n"
        with self._lock:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(text)
            sys.stdout.write(text)
            sys.stdout.flush()


@dataclass
class Outcome:
    """How a child ended.

    Attributes:
        code: its exit status; negative for a signal.
        why: "" if it ended by itself, else what ended it.
        seconds: how long it ran.
        task: number of the last task it announced, -1 if none.
        lines: all it said.
    """

    code: int
    why: str
    seconds: float
    task: int
    lines: list[str]


@dataclass
class Child:
    """A running stage. Its standard output and error go to the log.

    Attributes:
        name: what its lines in the log begin with.
        command, environment, folder: what runs, with which variables, where.
        log: see Log.
    """

    name: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    log: Log
    _said: list[str] = field(default_factory=list)
    _task: int = -1

    def start(self) -> None:
        """Starts it as the leader of a session of its own, so that all its descendants can be found."""
        self._start = self._spoke = time.monotonic()
        self._process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            encoding="utf-8",
            errors="replace",
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        with self._process.stdout as lines:
            for line in lines:
                self._spoke = time.monotonic()
                text = line.rstrip("\n")
                if found := _TASK.match(text):
                    self._task = int(found[1])
                self._said.append(text)
                self.log.line(text, self.name)

    def wait(self, until: float, silence: float | None = None) -> Outcome:
        """Waits for its end; stops it at `until` (time.monotonic), or after `silence` seconds of silence."""
        why = ""
        while self._process.poll() is None:
            now = time.monotonic()
            if now > until:
                why = f"stopped at its limit of {until - self._start:.0f} s"
            elif silence is not None and now - self._spoke > silence:
                why = f"stopped after {silence:.0f} s of silence"
            if why:
                break
            time.sleep(0.05)
        self.end()
        seconds = time.monotonic() - self._start
        # A process that left the session may still hold the pipe: what was said so far is enough.
        self._reader.join(timeout=2.0)
        code = self._process.returncode
        return Outcome(-signal.SIGKILL if code is None else code, why, seconds, self._task, list(self._said))

    def end(self) -> None:
        """Ends the child and whatever it started: first politely, then not."""
        for sign, grace in ((signal.SIGTERM, _GRACE), (signal.SIGKILL, _GRACE)):
            members = _members(self._process.pid)
            if self._process.poll() is not None and not members:
                return
            for pid in members:
                _signal(pid, sign)
            deadline = time.monotonic() + grace
            while time.monotonic() < deadline:
                if self._process.poll() is not None and not _members(self._process.pid):
                    return
                time.sleep(0.02)


def _signal(pid: int, sign: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):  # it may have ended by itself meanwhile
        os.kill(pid, sign)


def _members(leader: int) -> list[int]:
    """Running processes of the leader's session, and their descendants in other sessions."""
    parent, session = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            # The name in brackets may hold blanks and brackets itself; the state follows the last one.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except (OSError, ValueError):
            continue  # ended while we looked
        if fields and fields[0] not in "ZX":
            parent[int(folder.name)], session[int(folder.name)] = int(fields[1]), int(fields[3])
    found = {pid for pid in parent if session[pid] == leader}
    grown = True
    while grown:
        more = {pid for pid, above in parent.items() if above in found and pid not in found}
        grown = bool(more)
        found |= more
    return sorted(found)
