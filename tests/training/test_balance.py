"""Balanced batches: the same examples in every optimizer step, for any number of processes, at equal cost."""

import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler
from trainers import config, trainer_of

from vrpo import DiffusionSFTTrainer
from vrpo.training.balance import BalancedSampler, balance
from vrpo.training.config import DiffusionSFTConfig

GSM8K = Path(__file__).parents[3] / "shared/data/gsm8k/preferences_train.jsonl"


@given(
    num_groups=st.integers(1, 9),
    size=st.integers(0, 6),
    data=st.data(),
    longest=st.sampled_from([1, 9, 10**6]),
)
def test_balance__deals_every_item_once_and_evenly(num_groups, size, data, longest):
    number = num_groups * size
    costs = data.draw(st.lists(st.integers(0, longest), min_size=number, max_size=number))
    groups = balance(costs, num_groups)
    assert [len(group) for group in groups] == [size] * num_groups
    assert sorted(item for group in groups for item in group) == list(range(number))
    assert all(
        [costs[i] for i in group] == sorted((costs[i] for i in group), reverse=True) for group in groups
    )
    sums = [sum(costs[item] for item in group) for group in groups]
    # Exchanging cannot be stuck while the heaviest group has an item to spare for a smaller one elsewhere.
    assert max(sums) - min(sums) <= max(costs, default=0)


def test_balance__refuses_groups_of_different_sizes():
    with pytest.raises(ValueError, match="7 items do not divide into 2 groups"):
        balance([1] * 7, 2)


def dealt(dataset, costs, world_size, batch_size, num_batches, *, drop_last=False, balanced=True, epoch=0):
    """The batches of every process, as accelerate deals them out."""
    ranks = []
    for rank in range(world_size):
        sampler = SeedableRandomSampler(dataset, data_seed=7)
        if balanced:
            sampler = BalancedSampler(
                sampler,
                lambda epoch: [cost * (1 + (cost + epoch) % 3) for cost in costs],
                batch_size=batch_size,
                num_processes=world_size,
                num_batches=num_batches,
                drop_last=drop_last,
            )
        loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler, drop_last=drop_last)
        loader = prepare_data_loader(
            loader, num_processes=world_size, process_index=rank, use_seedable_sampler=True, data_seed=7
        )
        loader.set_epoch(epoch)
        ranks.append([batch.tolist() for batch in loader])
        assert len(ranks[-1]) == len(loader)
    return ranks


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("number", [3, 16, 61])
def test_balanced_sampler__every_step_has_the_examples_that_it_had(number, epoch, drop_last):
    costs = [random.Random(number + i).randrange(1, 1000) for i in range(number)]
    for world_size, batch_size, num_batches in ((2, 2, 2), (4, 1, 2), (2, 4, 1)):
        arguments = (range(number), costs, world_size, batch_size, num_batches)
        plain = dealt(*arguments, drop_last=drop_last, balanced=False, epoch=epoch)
        found = dealt(*arguments, drop_last=drop_last, epoch=epoch)
        assert [len(batches) for batches in found] == [len(batches) for batches in plain]
        for start in range(0, len(plain[0]), num_batches):
            steps = [
                Counter(i for rank in ranks for batch in rank[start : start + num_batches] for i in batch)
                for ranks in (plain, found)
            ]
            assert steps[0] == steps[1]


def test_balanced_sampler__the_number_of_processes_does_not_move_an_example_to_another_step():
    costs = [random.Random(i).randrange(1, 1000) for i in range(64)]
    steps = []
    for world_size, batch_size, num_batches in ((2, 4, 2), (4, 2, 2), (8, 2, 1), (4, 4, 1)):
        ranks = dealt(range(64), costs, world_size, batch_size, num_batches)
        steps.append(
            [
                sorted(i for rank in ranks for batch in rank[start : start + num_batches] for i in batch)
                for start in range(0, len(ranks[0]), num_batches)
            ]
        )
    assert all(other == steps[0] for other in steps)


def waiting(order, costs, num_processes, batch_size):
    """The share of their time that processes wait if it takes as long as the costs say."""
    busy = total = 0.0
    for start in range(0, len(order), num_processes * batch_size):
        sums = [
            sum(costs[i] for i in order[first : first + batch_size])
            for first in range(start, start + num_processes * batch_size, batch_size)
        ]
        busy, total = busy + sum(sums) / num_processes, total + max(sums)
    return 1 - busy / total


@pytest.mark.skipif(not GSM8K.exists(), reason="the GSM8K pairs are not there")
def test_balanced_sampler__no_process_waits_on_gsm8k(tokenizer):
    rows = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    texts = [2 * len(row["prompt"]) + len(row["chosen"]) + len(row["rejected"]) for row in rows]
    sampler = BalancedSampler(
        SequentialSampler(texts), lambda epoch: texts, batch_size=8, num_processes=8, num_batches=1
    )
    plain = list(range(len(texts) // 64 * 64))
    assert waiting(plain, texts, 8, 8) > 0.1
    assert waiting(list(sampler), texts, 8, 8) < 0.01


def test_costs_of_epoch__are_the_tokens_that_sft_trains_on(tmp_path, tiny_model, tokenizer, completion_rows):
    args = config(tmp_path, kind=DiffusionSFTConfig)
    trainer = DiffusionSFTTrainer(tiny_model, args, train_dataset=completion_rows, processing_class=tokenizer)
    rows = trainer.train_dataset
    for epoch in (0, 3):
        trainer.state.epoch = epoch
        trainer.model.train()
        batch = trainer._responses(trainer.data_collator([rows[i] for i in range(len(rows))]), trainer.model)
        assert batch.fill_R.sum() > 0
        assert trainer._costs_of_epoch(rows, epoch) == batch.length_R.tolist()


def test_costs_of_epoch__are_the_tokens_of_a_pair(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows)
    rows = trainer.train_dataset
    batch = trainer.data_collator([rows[i] for i in range(len(rows))])["responses"]
    expected = batch.length_R.view(-1, 2).sum(dim=1)
    assert torch.equal(torch.tensor(trainer._costs_of_epoch(rows, 0)), expected)
