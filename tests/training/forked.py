"""Runs scripts of this folder in several processes each, as torchrun does, with one start of Python for all.

    python forked.py 2 engine_runs.py OUT a/b -- 4 engine_runs.py OUT c/d

The imports take most of the time of such a test: they are made once, and every process is a fork. Where one
fails the others of its group are given a moment, then ended, and so is this.
"""

import gc
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import engine_runs  # noqa: F401 -- it imports what all scripts need

HERE = Path(__file__).parent
GRACE_SECONDS = 20


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(script: str, arguments: list[str], rank: int, size: int, port: int) -> int:
    """The id of a new process that runs the script."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return pid
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    sys.argv = [script, *arguments]
    code = 0
    try:
        runpy.run_path(str(HERE / script), run_name="__main__")
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(size: int, script: str, arguments: list[str]) -> bool:
    """Whether all processes ended well."""
    port = free_port()
    running = {start(script, arguments, rank, size, port): rank for rank in range(size)}
    deadline, is_good = None, True
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            if status:
                is_good, deadline = False, deadline or time.monotonic() + GRACE_SECONDS
                print(f"process {rank} of {script} ended with {status}", file=sys.stderr)
        elif deadline is not None and time.monotonic() > deadline:
            for other in running:
                os.kill(other, signal.SIGKILL)
            deadline = None
        else:
            time.sleep(0.02)
    return is_good


def main(words: list[str]) -> None:
    groups: list[list[str]] = [[]]
    for word in words:
        if word == "--":
            groups.append([])
        else:
            groups[-1].append(word)
    gc.freeze()  # what is imported stays; the collections of each process need not look at it
    is_good = all(run(int(size), script, arguments) for size, script, *arguments in groups)
    sys.stderr.flush()
    os._exit(0 if is_good else 1)  # extensions complain of what is frozen


if __name__ == "__main__":
    main(sys.argv[1:])
