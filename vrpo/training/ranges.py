"""Ranges of the numbers of a configuration, told in one line each before any work begins."""

import math
import os
from dataclasses import fields
from numbers import Integral, Real
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments

_POSITIVE_INTEGERS = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "num_samples",
    "masks_per_level",
    "num_replicates",
    "max_length",
    "max_prompt_length",
    "max_tokens_per_pack",
    "precompute_ref_batch_size",
    "ref_model_sync_steps",
    "train_top_layers",
    "dataset_num_proc",
    "eval_accumulation_steps",
    "torch_empty_cache_steps",
    "save_total_limit",
    "dataloader_prefetch_factor",
    "ddp_timeout",
)
_NOT_NEGATIVE = (
    "learning_rate",
    "max_grad_norm",
    "warmup_steps",
    "eval_delay",
    "num_train_epochs",
    "dataloader_num_workers",
    "mask_token_id",
    "streaming_shuffle_buffer",
)
_POSITIVE = ("adam_epsilon", "logging_steps", "eval_steps", "save_steps")


def check_numbers(args: TrainingArguments) -> None:
    """ValueError naming the field, what it got and what it needs."""
    types = get_type_hints(type(args))  # not field.type, which HfArgumentParser overwrites
    for field in fields(args):
        value = getattr(args, field.name)
        kinds = _kinds(types[field.name])
        if field.name == "fsdp" and isinstance(value, bool):  # annotated as the text that it was once
            continue
        if kinds <= {str, type(None)} and not isinstance(value, str | os.PathLike | None):
            raise ValueError(f"{field.name} must be a text, got {value!r}")
        if not kinds & {int, float, bool} or kinds - {int, float, bool, type(None)}:
            continue
        if value is None and type(None) in kinds:
            continue
        _check_kind(field.name, value, kinds - {type(None)})
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{field.name} must be a finite number, got {value}")
    for name in _POSITIVE_INTEGERS:
        _require(args, name, lambda value: value >= 1, "at least 1")
    for name in _NOT_NEGATIVE:
        _require(args, name, lambda value: value >= 0, "at least 0")
    for name in _POSITIVE:
        _require(args, name, lambda value: value > 0, "above 0")
    for name in ("adam_beta1", "adam_beta2"):
        _require(args, name, lambda value: 0 <= value < 1, "in [0, 1)")
    for name in ("seed", "data_seed"):
        _require(args, name, lambda value: 0 <= value < 2**32, "in [0, 2**32)")
    _require(
        args, "max_steps", lambda value: value == -1 or value >= 1, "at least 1, or -1 to count by epochs"
    )
    if args.max_steps == -1 and args.num_train_epochs == 0:
        raise ValueError("num_train_epochs must be above 0 where max_steps does not count the steps, got 0")


def _kinds(annotation: Any) -> set:
    if get_origin(annotation) in (Union, UnionType):
        return set(get_args(annotation))
    return {annotation}


def _check_kind(name: str, value: Any, kinds: set) -> None:
    number = isinstance(value, Real) and not isinstance(value, bool)
    if bool in kinds and (isinstance(value, bool) or (number and value in (0, 1))):
        return
    if float in kinds and number:
        return
    if int in kinds and number and isinstance(value, Integral):
        return
    wanted = "a number" if float in kinds else "an integer" if int in kinds else "true or false"
    raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _require(args: TrainingArguments, name: str, holds: Any, wanted: str) -> None:
    value = getattr(args, name, None)
    if value is not None and not isinstance(value, bool) and isinstance(value, Real) and not holds(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")
