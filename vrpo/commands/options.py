"""Command line and --config file -> dataclasses, and the help text. Knows no command in particular."""

import argparse
import dataclasses
import difflib
import json
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

# Inherited fields that a first run sets, and what they mean; --help shows these and hides the other hundred.
# Empty: the field's own text is good.
COMMON_TRAINING_FIELDS = {
    "output_dir": "Folder for checkpoints and the final model.",
    "num_train_epochs": "",
    "max_steps": "Optimizer steps; a positive number replaces num_train_epochs.",
    "per_device_train_batch_size": "Examples per device and batch.",
    "gradient_accumulation_steps": "Batches per optimizer step.",
    "learning_rate": "",
    "warmup_steps": "",
    "lr_scheduler_type": "",
    "weight_decay": "",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "logging_steps": "Steps between log lines.",
    "eval_strategy": "When to evaluate besides the end: no, steps or epoch.",
    "eval_steps": "Steps between evaluations.",
    "save_steps": "Steps between checkpoints.",
    "save_total_limit": "Checkpoints to keep.",
    "resume_from_checkpoint": "A checkpoint folder to go on from, or true for the last one in output_dir.",
    "bf16": "",
    "gradient_checkpointing": "Recompute activations in the backward pass to save memory.",
    "seed": "Seed of masks, data order and new weights.",
    "report_to": "Loggers such as wandb or tensorboard; none or all.",
}


@dataclass(frozen=True)
class Command:
    """One subcommand of `vrpo`.

    name, summary: for the overview. example: shown in the help.
    run: called with the parsed dataclasses, in the order of `groups`, then the config file's sections.
    groups: heading of the help -> dataclass whose fields are flags.
    sections: mappings that may stand in the config file without being flags, with what they hold.
    """

    name: str
    summary: str
    example: str
    run: Callable[..., None]
    groups: Mapping[str, type]
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)


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


def overview(commands: Iterable[Command]) -> str:
    """What `vrpo --help` prints."""
    lines = "\n".join(f"  {command.name:<10}{command.summary}" for command in commands)
    return (
        "Preference training for masked-diffusion language models (VRPO).\n\n"
        f"usage: vrpo <command> [--config file.yaml] [--field value ...]\n\n{lines}\n\n"
        "`vrpo <command> --help` explains a command; --traceback shows where an error came from.\n"
    )


def help_text(command: Command, *, everything: bool) -> str:
    """What `vrpo <command> --help` prints; with `everything`, all inherited training fields too."""
    parts = [
        f"vrpo {command.name}: {command.summary}\n\n  {command.example}",
        "  --config file.yaml\n      The fields below, one `name: value` per line; flags override it.",
    ]
    for name, text in command.sections.items():
        parts.append(_wrapped(f"{name}: in the config file only", text))
    inherited = {field.name for field in dataclasses.fields(TrainingArguments)}
    hidden = 0
    for heading, group in command.groups.items():
        fields = dataclasses.fields(group)
        own = [f for f in fields if f.name not in inherited]
        parts.append(_section(heading, own))
        rest = [f for f in fields if f.name in inherited]
        if everything:
            parts += [_section("Training (transformers.TrainingArguments)", rest)] if rest else []
            continue
        by_name = {f.name: f for f in rest}
        shown = [
            _describe(by_name[name], text) for name, text in COMMON_TRAINING_FIELDS.items() if name in by_name
        ]
        if shown:
            parts.append("\n".join(["Training (the usual ones):", *shown]))
        hidden += len(rest) - len(shown)
    if hidden:
        parts.append(f"{hidden} more fields of transformers.TrainingArguments: --help_all")
    return "\n\n".join(parts) + "\n"


def _section(heading: str, fields: Iterable[dataclasses.Field]) -> str:
    return "\n".join([f"{heading}:", *map(_describe, fields)])


def _describe(field: dataclasses.Field, text: str = "") -> str:
    default = field.default
    if field.default_factory is not dataclasses.MISSING:
        default = field.default_factory()
    if default is dataclasses.MISSING:
        value = " (required)"
    elif default is None or default == "":
        value = ""
    else:
        value = f" (default {getattr(default, 'value', default)})"
    return _wrapped(f"--{field.name}{value}", text or field.metadata.get("help", ""))


def _wrapped(title: str, text: str) -> str:
    body = textwrap.fill(" ".join(text.split()), width=96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return f"  {title}\n{body}" if body else f"  {title}"
