"""Command line and --config file -> dataclasses. Knows no command in particular."""

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import HfArgumentParser
from transformers.trainer_pt_utils import AcceleratorConfig

from vrpo.commands.config_file import Kind, Setting, UnknownFieldError, read_config
from vrpo.commands.table import Command

_TRUE = ("true", "yes", "on", "t", "y", "1")
_FALSE = ("false", "no", "off", "f", "n", "0")


def parse(command: Command, argv: Sequence[str]) -> tuple[list[Any], dict[str, Any]]:
    """Flags, and the file behind --config, as instances of the command's dataclasses.

    A flag overrides the file; of a flag given twice the last one counts. What stands in the file goes through
    the same conversions as flags, as the text it is: 5e-7 is a number, `no` a word where a word is meant.

    Returns: one instance per dataclass of `command.groups`, and the sections of the file.
    Errors: ValueError naming an unknown field or flag, with close matches, or a value of a wrong type.
    """
    path, flags = _take_config(argv)
    groups = list(command.groups.values())
    kinds = {name: _kind(hint) for group in groups for name, hint in _fields(group).items()}
    settings, sections = _read_config(path, kinds, command.sections)
    negatable = {f.name for group in groups for f in dataclasses.fields(group) if f.default is True}
    flags = _check_flags(flags, kinds, {f"no_{name}" for name in negatable if kinds[name].is_bool})
    parser = _Parser(groups, kinds, settings)
    nulls = {name: None for name, setting in settings.items() if setting.words is None}
    parser.set_defaults(**nulls)
    try:
        words = [*_as_flags(settings), *flags]
        *parsed, unknown = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except ValueError as error:
        raise ValueError(f"{error}{_origin(str(error), path, settings, flags)}") from error
    if unknown:
        raise ValueError(f"unexpected argument {unknown[0]!r}: flags start with --")
    for group in parsed:
        _check_not_overwritten(path, getattr(group, "output_file", None))
    return parsed, sections


class _Parser(HfArgumentParser):
    """Takes what the fields take, and raises what argparse would print before it exits."""

    def __init__(self, groups: list[type], kinds: Mapping[str, Kind], settings: Mapping[str, Setting]):
        super().__init__(groups, add_help=False, allow_abbrev=False)
        self.kinds = kinds
        defaults = {f.name: f.default for group in groups for f in dataclasses.fields(group)}
        for action in self._actions:
            kind = kinds[action.dest]
            if action.default is None and defaults[action.dest] not in (dataclasses.MISSING, ""):
                action.default = defaults[action.dest]  # HfArgumentParser forgets those of lists
            if action.type is int:
                action.type = _integer
            elif action.type is float:
                action.type = _number
            elif kind.is_bool and action.type is not None:
                action.type, action.nargs, action.const = _boolean, "?", True
            elif kind.is_mapping:
                action.type = _checked_mapping(action.dest, action.type is dict)
            elif action.type is str and defaults[action.dest] != "" and action.dest != "prompt":
                action.type = _word
            if kind.is_list:
                action.nargs = "+"

    def parse_known_args(self, args=None, namespace=None):
        namespace, rest = super().parse_known_args(args, namespace)
        for name, value in vars(namespace).items():
            if isinstance(value, list) and len(value) == 1 and not self.kinds[name].is_only_list:
                setattr(namespace, name, value[0])
        return namespace, rest

    def error(self, message: str) -> None:
        raise ValueError(message)


def _integer(word: str) -> int:
    try:
        value = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid int value: {word!r}") from None
    if not -(2**63) <= value < 2**63:
        raise argparse.ArgumentTypeError(f"invalid int value: {word[:30]!r} has more than 64 bits")
    return value


def _number(word: str) -> float:
    try:
        value = float(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid float value: {word!r}") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"invalid float value: {word!r} is not finite")
    return value


def _boolean(word: str | bool) -> bool:
    if isinstance(word, bool):
        return word
    if word.lower() not in (*_TRUE, *_FALSE):
        raise argparse.ArgumentTypeError(f"invalid bool value: {word!r}; true or false is needed")
    return word.lower() in _TRUE


def _word(word: str) -> str:
    if not word.strip():
        raise argparse.ArgumentTypeError("the value is empty")
    return word


def _mapping(word: str) -> str:
    """A JSON object, or the path of a file with one; handed on as it is."""
    if not word.lstrip().startswith("{"):
        if Path(word).is_file():
            return word
        raise argparse.ArgumentTypeError(
            f"needs a JSON object such as '{{\"name\": 1}}', or a file; got {word!r}"
        )
    try:
        json.loads(word)
    except (ValueError, RecursionError) as error:
        raise argparse.ArgumentTypeError(f"is no JSON object: {error} in {word[:80]!r}") from None
    return word


def _checked_mapping(name: str, as_dict: bool) -> Callable[[str], Any]:
    known = {field.name for field in dataclasses.fields(AcceleratorConfig)}

    def convert(word: str) -> Any:
        found = _mapping(word)
        if name == "accelerator_config" and word.lstrip().startswith("{"):
            for key in json.loads(word):
                if key not in known:
                    raise argparse.ArgumentTypeError(
                        f"unknown key {key!r}; there are {', '.join(sorted(known))}"
                    )
        return json.loads(found) if as_dict else found

    return convert


def _fields(group: type) -> dict[str, Any]:
    hints = get_type_hints(group)
    return {field.name: hints[field.name] for field in dataclasses.fields(group) if field.init}


def _kind(hint: Any) -> Kind:
    parts = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    origins = [get_origin(part) or part for part in parts]
    others = [origin for origin in origins if origin not in (list, type(None))]
    return Kind(
        is_list=list in origins,
        is_only_list=list in origins and not others,
        is_mapping=dict in origins,
        is_optional=type(None) in origins,
        is_bool=bool in origins,
        is_int=int in origins and bool not in origins,
    )


def _take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other words."""
    paths, rest, words = [], [], iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if name != "--config":
            rest.append(word)
            continue
        paths.append(value if equals else next(words, ""))
        if not paths[-1] or (not equals and paths[-1].startswith("--")):
            raise ValueError("--config needs the path of a YAML file")
    if len(paths) > 1:
        raise ValueError(f"--config is given twice, as {' and '.join(map(repr, paths))}; give one file")
    return (paths[0] if paths else None), rest


def _check_not_overwritten(config: str | None, output_file: str | None) -> None:
    if config is None or output_file is None or not os.path.exists(config):
        return
    output = Path(output_file).expanduser()
    for path in (output, output.with_suffix(".summary.json") if output.name else output):  # YAML may be JSON
        if path.exists() and path.samefile(config):
            raise ValueError(f"output_file {output_file!r} must not overwrite --config {config!r}")


def _check_flags(words: Sequence[str], kinds: Mapping[str, Kind], negations: set[str]) -> list[str]:
    """The words, negative numbers joined to their flags, which argparse would take for flags otherwise.

    Errors: ValueError for an unknown flag, before argparse complains of a required one that was misspelt.
    """
    checked: list[str] = []
    for word in words:
        if re.match(r"-(\d|\.\d|inf|nan)", word, re.IGNORECASE) and checked and _is_flag(checked[-1]):
            checked[-1] += f"={word}"
            continue
        checked.append(word)
        if not word.startswith("--"):
            continue
        name = word[2:].partition("=")[0].replace("-", "_")
        if name in kinds or name in negations:
            continue
        positive = name.removeprefix("no_")
        if positive in kinds and kinds[positive].is_bool:
            raise ValueError(f"unknown flag {word}; did you mean --{positive}=false?")
        raise ValueError(f"unknown flag {word}{_close_matches(name, kinds, '--')}")
    return checked


def _is_flag(word: str) -> bool:
    return word.startswith("--") and "=" not in word


def _read_config(
    path: str | None, kinds: Mapping[str, Kind], sections: Mapping[str, str]
) -> tuple[dict[str, Setting], dict[str, Any]]:
    """Fields and sections of a YAML file; two empty mappings without one."""
    if path is None:
        return {}, {}
    try:
        return read_config(path, kinds, sections)
    except UnknownFieldError as error:
        raise ValueError(f"{error}{_close_matches(error.name, {*kinds, *sections})}") from None


def _close_matches(name: str, known: Iterable[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, list(known), n=3)
    if not matches:
        return "; see --help and --help_all"
    return "; did you mean " + " or ".join(prefix + match for match in matches) + "?"


def _as_flags(settings: Mapping[str, Setting]) -> list[str]:
    flags: list[str] = []
    for name, setting in settings.items():
        if setting.words is None:
            continue
        first, *more = setting.words
        # Behind an equals sign a word may begin with a dash; of a list only the first one can stand there.
        flags += [f"--{name}={first}"] if not more else [f"--{name}", first, *more]
    return flags


def _origin(message: str, path: str | None, settings: Mapping[str, Setting], flags: Sequence[str]) -> str:
    """Where in the file the argument stands that argparse complains of."""
    named = re.match(r"argument --(\w+)", message)
    if named is None or named[1] not in settings:
        return ""
    if any(flag[2:].partition("=")[0].replace("-", "_") == named[1] for flag in flags if flag[:2] == "--"):
        return ""
    return f" (config {path!r}, line {settings[named[1]].line})"
