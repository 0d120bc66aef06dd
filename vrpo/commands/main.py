"""The `vrpo` command: find the command, parse, run, and turn what a user can cause into one line."""

import contextlib
import importlib.metadata
import os
import sys
from collections.abc import Iterator, Sequence

from vrpo.commands.console import say
from vrpo.commands.table import COMMANDS, overview

_HELP = {"-h", "--help"}
_HELP_ALL = {"--help_all", "--help-all"}
_INTERRUPTED = 130  # 128 + SIGINT
_PIPE_CLOSED = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Returns: the exit code: 0; 2 after an error, told in one line on stderr; 130 after Ctrl-C and 143 after
        SIGTERM, in training once a checkpoint is saved; 141 when the reader of standard output left
        (`vrpo train --help | head`).
    """
    _open_standard_streams()
    words = list(sys.argv[1:] if argv is None else argv)
    show_traceback = "--traceback" in words
    words = [word for word in words if word != "--traceback"]
    try:
        _dispatch(words)
        sys.stdout.flush()
    except KeyboardInterrupt:
        if show_traceback:
            raise
        return _fail("interrupted", _INTERRUPTED)
    except SystemExit as error:
        if not hasattr(error, "signum"):  # TrainingInterrupted, which cannot be imported yet
            raise
        return _fail(str(error), error.code)
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _is_stdout_closed():
            return _PIPE_CLOSED
        message = _explain(error)
        if show_traceback or message is None:
            raise
        return _fail(f"error: {message}", 2)
    return 0


def _open_standard_streams() -> None:
    """Give streams that the caller closed (`>&-`), which Python leaves as None, somewhere to go."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 -- open until the process ends


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.flush()
    sys.stderr.write(f"vrpo: {' '.join(message.split())}\n")
    return code


def _explain(error: Exception) -> str | None:
    """What to tell of an error that a user can cause; None for a fault of the program's own."""
    name = type(error).__name__
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename!r}: {error.strerror}"
    if isinstance(error, (ValueError, OSError, FloatingPointError)):
        return str(error) or name
    if isinstance(error, ImportError):
        return f"a package is missing or broken: {error}"
    if type(error).__module__.split(".")[0] == "httpx":
        return f"the network failed: {error or name}"
    if isinstance(error, MemoryError):
        return "out of memory: lower max_tokens_per_pack"
    if name == "OutOfMemoryError" and type(error).__module__.startswith("torch"):
        return (
            f"out of GPU memory: lower max_tokens_per_pack, or use gradient_checkpointing, bf16 or LoRA "
            f"({' '.join(_sentences(str(error), 2))})"
        )
    return None


def _sentences(text: str, number: int) -> Iterator[str]:
    for sentence in text.split(". ")[:number]:
        yield sentence.strip().rstrip(".") + "."


def _is_stdout_closed() -> bool:
    """Whether nobody reads standard output; then nothing more is written to it, at exit neither."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        with contextlib.suppress(OSError, ValueError):  # a stdout without a descriptor, in tests
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in (*_HELP, *_HELP_ALL, "help"):
        return say(overview())
    if words[0] in ("--version", "-V", "version"):
        return say(f"vrpo {importlib.metadata.version('vrpo')}\n")
    name, *argv = words
    if name not in COMMANDS:
        raise ValueError(f"unknown command {name!r}; there are {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    # transformers, imported only now: `vrpo --help` answers at once.
    from vrpo.commands import options, usage

    if (_HELP | _HELP_ALL) & set(argv):
        return say(usage.help_text(command, everything=bool(_HELP_ALL & set(argv))))
    parsed, sections = options.parse(command, argv)
    command.run(*parsed, **sections)
