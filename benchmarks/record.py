"""Where, when and from which revision a figure comes, and the CSV files it goes to."""

import csv
import datetime
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"

REVISION_VARIABLE = "VRPO_REVISION"
"""Environment variable with the revision of a copy of the sources without a git repository. `make gpu` sets
it for its stages, some of which are other commands; nothing but the column `git` depends on it."""


def output_of(*command: str) -> str:
    """Standard output of a command; empty if it fails, hangs or does not exist."""
    options = {"capture_output": True, "text": True, "cwd": Path(__file__).parent, "timeout": 20}
    try:
        return subprocess.run(command, check=True, **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def revision() -> tuple[str, str]:
    """(short git revision, whether tracked files outside the results differ from it).

    What the caller passed by REVISION_VARIABLE goes first; without it and without a repository, "unknown".
    The second is then empty: nobody can tell.
    """
    passed = os.environ.get(REVISION_VARIABLE)
    head = "" if passed else output_of("git", "rev-parse", "--short", "HEAD")
    if not head:
        return passed or "unknown", ""
    changed = output_of("git", "status", "--porcelain", "--untracked-files=no", "--", "..", ":!results")
    return head, str(bool(changed))


def now() -> str:
    """Date and time of a figure, UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def provenance(device: str) -> dict[str, str]:
    """When, from which revision, on what. dirty: uncommitted changes outside the result files."""
    installed = importlib.util.find_spec("triton") is not None
    git, dirty = revision()
    return {
        "date": now(),
        "git": git,
        "dirty": dirty,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "torch": torch.__version__,
        "triton": importlib.metadata.version("triton") if installed else "-",
    }


def cpu_name() -> str:
    """Model name, family and model number (hypervisors hide names), and what torch dispatches to."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return platform.processor()
    first = path.read_text().split("\n\n")[0]
    facts = dict(line.split(":", 1) for line in first.splitlines() if ":" in line)
    facts = {key.strip(): value.strip() for key, value in facts.items()}
    name = facts.get("model name", platform.processor())
    numbers = f" (family {facts['cpu family']} model {facts['model']})" if "cpu family" in facts else ""
    return f"{name}{numbers}, {torch.backends.cpu.get_cpu_capability()}"


def append(rows: Iterable[dict], path: Path, fields: Sequence[str]) -> None:
    """Append rows to a CSV file, with a header if it is new. Missing fields stay empty.

    The file is closed again, so rows that were appended survive the end of the process, whatever ends it.

    Errors:
        ValueError if a row has a field that is not in `fields`, or the file has another header.
    """
    check_columns(path, fields)
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = not path.exists() or not path.stat().st_size
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fields)
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def check_columns(path: Path, fields: Sequence[str]) -> None:
    """ValueError if the file has another header than `append` would write: before anything is measured."""
    if not path.exists() or not path.stat().st_size:
        return
    with path.open(newline="") as stream:
        header = next(csv.reader(stream))
    if header != list(fields):
        raise ValueError(f"{path} has the columns {header}, the new rows have {list(fields)}")
