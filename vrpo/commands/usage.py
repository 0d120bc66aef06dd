"""What `vrpo <command> --help` prints."""

import dataclasses
import textwrap
from collections.abc import Iterable

from transformers import TrainingArguments

from vrpo.commands.table import Command

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
    "resume_from_checkpoint": "A checkpoint folder to go on from, true for the last whole one in output_dir, "
    "or auto for the same where there is one.",
    "bf16": "",
    "gradient_checkpointing": "Recompute activations in the backward pass to save memory.",
    "seed": "Seed of masks, data order and new weights.",
    "report_to": "Loggers such as wandb or tensorboard; none or all.",
}


def help_text(command: Command, *, everything: bool) -> str:
    """What `vrpo <command> --help` prints; with `everything`, all inherited training fields too."""
    parts = [
        f"vrpo {command.name}: {command.summary}\n\n  {command.example}",
        "  --config file.yaml\n      The fields below, one `name: value` per line; flags override it. What "
        "stands there means what it\n      means behind a flag. Of a flag given twice the last one counts.",
    ]
    if command.defaults:
        parts.append(_wrapped("Defaults", command.defaults))
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
