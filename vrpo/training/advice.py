"""Warnings that a person needs about a run, each once, with its numbers and its cure."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy
from transformers.utils import logging

logger = logging.get_logger(__name__)

DISPLACED = 0.1
"""Nats per token by which the chosen responses may fall behind the reference before it is told."""
_WINDOWS = 3
_SAMPLED = 1000
# Half the spacing of the numbers above |w| is at least |w| * 2^-(bits of the significand + 1).
_ROUNDED_AWAY = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12}


def about_schedule(args: TrainingArguments, max_steps: int, step: int) -> Iterator[str]:
    """step: where the run begins; max_steps: where it ends."""
    if step >= max_steps:
        yield (
            f"no step is taken: the checkpoint is at step {step} and the run ends at step {max_steps}; raise "
            "max_steps or num_train_epochs to go on"
        )
        return
    warmup = args.get_warmup_steps(max_steps)
    if warmup >= max_steps:
        yield (
            f"warmup_steps={args.warmup_steps:g} are not over when the run ends at step {max_steps}: "
            f"learning_rate={args.learning_rate:g} is never reached; lower warmup_steps"
        )
    if args.save_strategy == SaveStrategy.STEPS and 1 <= args.save_steps > max_steps:
        yield (
            f"save_steps={args.save_steps:g} is longer than the run of {max_steps} steps: there is no "
            "checkpoint before its end, so a run that is killed starts anew; lower save_steps"
        )
    if args.eval_strategy == IntervalStrategy.STEPS and args.eval_steps > max_steps:
        yield (
            f"eval_steps={args.eval_steps:g} is longer than the run of {max_steps} steps: there is no "
            "evaluation before its end; lower eval_steps"
        )


def about_rows(args: TrainingArguments, num_rows: int | None) -> Iterator[str]:
    """num_rows: examples of the training set; None where that is not known."""
    batch = args.train_batch_size * args.world_size
    if num_rows is not None and num_rows < batch:
        yield (
            f"the training set has {num_rows} examples, fewer than one batch of all processes, {batch}: "
            "every batch is the whole set; lower per_device_train_batch_size"
        )


def about_rounding(args: TrainingArguments, model: nn.Module) -> Iterator[str]:
    """Adam moves a weight by about the learning rate; less than half the spacing of its numbers is nothing.

    w + u rounds to w for certain if |u| < |w| * 2^-9 in bfloat16 (8 bits of significand) or |w| * 2^-12 in
    float16 (11 bits). Judged by a sample of the trainable weights.
    """
    if "adam" not in getattr(args.optim, "value", str(args.optim)):
        return
    for dtype, share in _ROUNDED_AWAY.items():
        sizes = [
            tensor.detach().flatten()[:: max(1, tensor.numel() // _SAMPLED)].abs().float().cpu()
            for tensor in model.parameters()
            if tensor.requires_grad and tensor.dtype == dtype and tensor.numel()
        ]
        if not sizes:
            continue
        size = torch.cat(sizes)
        stuck = float((args.learning_rate < size * share).float().mean())
        if stuck > 0.5:
            yield (
                f"{stuck:.0%} of the trained weights cannot move: they are {str(dtype)[6:]} of a typical "
                f"size of {float(size.median()):.2g}, and a step of learning_rate={args.learning_rate:g} is "
                f"below half the spacing of such numbers (rate < |w| * {share:.2g}); load the model with "
                "dtype=float32 (bf16=True still computes in bfloat16), or train LoRA adapters in float32"
            )


class Advise(TrainerCallback):
    """Tells what is odd when training begins, and when the chosen responses are displaced."""

    def __init__(self, train_dataset: Any):
        self._num_rows = len(train_dataset) if hasattr(train_dataset, "__len__") else None
        self._gaps: deque[float] = deque(maxlen=_WINDOWS)
        self._told: set[str] = set()

    def _tell(self, state, warnings: Iterable[str]) -> None:
        for text in warnings:
            if state.is_world_process_zero and text not in self._told:
                self._told.add(text)
                logger.warning(text)

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._tell(state, about_schedule(args, state.max_steps, state.global_step))
        self._tell(state, about_rows(args, self._num_rows))
        self._tell(state, about_rounding(args, model))
        self._gaps.clear()

    def on_log(self, args, state, control, logs=None, **kwargs):
        gap = displacement_per_token(logs or {})
        if gap is None:
            return
        self._gaps.append(gap)
        mean = sum(self._gaps) / len(self._gaps)
        if len(self._gaps) == _WINDOWS and mean < -DISPLACED and "displaced" not in self._told:
            self._told.add("displaced")
            self._tell(
                state,
                [
                    f"at step {state.global_step} the chosen responses are {-mean:.2g} nats per token less "
                    f"likely than under the reference (logps/chosen against elbo/ref_chosen, mean of the "
                    f"last {_WINDOWS} logs): the margin grows by making both sides unlikely; raise "
                    "sft_weight, or lower learning_rate"
                ],
            )


def displacement_per_token(logs: dict[str, Any]) -> float | None:
    """(logps/chosen - elbo/ref_chosen) over the mean length that the per-token ELBO implies; nats.

    None where these were not logged.
    """
    names = ("logps/chosen", "elbo/ref_chosen", "elbo/chosen_per_token")
    policy, reference, per_token = (logs.get(name) for name in names)
    if policy is None or reference is None or not per_token or not policy:
        return None
    return (policy - reference) * per_token / policy
