"""Which rows of the training set a run will train on, in which epoch: known before its first step."""

import math
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.data_loader import SeedableRandomSampler
from torch.utils.data import RandomSampler, Sampler, SequentialSampler
from transformers import TrainingArguments

from vrpo.training.balance import BalancedSampler
from vrpo.training.trainer import DiffusionTrainer


def steps_per_epoch(args: TrainingArguments, num_examples: int, accelerator: Accelerator) -> int:
    """Optimizer steps of an epoch, as transformers.Trainer counts them."""
    count = num_examples / args.train_batch_size
    batches = math.floor(count) if args.dataloader_drop_last else math.ceil(count)
    if not accelerator.split_batches:  # each process takes every world_size-th batch
        per_process = batches / args.world_size
        is_filled = accelerator.even_batches and not args.dataloader_drop_last
        batches = math.ceil(per_process) if is_filled else math.floor(per_process)
    return max(1, math.ceil(batches / args.gradient_accumulation_steps))


def num_train_epochs(args: TrainingArguments, num_examples: int, accelerator: Accelerator) -> int:
    """How many epochs training begins: those whose masks it draws. As transformers.Trainer counts them.

    ceil(num_train_epochs), or ceil(max_steps / optimizer steps of an epoch)
    """
    if args.max_steps <= 0:
        return math.ceil(args.num_train_epochs)
    return math.ceil(args.max_steps / steps_per_epoch(args, num_examples, accelerator))


def rows_of_training(trainer: DiffusionTrainer) -> dict[int, Sequence[int]]:
    """Epoch -> the rows that the steps of that epoch take, ascending.

    Of the last epoch, where it is not run to its end, those that its sampler gives first. All rows where that
    is not known beforehand: with another sampler, or ignore_data_skip, which takes other rows on resume.
    """
    args, accelerator = trainer.args, trainer.accelerator
    num_examples = len(trainer.train_dataset)
    every = range(num_examples)
    epochs = num_train_epochs(args, num_examples, accelerator)
    rows: dict[int, Sequence[int]] = dict.fromkeys(range(epochs), every)
    of_epoch = steps_per_epoch(args, num_examples, accelerator)
    total = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * of_epoch)
    steps = total - (epochs - 1) * of_epoch
    global_batch = args.train_batch_size * (1 if accelerator.split_batches else args.world_size)
    used = steps * args.gradient_accumulation_steps * global_batch
    if steps < of_epoch and used < num_examples and not args.ignore_data_skip:
        order = _order(trainer, epochs - 1)
        rows[epochs - 1] = every if order is None else sorted(order[:used])
    return rows


def _order(trainer: DiffusionTrainer, epoch: int) -> list[int] | None:
    """The rows of an epoch in the order of training; None where it is not known beforehand.

    A BalancedSampler rearranges them inside each optimizer step, which changes no set of whole steps.
    """
    sampler: Sampler | None = trainer._get_train_sampler()
    if isinstance(sampler, BalancedSampler):
        sampler = sampler.sampler
    if type(sampler) is RandomSampler and trainer.args.accelerator_config.use_seedable_sampler:
        # accelerate puts it in the other's place.
        sampler = SeedableRandomSampler(trainer.train_dataset, data_seed=trainer.args.data_seed)
    if type(sampler) is SequentialSampler:
        return list(sampler)
    if type(sampler) is not SeedableRandomSampler:
        return None
    sampler.set_epoch(epoch)
    return list(sampler)
