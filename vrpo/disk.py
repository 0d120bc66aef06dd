"""Files that are whole or not there: written aside, brought to the disk, and only then given their name."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import xxhash
from safetensors import SafetensorError

_BLOCK = 1 << 22
# What a model's folder holds its weights in; a reader prefers one file to several.
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "model-[0-9]*-of-[0-9]*.safetensors")


def files_of(folder: Path) -> list[Path]:
    """Every file under a folder, in the order of their paths."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def sync(path: Path) -> None:
    """Returns once a file, or the names that a folder holds, are on the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Returns once every file and folder under `folder`, and its name in its parent, is on the disk."""
    for path in (*files_of(folder), *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)
    sync(folder.parent)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """A file that appears with all of its content; what a killed process left aside is overwritten.

    Errors: OSError naming the file.
    """
    aside = path.with_name(f"{path.name}.tmp")
    try:
        with aside.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
        sync(path.parent)
    except OSError as error:  # of a write, the system's names none
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_folder(aside: Path, folder: Path) -> None:
    """Gives the folder at `aside` the name `folder`, once its files are on the disk.

    An old folder of that name is out of sight before its first file goes. A process that dies leaves the old
    one, the new one or none.
    """
    sync_files(aside)
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(aside, folder)
    sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def move_files(aside: Path, folder: Path) -> None:
    """Moves the files of a model at `aside` into `folder`, each whole, once all are on the disk.

    Weights of an earlier model that a reader would take instead, or beside, are deleted.
    """
    sync_files(aside)
    moved = [(path, folder / path.relative_to(aside)) for path in files_of(aside)]
    for path, target in moved:
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
    targets = {target for _, target in moved}
    earlier = {path for pattern in _WEIGHTS for path in folder.glob(pattern)}
    if earlier & targets:
        for path in earlier - targets:
            path.unlink()
    sync(folder)
    shutil.rmtree(aside, ignore_errors=True)


def checksum(path: Path) -> str:
    """XXH3 of every byte of a file, 128 bits in hexadecimal: against damage, not against forgery."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(_BLOCK, os.fstat(file.fileno()).st_size + 1)))
        while count := file.readinto(block):
            digest.update(block[:count])
    return digest.hexdigest()


def is_of_writing(error: Exception) -> bool:
    """Whether an error is of a file that could not be written; safetensors and torch.save have their own."""
    if isinstance(error, RuntimeError):
        return any(
            word in str(error) for word in ("PytorchStreamWriter", "inline_container", "unexpected pos")
        )
    return isinstance(error, OSError | SafetensorError)


def reason_of(error: Exception) -> str:
    """What such an error tells, in one line."""
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    name = getattr(error, "filename", None)
    return f"{name}: {reason}" if name else reason


@contextlib.contextmanager
def writing(aside: Path, told: str) -> Iterator[None]:
    """Around the writing of a folder aside; where it fails, OSError "told: reason", and room again."""
    shutil.rmtree(aside, ignore_errors=True)
    try:
        yield
    except Exception as error:
        shutil.rmtree(aside, ignore_errors=True)
        if not is_of_writing(error):
            raise
        raise OSError(f"{told}: {reason_of(error)}") from error
