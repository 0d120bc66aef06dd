"""Checkpoint folders on disk: visible only when whole, found damaged by reading them, deleted in one move.

A checkpoint is written in run_dir/_incomplete and moved to run_dir/checkpoint-N once every byte of it is on
the disk; one that is deleted is moved there first. So a process that dies at any moment leaves each
checkpoint whole or not at all, and what it was at in a place that is never read. The name begins with an
underscore because the Trainer leaves such folders out of what it pushes to the hub.

vrpo_manifest.json says which files a checkpoint has, with a checksum of every byte, to find what the disk or
a person did to it later.
"""

import contextlib
import hashlib
import json
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from vrpo import disk

INCOMPLETE = "_incomplete"
MANIFEST = "vrpo_manifest.json"
STATE_FILES = ("optimizer.pt", "scheduler.pt")
CHECKSUM = "xxh3_128"
_FORMAT = 2
_END = 65536


def checkpoints(run_dir: str | os.PathLike) -> list[Path]:
    """The checkpoint-N folders of run_dir, the highest step first."""
    found = [
        folder
        for folder in Path(run_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if folder.is_dir() and folder.name.rpartition("-")[2].isdecimal()
    ]
    return sorted(found, key=step_of, reverse=True)


def step_of(folder: Path) -> int:
    """N of checkpoint-N."""
    return int(folder.name.rpartition("-")[2])


def incomplete(run_dir: str | os.PathLike) -> Path:
    """Where the checkpoints of run_dir are written, and deleted."""
    return Path(run_dir, INCOMPLETE)


def remove_incomplete(run_dir: str | os.PathLike) -> None:
    """Deletes what a process that died was writing or deleting."""
    shutil.rmtree(incomplete(run_dir), ignore_errors=True)


def names_of(folder: Path) -> list[str]:
    """The files of a checkpoint, but for its manifest."""
    names = [path.relative_to(folder).as_posix() for path in disk.files_of(folder)]
    return [name for name in names if name != MANIFEST]


def checksums(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """By name, of the files that can be read."""
    found = {}
    for name in names:
        with contextlib.suppress(OSError):
            found[name] = disk.checksum(folder / name)
    return found


def publish(aside: Path, folder: Path, known: Mapping[str, str] | None = None) -> None:
    """Moves the checkpoint at `aside`, whose files are synced, to `folder`; replaces what is there.

    Args: known: checksums of its files, as far as they are known.
    """
    _write_manifest(aside, known or {})
    if folder.exists():
        discard(folder)
    os.rename(aside, folder)
    disk.sync(folder.parent)
    _remove_if_empty(aside.parent)


def discard(folder: Path) -> None:
    """Deletes a checkpoint; it is out of sight before its first file goes."""
    aside = incomplete(folder.parent) / f"{folder.name}.deleted"
    shutil.rmtree(aside, ignore_errors=True)
    aside.parent.mkdir(exist_ok=True)
    os.rename(folder, aside)
    shutil.rmtree(aside, ignore_errors=True)
    _remove_if_empty(aside.parent)


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def rotate(run_dir: str | os.PathLike, *, limit: int | None, current: int, best: str | None) -> None:
    """Deletes the oldest checkpoints beyond `limit`; never that of step `current`, nor the folder `best`.

    Checkpoints of later steps than `current` were left by an earlier run that went further, and were passed
    over on resuming: they count as the oldest.
    """
    if limit is None or limit <= 0:
        return
    oldest_first = sorted(
        checkpoints(run_dir), key=lambda folder: (step_of(folder) <= current, step_of(folder))
    )
    kept = [folder for folder in oldest_first if step_of(folder) == current or _is_same(folder, best)]
    spare = [folder for folder in oldest_first if folder not in kept]
    for folder in spare[: max(0, len(oldest_first) - max(limit, len(kept)))]:
        discard(folder)


def _is_same(folder: Path, other: str | None) -> bool:
    return other is not None and Path(other).is_dir() and folder.samefile(other)


def fault_of(
    folder: Path,
    *,
    save_only_model: bool = False,
    is_plain: bool | None = None,
    checksum: Callable[[Path], str] | None = disk.checksum,
) -> str | None:
    """What keeps a run from going on from this checkpoint, as a clause; None if it is whole.

    A checkpoint without a manifest (of transformers' Trainer, or of an earlier version) is whole if the
    files that every checkpoint has are there and can be opened.

    Args:
        save_only_model: allow it to lack the state of the optimizer and the schedule.
        is_plain: written with neither FSDP nor DeepSpeed, which keep states in files of their own. None: not
            known, so the files of the states are looked for in the manifest alone.
        checksum: reads all of a file; None: only the files' names and sizes are compared.
    """
    try:
        return _fault_of_missing(folder, save_only_model, is_plain) or _fault_of_files(
            folder, STATE_FILES if save_only_model else (), checksum
        )
    except OSError as error:
        return f"cannot be read: {error.filename or folder}: {error.strerror or error}"


def _fault_of_missing(folder: Path, save_only_model: bool, is_plain: bool | None) -> str | None:
    if not (folder / "trainer_state.json").is_file():
        return "is no checkpoint, it has no trainer_state.json"
    missing = [name for name in STATE_FILES if not (folder / name).is_file()]
    if not missing or save_only_model or not is_plain:
        return None
    return (
        f"has no {' and no '.join(missing)}, so Adam and the warm-up would start again in the middle; "
        "save_only_model=True allows that"
    )


def _fault_of_files(
    folder: Path, skipped: tuple[str, ...], checksum: Callable[[Path], str] | None
) -> str | None:
    manifest = folder / MANIFEST
    if manifest.is_file():
        try:
            files = json.loads(manifest.read_text(encoding="utf-8"))["files"]
            faults = (
                _fault_of_file(folder, name, told, checksum)
                for name, told in files.items()
                if name not in skipped
            )
            return next((fault for fault in faults if fault is not None), None)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return f"is damaged: {MANIFEST} does not describe a checkpoint ({error!r})"
    return next((fault for path in sorted(folder.iterdir()) if (fault := _fault_of_format(path))), None)


def _fault_of_format(path: Path) -> str | None:
    """Of a file that no manifest tells about: whether it can be opened."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"))
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth") and not zipfile.is_zipfile(path):
            return f"is damaged: {path.name} cannot be opened"
    except (ValueError, SafetensorError) as error:
        return f"is damaged: {path.name} cannot be opened ({error})"
    return None


def _fault_of_file(
    folder: Path, name: str, told: dict[str, Any], checksum: Callable[[Path], str] | None
) -> str | None:
    path = folder / name
    if not path.is_file():
        return f"is damaged: {name} is missing"
    size = path.stat().st_size
    if size != told["size"]:
        return f"is damaged: {name} has {size} of {told['size']} bytes"
    if CHECKSUM not in told:  # format 1
        is_same = _digest_of_ends(path) == told["ends"]
    else:
        is_same = checksum is None or checksum(path) == told[CHECKSUM]
    return None if is_same else f"is damaged: {name} is not the file that was written"


def _write_manifest(folder: Path, known: Mapping[str, str]) -> None:
    files = {
        name: {
            "size": (folder / name).stat().st_size,
            CHECKSUM: known.get(name) or disk.checksum(folder / name),
        }
        for name in names_of(folder)
    }
    path = folder / MANIFEST
    path.write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1) + "\n", encoding="utf-8")
    disk.sync(path)
    disk.sync(folder)


def _digest_of_ends(path: Path) -> str:
    """SHA-256 of the first and the last 64 KiB: the header of a safetensors file, the index of a zip file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(_END))
        if path.stat().st_size > _END:
            file.seek(max(_END, path.stat().st_size - _END))
            digest.update(file.read(_END))
    return digest.hexdigest()
