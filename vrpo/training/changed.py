"""What was changed between a checkpoint and the run that goes on from it.

The states of optimizer and schedule hold the numbers that they were made with, and loading them brings those
back: a new rate would be told, and not be used. What can be put in after loading is; the rest is refused.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainingArguments

# setting: where each parameter group of an optimizer keeps it
_IN_GROUPS = {
    "weight_decay": "weight_decay",
    "adam_beta1": "betas",
    "adam_beta2": "betas",
    "adam_epsilon": "eps",
}
_FIXED = {
    "optim": "the state of another optimizer does not fit",
    "optim_args": "the checkpoint's optimizer keeps its own",
    "train_top_layers": "the optimizer has no state of other weights",
    "train_sampling_strategy": "the rows of an epoch that is going on would not be those that are left",
    "dataloader_drop_last": "the rows of an epoch that is going on would not be those that are left",
    "streaming_shuffle_buffer": "the rows of a pass that is going on would not be those that are left",
}


def check_changed(changed: Mapping[str, tuple[Any, Any]], *, has_states: bool, is_deepspeed: bool) -> None:
    """ValueError for a setting that a run cannot change midway.

    changed: name -> (before, now). has_states: whether the checkpoint has those of optimizer and schedule.
    """
    for name, (before, now) in changed.items():
        reason = _FIXED.get(name)
        if name.startswith("optim") and not has_states:
            continue
        if is_deepspeed and has_states and name in ("learning_rate", *_IN_GROUPS):
            reason = "DeepSpeed brings the checkpoint's back"
        if reason is not None:
            raise ValueError(
                f"resume_from_checkpoint: {name} was {before!r} and is {now!r} now: {reason}. Give what it "
                "was trained with, or start anew in another output_dir from its weights"
            )


def groups_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The parameter groups without their parameters."""
    return [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]


def apply_changes(
    optimizer: Optimizer,
    schedule: Any,
    as_made: list[dict[str, Any]],
    changed: Iterable[str],
    args: TrainingArguments,
) -> None:
    """Puts what the arguments say into an optimizer and a schedule that were loaded.

    as_made: `groups_of` the optimizer before. Errors: ValueError for another learning_rate with a schedule
    that is no function of the step.
    """
    keys = {_IN_GROUPS[name] for name in changed if name in _IN_GROUPS}
    for group, fresh in zip(optimizer.param_groups, as_made, strict=True):
        group.update({key: fresh[key] for key in keys if key in fresh})
    if "learning_rate" not in changed:
        return
    if not isinstance(schedule, LambdaLR):
        raise ValueError(
            f"resume_from_checkpoint: learning_rate cannot change with lr_scheduler_type="
            f"{args.lr_scheduler_type.value!r}, which goes on from the rate it has reached"
        )
    schedule.base_lrs = [group["initial_lr"] for group in as_made]
    rates = [
        base * factor(schedule.last_epoch)
        for base, factor in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    ]
    for group, base, rate in zip(optimizer.param_groups, schedule.base_lrs, rates, strict=True):
        group["initial_lr"], group["lr"] = base, rate
    schedule._last_lr = rates
