"""Whether what a trainer is constructed with is of the kind it needs, asked before any work."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedTokenizerBase, TrainerCallback, TrainingArguments

from vrpo.models.adapter_config import require_peft


def check_config(args: Any, kind: type[TrainingArguments]) -> None:
    if not isinstance(args, kind):
        raise ValueError(f"args must be a {kind.__name__}, got {_named(args)}")


def check_reference_argument(ref_model: Any) -> None:
    """Errors: ValueError for what is neither None, a path or hub name, nor a model."""
    if isinstance(ref_model, str | nn.Module | None):
        return
    cure = "; pass it as args=" if isinstance(ref_model, TrainingArguments) else ""
    raise ValueError(f"ref_model must be a model, a path or a hub name, got {_named(ref_model)}{cure}")


def check_arguments(given: Mapping[str, Any]) -> None:
    """ValueError for the first argument of a trainer that is not of its kind; None is none of them.

    Keys: data_collator, eval_dataset, processing_class, callbacks, optimizers, peft_config, compute_metrics,
    model_init.
    """
    for name in ("data_collator", "compute_metrics", "model_init"):
        if given[name] is not None and not callable(given[name]):
            raise ValueError(f"{name} must be a function, got {_named(given[name])}")
    if isinstance(given["eval_dataset"], Mapping):
        for name, dataset in given["eval_dataset"].items():
            if not isinstance(name, str) or dataset is None:
                raise ValueError(
                    f"eval_dataset must map names to datasets, got {_named(name)}: {_named(dataset)}"
                )
    _check_kind("processing_class", given["processing_class"], PreTrainedTokenizerBase, "the tokenizer")
    if given["peft_config"] is not None:
        require_peft("peft_config")
        from peft import PeftConfig

        _check_kind("peft_config", given["peft_config"], PeftConfig, "a peft.LoraConfig")
    _check_callbacks(given["callbacks"])
    _check_optimizers(given["optimizers"])


def check_early_stopping(args: TrainingArguments, callbacks: list[Any]) -> None:
    """ValueError where EarlyStoppingCallback has no metric; a metric needs evaluations (no_effect.py)."""
    if not any(one is EarlyStoppingCallback or isinstance(one, EarlyStoppingCallback) for one in callbacks):
        return
    if args.metric_for_best_model is None:
        raise ValueError("EarlyStoppingCallback needs metric_for_best_model: the metric it watches, got None")


def _check_kind(name: str, value: Any, kind: type, told: str) -> None:
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be {told}, got {_named(value)}")


def _check_callbacks(callbacks: Any) -> None:
    if callbacks is None:
        return
    if not isinstance(callbacks, list | tuple):
        raise ValueError(f"callbacks must be a list of TrainerCallbacks, got {_named(callbacks)}")
    for one in callbacks:
        is_kind = isinstance(one, type) and issubclass(one, TrainerCallback)
        if not (is_kind or isinstance(one, TrainerCallback)):
            raise ValueError(f"callbacks must be TrainerCallbacks, got {_named(one)}")


def _check_optimizers(optimizers: Any) -> None:
    if not isinstance(optimizers, list | tuple) or len(optimizers) != 2:
        raise ValueError(
            f"optimizers must be a pair (optimizer or None, schedule or None), got {_named(optimizers)}"
        )
    for index, (one, told) in enumerate(zip(optimizers, ("optimizer", "schedule"), strict=True)):
        if one is not None and not callable(getattr(one, "step", None)):
            raise ValueError(f"optimizers[{index}] must be a torch {told}, got {_named(one)}")


def _named(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value) if isinstance(value, str | int | float | None) else ""
    return f"{type(value).__name__} {text}".strip() if value is not None else "None"
