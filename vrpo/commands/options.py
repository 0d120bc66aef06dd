"""Command line and --config file -> dataclasses. Knows no command in particular."""

import argparse
import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser

from vrpo.commands.table import Command


class _Parser(HfArgumentParser):
    """Raises what argparse would print before it exits."""

    def error(self, message: str) -> None:
        raise ValueError(message)


def parse(command: Command, argv: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Flags, and the file behind --config, as instances of the command's dataclasses.

    A flag overrides the file. File values go through the same conversions as flags, so 5e-7, which YAML
    takes for a string, is a number.

    Returns: one instance per dataclass of `command.groups`, and the sections of the file.
    Errors: ValueError naming an unknown field or flag, with close matches, or a value of a wrong type.
    """
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    known, flags = before.parse_known_args(argv)
    parser = _Parser(list(command.groups.values()), add_help=False, allow_abbrev=False)
    names = [field.name for group in command.groups.values() for field in dataclasses.fields(group)]
    settings, sections = _read_config(known.config, names, command.sections)
    parser.set_defaults(**{name: None for name, value in settings.items() if value is None})
    _check_flags(flags, names)
    *parsed, unknown = parser.parse_args_into_dataclasses(
        [*_as_flags(settings), *flags], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r}: flags start with --")
    return parsed, sections


def _check_flags(words: Sequence[str], names: Sequence[str]) -> None:
    """ValueError for an unknown flag, before argparse complains of a required one that was misspelt."""
    for word in words:
        if not word.startswith("--"):
            continue
        name = word[2:].partition("=")[0].replace("-", "_")
        if name not in names and name.removeprefix("no_") not in names:
            raise ValueError(f"unknown flag {word}{_close_matches(name, names, '--')}")


def _read_config(
    path: str | None, names: Iterable[str], sections: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Fields and sections of a YAML file; two empty mappings without one."""
    if path is None:
        return {}, {}
    if not Path(path).is_file():
        raise FileNotFoundError(f"config {path!r}: no such file")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"config {path!r} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"config {path!r} must map field names to values, got {settings!r}")
    known = {*names, *sections}
    for name in settings:
        if name not in known:
            raise ValueError(f"config {path!r}: unknown field {name!r}{_close_matches(name, known)}")
    found = {name: settings.pop(name) for name in sections if name in settings}
    return settings, found


def _close_matches(name: Any, known: Iterable[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(str(name), list(known), n=3)
    if not matches:
        return "; see --help and --help_all"
    return "; did you mean " + " or ".join(prefix + match for match in matches) + "?"


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
    flags: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            flags.append(f"--{name}={json.dumps(value)}")
        else:
            flags.append(f"--{name}={value}")
    return flags
