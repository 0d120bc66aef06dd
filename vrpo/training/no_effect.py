"""Arguments that nothing reads in the combination in which they are given: refused, with what they need.

Refused is what looks as if it worked: an argument whose switch is off by default, given without it. At its
default it is never refused, because the file of a run may name every field. Nor is it where somebody turned
the switch off: `save_steps` beside `save_strategy="no"` is a recipe that is tried without its checkpoints.

Every field of the configurations is in one of the three tables, or stands by itself (`BY_ITSELF`); a test
walks them, so that a new field is looked at before it is offered in silence.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from vrpo.objectives.losses import needs_reference

_NO_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")


@dataclass(frozen=True)
class Needs:
    """On what an argument depends.

    told: what is missing, after "does nothing without". holds: of the arguments, whether it is there.
    asks: of a value that is not the default, whether it asks for anything.
    """

    told: str
    holds: Callable[[Any], bool]
    asks: Callable[[Any], bool] = lambda value: True


def _says_anything(value: Any) -> bool:
    """Of a mapping, which some versions of transformers fill with False and 0, or a path."""
    return any(value.values()) if isinstance(value, Mapping) else bool(value)


def _is(name: str) -> Callable[[Any], bool]:
    return lambda args: bool(getattr(args, name, None))


def _word(args: Any, name: str) -> str:
    value = getattr(args, name)
    return str(getattr(value, "value", value))


def _losses(args: Any) -> list[str]:
    """Before they are checked: whatever stands there, as text."""
    losses = args.loss_type
    return [str(name) for name in (losses if isinstance(losses, list | tuple) else [losses])]


def _has_reference(args: Any) -> bool:
    return needs_reference(_losses(args))


def _checkpoints_activations(args: Any) -> bool:
    # The name changed in transformers 5.23.
    return any(getattr(args, f"{what}_checkpointing", False) for what in ("activation", "gradient"))


_EVALUATION = Needs(
    "eval_strategy='steps' or 'epoch', without which training is never interrupted by an evaluation",
    lambda args: _word(args, "eval_strategy") != "no",
)
_CHECKPOINTING = Needs("gradient_checkpointing=True", _checkpoints_activations)
_WORKERS = Needs("dataloader_num_workers of at least 1", _is("dataloader_num_workers"))
_PUSHED = Needs("push_to_hub=True", _is("push_to_hub"))
_PRECOMPUTED = Needs("precompute_ref_log_probs=True", _is("precompute_ref_log_probs"))
_SYNCED = Needs("sync_ref_model=True", _is("sync_ref_model"))
_REFERENCE = Needs("a loss_type that compares with a reference", _has_reference)
_LAYERWISE = Needs(
    "an optim of GaLore's or Apollo's",
    lambda args: any(name in _word(args, "optim") for name in ("galore", "apollo")),
)

NEEDS: dict[str, Needs] = {
    # the schedule of evaluations, and what goes by them
    "eval_steps": Needs("eval_strategy='steps'", lambda args: _word(args, "eval_strategy") == "steps"),
    "eval_delay": _EVALUATION,
    "load_best_model_at_end": _EVALUATION,
    "metric_for_best_model": _EVALUATION,
    "greater_is_better": Needs("metric_for_best_model", _is("metric_for_best_model")),
    "save_strategy": dataclasses.replace(
        _EVALUATION, asks=lambda value: getattr(value, "value", value) == "best"
    ),
    # optimizer
    "warmup_steps": Needs(
        "an lr_scheduler_type that warms up, such as 'constant_with_warmup' for 'constant'; warmup_steps=0 "
        "goes with all",
        lambda args: _word(args, "lr_scheduler_type") not in _NO_WARMUP,
        asks=bool,
    ),
    "optim_target_modules": _LAYERWISE,
    # memory, devices, data loader
    "gradient_checkpointing_kwargs": _CHECKPOINTING,
    "activation_checkpointing_kwargs": _CHECKPOINTING,
    "fsdp_config": Needs("fsdp=True", _is("fsdp"), asks=_says_anything),
    "dataloader_multiprocessing_context": _WORKERS,
    "dataloader_in_order": _WORKERS,
    "streaming_shuffle_buffer": Needs(
        "train_sampling_strategy='random'",
        lambda args: args.train_sampling_strategy == "random",
        asks=bool,
    ),
    # hub; what a call of push_to_hub reads too is not here
    "hub_strategy": _PUSHED,
    "hub_always_push": _PUSHED,
    # reference
    "precompute_ref_batch_size": _PRECOMPUTED,
    "ref_log_probs_cache": _PRECOMPUTED,
    "ref_model_mixup_alpha": _SYNCED,
    "ref_model_sync_steps": _SYNCED,
    "precompute_ref_log_probs": _REFERENCE,
    "sync_ref_model": _REFERENCE,
    "share_trunk": dataclasses.replace(_REFERENCE, asks=bool),
    # losses; label_smoothing is looked after by vrpo.objectives.losses
    "simpo_gamma": Needs("loss_type='simpo'", lambda args: "simpo" in _losses(args)),
}

OF_STREAMS: dict[str, Needs] = {
    "streaming_shuffle_buffer": Needs(
        "a stream (dataset_streaming, or an IterableDataset): this train_dataset is read as a whole",
        lambda args: False,
        asks=bool,
    )
}
"""What only a stream reads; for training sets that are none."""

HARMLESS: dict[str, str] = {
    # field: why it is not refused where nothing reads it
    "logging_steps": "its switch is on by default, so that somebody turned it off",
    "logging_first_step": "its switch is on by default, so that somebody turned it off",
    "save_steps": "its switch is on by default, so that somebody turned it off",
    "save_total_limit": "its switch is on by default, so that somebody turned it off",
    "save_only_model": "its switch is on by default, so that somebody turned it off",
    "save_on_each_node": "one file serves one machine and several",
    "log_on_each_node": "one file serves one machine and several",
    "log_level_replica": "one file serves one process and several",
    "ddp_find_unused_parameters": "one file serves one process and several",
    "ddp_bucket_cap_mb": "one file serves one process and several",
    "ddp_broadcast_buffers": "one file serves one process and several",
    "ddp_static_graph": "one file serves one process and several",
    "ddp_backend": "one file serves one process and several",
    "ddp_timeout": "one file serves one process and several",
    "dataloader_pin_memory": "one file serves CPUs and GPUs",
    "torch_empty_cache_steps": "one file serves CPUs and GPUs",
    "ignore_data_skip": "one command starts a run and goes on with it",
    "restore_callback_states_from_checkpoint": "one command starts a run and goes on with it",
    "per_device_eval_batch_size": "evaluate() and predict() read it without a schedule",
    "prediction_loss_only": "evaluate() and predict() read it without a schedule",
    "eval_do_concat_batches": "evaluate() and predict() read it without a schedule",
    "eval_accumulation_steps": "evaluate() and predict() read it without a schedule",
    "batch_eval_metrics": "evaluate() and predict() read it without a schedule",
    "hub_token": "it may come from the environment, and a copy of the arguments holds a word in its place",
    "hub_model_id": "a call of push_to_hub reads it without push_to_hub=True; the commands refuse it",
    "hub_private_repo": "a call of push_to_hub reads it without push_to_hub=True; the commands refuse it",
    "hub_revision": "a call of push_to_hub reads it without push_to_hub=True; the commands refuse it",
    "run_name": "a callback of one's own may read it; the commands refuse it",
    "project": "a callback of one's own may read it; the commands refuse it",
    "trackio_space_id": "a callback of one's own may read it; the commands refuse it",
    "trackio_bucket_id": "a callback of one's own may read it; the commands refuse it",
    "trackio_static_space_id": "a callback of one's own may read it; the commands refuse it",
    "num_train_epochs": "max_steps is said to go before it",
    "dataset_num_proc": "an evaluation set reads it where the training set is a stream",
    "adam_beta1": "another optimizer than AdamW is somebody's choice",
    "adam_beta2": "another optimizer than AdamW is somebody's choice",
    "adam_epsilon": "another optimizer than AdamW is somebody's choice",
    "dataloader_persistent_workers": "refused by vrpo.training.support",
    "dataloader_prefetch_factor": "refused by transformers",
    "label_smoothing": "refused by vrpo.objectives.losses",
    "optim_args": "refused by vrpo.training.checks",
    "loss_weights": "refused by vrpo.objectives.losses",
    "torch_compile_backend": "it switches torch_compile on",
    "torch_compile_mode": "it switches torch_compile on",
}


BY_ITSELF = frozenset(
    (
        "accelerator_config", "activation_checkpointing", "activation_offloading", "beta", "bf16",
        "data_seed", "dataloader_drop_last", "dataloader_num_workers", "debug", "deepspeed",
        "desirable_weight", "disable_dropout", "disable_tqdm", "drop_unusable_rows",
        "enable_jit_checkpoint", "eval_on_start", "eval_strategy", "fp16", "fsdp", "full_determinism",
        "gradient_accumulation_steps", "gradient_checkpointing", "gradient_mode", "ld_alpha",
        "learning_rate", "log_level", "logging_strategy", "loss_type", "lr_scheduler_kwargs",
        "lr_scheduler_type", "mask_design", "mask_token_id", "masks_per_level", "max_eos_fill",
        "max_grad_norm", "max_length", "max_prompt_length", "max_steps", "max_tokens_per_pack",
        "num_replicates", "num_samples", "output_dir", "pair_masks", "per_device_train_batch_size",
        "precompute_only",
        "push_to_hub", "report_to", "resume_from_checkpoint", "seed", "sft_weight", "skip_memory_metrics",
        "tf32", "torch_compile", "train_top_layers", "training_report", "undesirable_weight", "use_cpu",
        "weight_decay",
    )
)  # fmt: skip
"""Fields that are read whatever the others are."""


def check_effects(args: Any, table: Mapping[str, Needs] = NEEDS, context: Any = None) -> None:
    """ValueError naming the first argument that is given and does nothing, and what it needs.

    args: a dataclass; its fields that the table has are looked at, unless they are at their defaults.
    context: what `Needs.holds` is asked of; None: args.
    """
    context = args if context is None else context
    fields = {field.name: field for field in dataclasses.fields(args)}
    for name, needs in table.items():
        if name not in fields:
            continue
        value = getattr(args, name)
        plain = getattr(value, "value", value)
        if plain is None or plain == _default(fields[name]) or not needs.asks(value):
            continue
        if not needs.holds(context):
            raise ValueError(f"{name}={plain!r} does nothing without {needs.told}")


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return getattr(field.default, "value", field.default)
