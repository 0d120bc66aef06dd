"""Kills processes that precompute reference ELBOs, at seeded moments, until one comes through.

Run by `python precompute_killed.py OUT`; prints JSON: kills, half_written (those that left a part half
written), kept (parts that were there at the last start). All is imported once; each run is a fork.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

from precompute_two_processes import build

from vrpo import VRPOTrainer
from vrpo.training import reference_cache

reference_cache.PART_EXAMPLES = 1
write_whole = reference_cache._write_whole


def slowly(path, content):
    """A part lies half written for a while, as on a slow disk."""
    if path.suffix == ".arrow":
        path.with_name(f"{path.name}.tmp").write_bytes(memoryview(content)[:50])
        time.sleep(0.01)
    write_whole(path, content)
    time.sleep(0.005)


def start(folder: Path) -> int:
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        reference_cache._write_whole = slowly
        build(VRPOTrainer, str(folder), 4, adapter=False, precompute_ref_log_probs=True)
        status = 0
    finally:
        os._exit(status)


def files(folder: Path) -> dict[str, bytes]:
    found = {}
    for path in folder.glob("**/*"):
        if path.suffix in (".arrow", ".json") or path.name.endswith(".tmp"):
            try:
                found[str(path.relative_to(folder))] = path.read_bytes()
            except FileNotFoundError:  # renamed meanwhile
                continue
    return found


def main(output_dir: str) -> None:
    straight, broken = Path(output_dir, "straight"), Path(output_dir, "killed")
    build(VRPOTrainer, str(straight), 4, adapter=False, precompute_ref_log_probs=True)
    expected, drawn = files(straight), random.Random(0)
    told = {"kills": 0, "half_written": 0, "kept": 0}
    while True:
        child, already = start(broken), len(files(broken))
        told["kept"] = already
        wanted, status = already + drawn.randint(0, 3), None
        while len(files(broken)) < wanted:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                break
            status = None
        if status is None:
            time.sleep(drawn.random() * 0.02)
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
        found = files(broken)
        half = [name for name in found if name.endswith(".tmp")]
        assert all(content == expected[name] for name, content in found.items() if name not in half)
        if status == 0:
            break
        assert os.WIFSIGNALED(status), status
        told["kills"] += 1
        told["half_written"] += bool(half)
    assert found == expected
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1])
