"""Copies of the kernels at two revisions, each with its C++ extension, for `python -m benchmarks compare`.

A copy holds what the kernels need (SOURCES) and lies in a cache under its revision, or under a hash of its
files for a working tree. The extension is built once per content of csrc, torch and Python, in a temporary
folder, and moved into the cache when it is whole.
"""

import hashlib
import io
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import torch

SOURCES = ("vrpo_kernels", "csrc", "setup.py", "pyproject.toml", "README.md")
COMPILED = ("csrc", "setup.py")  # what the extension depends on


class BuildError(RuntimeError):
    """A revision that does not exist, or an extension that does not compile."""


def git(repository: Path, *command: str) -> bytes:
    """Standard output of a git command.

    Errors: BuildError with what git says.
    """
    done = subprocess.run(["git", "-C", str(repository), *command], capture_output=True, check=False)
    if done.returncode:
        raise BuildError(f"git {' '.join(command)}: {done.stderr.decode().strip()}")
    return done.stdout


def commit_of(repository: Path, revision: str) -> str:
    """Full hash of a revision."""
    try:
        return git(repository, "rev-parse", "--verify", f"{revision}^{{commit}}").decode().strip()
    except BuildError as error:
        raise BuildError(f"{revision!r} must be a commit of {repository} ({error})") from error


def copy_revision(
    repository: Path, revision: str, cache: Path, sources: tuple[str, ...] = SOURCES, suffix: str = ""
) -> Path:
    """The folder with the sources of a revision; made if the cache has none.

    Args: suffix: of the folder's name, for other sources than the kernels'.
    """
    commit = commit_of(repository, revision)
    target = cache / (commit[:16] + suffix)
    if not target.exists():
        there = git(repository, "ls-tree", "--name-only", commit).decode().split("\n")
        archive = git(repository, "archive", commit, "--", *(name for name in sources if name in there))
        with _whole(target) as folder, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
    return target


def copy_working_tree(repository: Path, cache: Path) -> Path:
    """The folder with the sources as they lie in a checkout, committed or not."""
    files = _files(repository, SOURCES)
    target = cache / f"tree-{_hash(repository, files)}"
    if not target.exists():
        with _whole(target) as folder:
            for file in files:
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(repository / file, folder / file)
    return target


def build_extension(root: Path, cache: Path) -> None:
    """Puts `vrpo_kernels._C` into a copy.

    Errors: BuildError with the end of the compiler's output.
    """
    if list((root / "vrpo_kernels").glob("_C.*")):
        return
    key = _hash(root, _files(root, COMPILED), torch.__version__, sys.implementation.cache_tag)
    kept = cache / f"extension-{key}"
    if not kept.exists():
        print(f"compiling the C++ extension of {root.name} (about a minute)", flush=True)
        with _whole(kept) as folder, tempfile.TemporaryDirectory() as temporary:
            place = Path(temporary) / "source"
            shutil.copytree(root, place)
            command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
            done = subprocess.run(command, cwd=place, capture_output=True, text=True, check=False)
            built = list((place / "vrpo_kernels").glob("_C.*"))
            if done.returncode or not built:
                raise BuildError(f"the C++ extension of {root.name} does not build:\n{done.stderr[-2000:]}")
            shutil.copyfile(built[0], folder / built[0].name)
    (library,) = kept.iterdir()
    shutil.copyfile(library, root / "vrpo_kernels" / library.name)


class _whole:
    """A folder that appears under its name only if nothing failed while it was filled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __enter__(self) -> Path:
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.target.name}-", dir=self.target.parent))
        return self.folder

    def __exit__(self, kind: object, *_more: object) -> None:
        if kind is None and not self.target.exists():
            os.replace(self.folder, self.target)
        else:
            shutil.rmtree(self.folder)


def _files(root: Path, names: tuple[str, ...]) -> list[str]:
    """Source files below these names, sorted, relative to root."""
    found = []
    for name in names:
        path = root / name
        inside = path.rglob("*") if path.is_dir() else [path]
        found += [one.relative_to(root).as_posix() for one in inside if one.is_file()]
    return sorted(one for one in found if "__pycache__" not in one and not one.endswith((".so", ".pyc")))


def _hash(root: Path, files: list[str], *more: str) -> str:
    """Of names and contents."""
    digest = hashlib.sha256("\0".join(more).encode())
    for file in files:
        content = (root / file).read_bytes()
        digest.update(f"\0{file}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:16]
