"""Where results go: never onto an input, known to be writable before the work, and never half a file."""

import contextlib
import fnmatch
import json
import math
import os
import secrets
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What libraries read from a model's folder; results may lie beside it.
_MODEL_FILES = (
    *("*config.json", "*.safetensors", "*.bin", "*.pt", "*.index.json", "*tokenizer*", "vocab*", "merges*"),
    *("special_tokens_map.json", "added_tokens.json", "*template*", "*.jinja", "*.py", "*.model", "README*"),
    "trainer_state.json",
)

Inputs = Mapping[str, str | Sequence[str] | None]
"""Argument -> the path or hub name it holds, or several."""


def check_output(
    output: str | Path,
    *,
    models: Inputs | None = None,
    data: Inputs | None = None,
    beside: Sequence[str] = (),
    name: str = "output_file",
) -> list[Path]:
    """The file to write and those beside it, after trying the place. Leaves nothing behind.

    Args:
        output: a file; one that exists is replaced at the end of the work.
        models, data: what the work reads. None of it is an output: not by another spelling, through a link
            or as a hard link, nor a new file in a folder of data or among the files of a model.
        beside: suffixes of further outputs, which replace that of the first.
        name: the argument that `output` comes from.
    Returns: the paths, links resolved, to be handed to `write`.
    Errors: ValueError naming the argument, what it got and what is wrong with it.
    """
    told = f"{name} {os.fspath(output)!r}"
    output = os.path.expanduser(output)
    if output.endswith(("/", os.sep)) or not Path(output).name or os.path.isdir(output):
        raise ValueError(f"{told} must be a file, not a folder")
    try:
        path = Path(os.path.realpath(output))
        paths = [path, *(path.with_suffix(suffix) for suffix in beside)]
        if len({os.fspath(path).casefold() for path in paths}) < len(paths):
            raise ValueError(
                f"{told} must have another suffix: a file ending in {' or '.join(beside)} goes beside it"
            )
        for path in paths:
            _check_target(path, told)
            _check_apart(path, told, models or {}, data or {})
        _try_folder(path.parent)
    except OSError as error:
        raise ValueError(f"{told} cannot be written: {error.strerror or error}") from error
    return paths


def write(contents: Mapping[Path, str | bytes]) -> None:
    """Write every file aside, and give all of them their names at the end: whole files or none.

    Errors: OSError of the file system, naming the file; what was written until then is removed, earlier
        files stay.
    """
    written: dict[Path, Path] = {}
    try:
        for path, content in contents.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            aside = written[path] = _name_aside(path.parent)
            with aside.open("xb") as file:
                file.write(content.encode("utf-8") if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileNotFoundError):
                aside.chmod(stat.S_IMODE(path.stat().st_mode))
        for path, aside in written.items():
            aside.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), os.fspath(path)) from error
    finally:
        for aside in written.values():
            aside.unlink(missing_ok=True)


def to_json(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: a number that is NaN or infinite, which JSON does not know, is null."""

    def finite(part: Any) -> Any:
        if isinstance(part, Mapping):
            return {name: finite(inner) for name, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(inner) for inner in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part

    text = json.dumps(finite(value), indent=indent, allow_nan=False, ensure_ascii=False)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, from a file name say, has no UTF-8; JSON can escape it
        text = json.dumps(finite(value), indent=indent, allow_nan=False)
    return text


def check_output_dir(output_dir: str, *, models: Inputs, data: Inputs) -> None:
    """ValueError if training would write over its own start or into its data.

    Args:
        output_dir: where checkpoints and the model go.
        models, data: what the run starts from. output_dir is neither one of these folders nor inside one; and
            no start is one of output_dir's own checkpoints, which are deleted in turn.
    """
    target = os.path.realpath(os.path.expanduser(output_dir))
    for argument, source in _each(models | data):
        if os.path.isdir(source) and _is_inside(target, source):
            raise ValueError(
                f"output_dir {output_dir!r} must be apart from {argument} {source!r}, which training would "
                "overwrite or mix with its results; choose a folder of its own"
            )
    for argument, source in _each(models):
        folder, base = os.path.split(os.path.realpath(source))
        if os.path.isdir(source) and base.startswith("checkpoint-") and _is_same(folder, target):
            raise ValueError(
                f"output_dir {output_dir!r} must be apart from {argument} {source!r}, which new checkpoints "
                "would replace; choose another one, or resume_from_checkpoint to go on with that run"
            )


def _each(inputs: Inputs) -> Iterator[tuple[str, str]]:
    for argument, value in inputs.items():
        for source in [value] if isinstance(value, str) else value or ():
            yield argument, os.path.expanduser(source)


def _check_target(path: Path, told: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.stat().st_mode):
            raise ValueError(f"{told} must be a regular file: {path} is none")
        if not os.access(path, os.W_OK):
            raise ValueError(f"{told} cannot be written: {path} is write-protected")


def _check_apart(path: Path, told: str, models: Inputs, data: Inputs) -> None:
    """ValueError if writing `path` changes an input."""
    for argument, source in _each(models | data):
        if _is_same(path, source):
            raise ValueError(f"{told} must not overwrite {argument} {source!r}; choose another file")
        if os.path.isdir(source) and any(_is_same(path, file) for file in _files(source, argument in models)):
            raise ValueError(f"{told} must not overwrite a file of {argument} {source!r}; choose another one")
    for argument, source in _each(models):
        is_read = any(fnmatch.fnmatch(path.name, pattern) for pattern in _MODEL_FILES)
        if is_read and os.path.isdir(source) and _is_same(path.parent, source):
            raise ValueError(f"{told} must not be named like a file of {argument} {source!r}, in its folder")
    for argument, source in _each(data):
        if os.path.isdir(source) and _is_inside(os.fspath(path), source):
            raise ValueError(f"{told} must not lie in the folder of {argument} {source!r}: it would be data")


def _files(folder: str, is_model: bool) -> Iterator[str]:
    """Files that are read from a folder: a model's lie at the top, results beside them."""
    if not is_model:
        yield from (os.path.join(place, name) for place, _, names in os.walk(folder) for name in names)
        return
    for name in os.listdir(folder):
        if any(fnmatch.fnmatch(name, pattern) for pattern in _MODEL_FILES):
            yield os.path.join(folder, name)


def _is_same(first: str | Path, second: str | Path) -> bool:
    """Whether two paths are one place, by links, hard links or letter case too; either may not exist."""
    with contextlib.suppress(OSError, ValueError):
        if os.path.samefile(first, second):
            return True
    return os.path.realpath(first) == os.path.realpath(second)


def _is_inside(path: str, folder: str) -> bool:
    """Whether `path`, links resolved, is `folder` or below it."""
    while not _is_same(path, folder):
        if os.path.dirname(path) == path:
            return False
        path = os.path.dirname(path)
    return True


def _try_folder(folder: Path) -> None:
    """Make the folder and a file in it, and take both away again."""
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        aside = _name_aside(folder)
        aside.open("xb").close()
        aside.unlink()
    finally:
        for place in made:
            with contextlib.suppress(OSError):
                place.rmdir()


def _name_aside(folder: Path) -> Path:
    return folder / f".vrpo-{secrets.token_hex(8)}.tmp"
