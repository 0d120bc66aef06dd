"""Which of the inherited TrainingArguments work here, which are refused and why, which mean nothing.

Every field of transformers' TrainingArguments is in one of the three tables; a test walks them, so that a
field of a newer transformers is looked at before it is offered in silence.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import ReduceLROnPlateau
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations

_NO_LABELS = "there are no labels: the targets are the masked tokens themselves"
_TRIED_STEPS = 10

REFUSED: dict[str, tuple[Callable[[Any], bool], str]] = {
    # field: (which values are refused, why and what to do)
    "neftune_noise_alpha": (
        bool,
        "it adds noise to the policy's embeddings and not to the reference's, which a score of "
        "policy against reference does not survive",
    ),
    "label_smoothing_factor": (bool, f"{_NO_LABELS}, and their ELBO would be one no longer"),
    "label_names": (lambda value: value is not None, _NO_LABELS),
    "train_sampling_strategy": (
        lambda value: value not in ("random", "sequential"),
        "packs have no padding, so grouping by length gains nothing, and several processes get equally long "
        "batches anyway; use 'random' or 'sequential'",
    ),
    "bf16_full_eval": (bool, "it rounds the policy's weights for good, and no reference's; use bf16=True"),
    "fp16_full_eval": (bool, "it rounds the policy's weights for good, and no reference's; use bf16=True"),
    "use_liger_kernel": (bool, "it patches classes of transformers that LLaDA does not use"),
    "liger_kernel_config": (bool, "it belongs to use_liger_kernel, which knows no LLaDA"),
    "use_cache": (bool, "a bidirectional model has no key-value cache"),
    "include_num_input_tokens_seen": (
        lambda value: value not in (False, "no"),
        "batches hold packs and no input_ids; vrpo/tokens_per_second counts the packed tokens",
    ),
    "include_for_metrics": (
        bool,
        "compute_metrics gets every metric of every example in predictions, 'loss' too, and the example "
        "ids in label_ids; there are no padded inputs to hand over",
    ),
    "eval_use_gather_object": (bool, "predictions are tensors by name, which are gathered as such"),
    "auto_find_batch_size": (
        bool,
        "it would change the batch of the optimizer step without lowering memory: lower max_tokens_per_pack, "
        "which never changes the loss",
    ),
    "parallelism_config": (
        lambda value: value is not None,
        "a pack is not divided over devices; use DDP or FSDP",
    ),
    "remove_unused_columns": (bool, "must be False: the collator reads columns by name"),
    "optim": (
        lambda value: getattr(value, "value", value) in ("lomo", "adalomo"),
        "it steps inside backward, before the gradients of the other micro-batches are there",
    ),
}

IRRELEVANT: dict[str, str] = {
    "length_column_name": "read by group_by_length alone, which is refused",
    "logging_nan_inf_filter": "a loss that is not finite stops training",
    "average_tokens_across_devices": "the loss is a mean over all examples of all devices, always",
    "do_train": "for scripts; the trainer does not read it",
    "do_eval": "for scripts; the trainer does not read it",
    "do_predict": "for scripts; the trainer does not read it",
    "local_rank": "set by the launcher",
}

WORKS = frozenset(
    {
        # what and how long
        "output_dir",
        "per_device_train_batch_size",
        "num_train_epochs",
        "max_steps",
        "gradient_accumulation_steps",
        "seed",
        "data_seed",
        "full_determinism",
        # optimizer
        "learning_rate",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "warmup_steps",
        "optim_args",
        "optim_target_modules",
        "weight_decay",
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "max_grad_norm",
        # precision, memory, devices
        "bf16",
        "fp16",
        "tf32",
        "activation_checkpointing",
        "activation_checkpointing_kwargs",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "torch_compile",
        "torch_compile_backend",
        "torch_compile_mode",
        "torch_empty_cache_steps",
        "use_cpu",
        "accelerator_config",
        "ddp_find_unused_parameters",
        "ddp_bucket_cap_mb",
        "ddp_broadcast_buffers",
        "ddp_static_graph",
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "debug",
        "skip_memory_metrics",
        # logging
        "logging_strategy",
        "logging_steps",
        "logging_first_step",
        "log_on_each_node",
        "log_level",
        "log_level_replica",
        "disable_tqdm",
        "report_to",
        "run_name",
        "project",
        "trackio_space_id",
        "trackio_bucket_id",
        "trackio_static_space_id",
        # evaluation
        "eval_strategy",
        "eval_steps",
        "eval_delay",
        "per_device_eval_batch_size",
        "prediction_loss_only",
        "eval_on_start",
        "eval_do_concat_batches",
        "eval_accumulation_steps",
        "batch_eval_metrics",
        # checkpoints
        "save_only_model",
        "save_strategy",
        "save_steps",
        "save_on_each_node",
        "save_total_limit",
        "enable_jit_checkpoint",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
        "resume_from_checkpoint",
        # hub
        "push_to_hub",
        "hub_token",
        "hub_private_repo",
        "hub_model_id",
        "hub_strategy",
        "hub_always_push",
        "hub_revision",
        # data loader
        "dataloader_drop_last",
        "dataloader_num_workers",
        "dataloader_pin_memory",
        "dataloader_persistent_workers",
        "dataloader_prefetch_factor",
        "dataloader_multiprocessing_context",
        "dataloader_in_order",
    }
)


def check_runnable(args: TrainingArguments) -> None:
    """ValueError for a logger, a schedule or a decay that would fail once training begins."""
    wanted = [args.report_to] if isinstance(args.report_to, str) else args.report_to or []
    for name in wanted:
        if name not in INTEGRATION_TO_CALLBACK:
            known = ", ".join(sorted(INTEGRATION_TO_CALLBACK))
            raise ValueError(f"report_to must be none, all or some of {known}; got {name!r}")
        if name not in get_available_reporting_integrations():
            raise ValueError(f"report_to={name} needs the package {name}, which is not installed")
    if not args.weight_decay >= 0:
        raise ValueError(f"weight_decay must be at least 0, got {args.weight_decay}")
    _check_scheduler(args)


def check_supported(args: TrainingArguments) -> None:
    """ValueError for the first argument that would do nothing, or harm, with the reason."""
    for name, (is_refused, reason) in REFUSED.items():
        value = getattr(args, name, None)
        if is_refused(value):
            raise ValueError(f"{name}={getattr(value, 'value', value)!r} is not supported: {reason}")
    if args.fp16 and args.device.type == "cpu":
        raise ValueError("fp16=True does nothing on a CPU: use bf16=True, or fp32")
    if args.accelerator_config.dispatch_batches:
        raise ValueError(
            "accelerator_config: dispatch_batches is not supported: a pack is not divided over processes"
        )
    if not args.accelerator_config.use_seedable_sampler:
        raise ValueError(
            "accelerator_config: use_seedable_sampler=False is not supported: the order of an epoch would "
            "hang on the random state at its start, and a resumed run would take other rows"
        )
    if args.dataloader_persistent_workers and not args.dataloader_num_workers:
        raise ValueError("dataloader_persistent_workers needs dataloader_num_workers of at least 1")


def _check_scheduler(args: TrainingArguments) -> None:
    """The schedule is built at the start of training; its arguments are tried before any work."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=args.learning_rate)
    try:
        schedule = get_scheduler(
            args.lr_scheduler_type,
            optimizer,
            num_warmup_steps=1,
            num_training_steps=_TRIED_STEPS,
            scheduler_specific_kwargs=dict(args.lr_scheduler_kwargs or {}),
        )
        for _ in range(_TRIED_STEPS):  # most arguments are read after the warm-up only
            optimizer.step()
            schedule.step(*([0.0] if isinstance(schedule, ReduceLROnPlateau) else []))
            if not math.isfinite(optimizer.param_groups[0]["lr"]):
                raise ValueError(f"the rate becomes {optimizer.param_groups[0]['lr']}")
    except Exception as error:
        raise ValueError(
            f"lr_scheduler_kwargs={args.lr_scheduler_kwargs} do not fit lr_scheduler_type="
            f"{args.lr_scheduler_type.value!r}: {' '.join(str(error).split())}"
        ) from error
