"""A stream trains as its rows do: ids and masks are the rows' own, and a resume is bitwise."""

import itertools
import json

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from trainers import config, logged, parameters, trainer_of

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer
from vrpo.data.budget import TokenBudget
from vrpo.data.limits import Limits
from vrpo.data.rows import PAIR_SIDES, prepare_pairs
from vrpo.data.stream import Deal, RowStream, StreamCollator, shuffled
from vrpo.training.dropped import DROPPED_FILE

NO_LIMITS = Limits(None, None, None, None, None)
STREAM = {"max_steps": 7, "learning_rate": 1e-3}


def stream_of(rows, tokenizer, deal, **options):
    budget = TokenBudget(1, 10**6)
    return RowStream(rows, tokenizer, PAIR_SIDES, NO_LIMITS, budget, deal, **options)


def ids(batch):
    return [(row["epoch"], row["example_id"]) for row in batch]


def take(stream, number):
    return [ids(batch) for batch in itertools.islice(stream, number)]


def joined(batches):
    return [row for batch in batches for row in batch]


def test_stream__gives_the_rows_of_the_dataset(tokenizer, pair_rows):
    prepared, _ = prepare_pairs(pair_rows, tokenizer)
    stream = stream_of(pair_rows.to_iterable_dataset(num_shards=3), tokenizer, Deal(batch_size=5))
    rows = [row for batch in itertools.islice(stream, 3) for row in batch]
    assert [len(batch) for batch in take(stream, 4)] == [5, 5, 2, 5]
    assert [
        {k: v for k, v in row.items() if k not in ("epoch", "past")} for row in rows
    ] == prepared.to_list()
    assert {row["epoch"] for row in rows} == {0}


@pytest.mark.parametrize("buffer_size", [0, 4])
def test_stream__the_number_of_processes_changes_no_batch(tokenizer, pair_rows, buffer_size):
    rows = pair_rows.to_iterable_dataset(num_shards=2)
    one = take(stream_of(rows, tokenizer, Deal(batch_size=8, seed=3, buffer_size=buffer_size)), 5)
    for number in (2, 4):
        deals = [Deal(8 // number, p, number, seed=3, buffer_size=buffer_size) for p in range(number)]
        parts = [take(stream_of(rows, tokenizer, deal), 5) for deal in deals]
        assert [joined(batches) for batches in zip(*parts, strict=True)] == one
    assert sorted(joined(one[:2])) == [(0, n) for n in range(12)]
    assert (one[0] == [(0, n) for n in range(8)]) == (buffer_size == 0)
    if buffer_size:
        assert [n for _, n in joined(one[2:4])] != [n for _, n in joined(one[:2])]


def test_stream__no_process_is_without_a_row(tokenizer, pair_rows):
    rows = pair_rows.select(range(9)).to_iterable_dataset()
    last = [take(stream_of(rows, tokenizer, Deal(2, p, 4)), 2)[1] for p in range(4)]
    assert last == [[(0, 8)], [(0, 0)], [(0, 1)], [(0, 2)]]


def test_stream__takes_its_own_ids_and_names_bad_rows(tokenizer, pair_rows):
    rows = [row | {"example_id": 100 - n} for n, row in enumerate(pair_rows)]
    stream = stream_of(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, Deal(2))
    assert take(stream, 1) == [[(0, 100), (0, 99)]]
    rows = pair_rows.to_list()
    rows[7]["chosen"] = rows[7]["rejected"]
    rows = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(
        ValueError, match=r"unusable row in the stream: chosen and .* \(row 7\); drop_unusable"
    ):
        stream_of(rows, tokenizer, Deal(4))
    told = []
    stream = stream_of(
        rows, tokenizer, Deal(12), may_drop=True, on_drop=lambda row, reason: told.append((row, reason))
    )
    assert [n for _, n in take(stream, 2)[0]] == [*range(7), *range(8, 12)]
    assert told == [(7, "chosen and rejected are the same")]


def test_stream__refuses_what_gives_no_batch(tokenizer, pair_rows):
    with pytest.raises(ValueError, match="a stream without rows"):
        stream_of(pair_rows.to_iterable_dataset().take(0), tokenizer, Deal(4))
    stream = stream_of(pair_rows.to_iterable_dataset(), tokenizer, Deal(13, drop_last=True))
    with pytest.raises(ValueError, match="too few rows in a pass"):
        next(iter(stream))
    rows = [row | {"example_id": 1} for row in pair_rows]
    with pytest.raises(ValueError, match="example_id 1 repeats in row 1 of the stream"):
        stream_of(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, Deal(4))


@pytest.mark.parametrize("first", [0, 2**32 - 100])
def test_stream__refuses_an_id_that_repeats_late_in_the_first_pass(tokenizer, pair_rows, first):
    rows = [pair_rows[i % 12] | {"example_id": first + i % 90} for i in range(100)]
    stream = stream_of(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, Deal(30))
    batches = iter(stream)
    assert [len(next(batches)) for _ in range(3)] == [30] * 3
    with pytest.raises(ValueError, match=f"example_id {first} repeats in row 90 of the stream"):
        next(batches)


def test_stream__the_second_pass_repeats_the_ids_of_the_first(tokenizer, pair_rows):
    rows = [row | {"example_id": 7 * i} for i, row in enumerate(pair_rows)]
    stream = stream_of(Dataset.from_list(rows).to_iterable_dataset(), tokenizer, Deal(12))
    assert len(take(stream, 2)) == 2


@pytest.mark.parametrize("kind", ["torch", "numpy", "arrow", "pandas"])
def test_stream__reads_every_format_alike(tokenizer, pair_rows, kind):
    plain = stream_of(pair_rows.to_iterable_dataset(), tokenizer, Deal(5))
    other = stream_of(pair_rows.to_iterable_dataset().with_format(kind), tokenizer, Deal(5))
    assert take(other, 4) == take(plain, 4) and other.digest == plain.digest


def test_stream__one_worker_reads_the_same(tokenizer, pair_rows):
    stream = stream_of(pair_rows.to_iterable_dataset(num_shards=3), tokenizer, Deal(5, buffer_size=3))
    loader = DataLoader(
        stream, batch_size=None, collate_fn=StreamCollator(lambda rows: {"rows": rows}), num_workers=1
    )
    assert [ids(batch["rows"]) for batch in itertools.islice(loader, 4)] == take(stream, 4)


def test_shuffled__is_a_permutation_that_looks_ahead_no_further_than_its_buffer():
    rows = [{"n": n} for n in range(50)]
    found = [row["n"] for row in shuffled(iter(rows), 8, [1, 0])]
    assert sorted(found) == list(range(50)) and found != list(range(50))
    assert all(n < place + 8 for place, n in enumerate(found))


def test_train__a_stream_in_order_equals_the_dataset_in_order(tmp_path, tiny_model, tokenizer, pair_rows):
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    fields = STREAM | {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 5}
    ends = []
    for rows in (pair_rows, pair_rows.to_iterable_dataset(num_shards=2)):
        tiny_model.load_state_dict(start)
        trainer = trainer_of(tmp_path, tiny_model, tokenizer, rows, **fields)
        trainer.train()
        ends.append((parameters(tiny_model), logged(trainer, "loss")))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1] == ends[1][1]


def test_train__a_stream_is_resumed_bitwise_in_any_pass(tmp_path, tiny_model, tokenizer, pair_rows):
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    fields = STREAM | {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    rows = pair_rows.to_iterable_dataset(num_shards=2)

    def run(checkpoint, **more):
        tiny_model.load_state_dict(start)
        trainer = trainer_of(tmp_path, tiny_model, tokenizer, rows, **fields | more)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer.state.global_step, parameters(tiny_model)

    steps, straight = run(None)
    assert steps == 7
    for step in (1, 2, 5, 7):  # three batches a pass, two a step; at 7 nothing is left
        steps, end = run(str(tmp_path / f"out/checkpoint-{step}"))
        assert steps == 7 and torch.equal(end, straight), step
    rows = pair_rows.select(range(11)).to_iterable_dataset()
    with pytest.raises(ValueError, match="of another run: the training data"):
        run(str(tmp_path / "out/checkpoint-2"))


def test_train__a_stream_that_changed_in_what_it_was_trained_on_is_refused(tmp_path, tiny_model, tokenizer):
    rows = [{"prompt": f"{n}?", "chosen": f"one {n}", "rejected": "two"} for n in range(72)]
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}

    def run(checkpoint, changed=None, **more):
        given = [row | {"chosen": "other"} if n == changed else row for n, row in enumerate(rows)]
        tiny_model.load_state_dict(start)
        fields = {
            "max_steps": 3,
            "save_strategy": "steps",
            "save_steps": 1,
            "per_device_train_batch_size": 36,
        }
        fields |= {"train_sampling_strategy": "sequential", "num_samples": 1} | more
        stream = Dataset.from_list(given).to_iterable_dataset()
        trainer = trainer_of(tmp_path, tiny_model, tokenizer, stream, **fields)
        trainer.train(resume_from_checkpoint=checkpoint and str(tmp_path / "out" / checkpoint))
        return trainer.state.global_step, parameters(tiny_model)

    _, straight = run(None)
    assert torch.equal(run("checkpoint-2")[1], straight)
    with pytest.raises(ValueError, match=r"trained on up to step 2 the stream gives others now"):
        run("checkpoint-2", changed=70)  # beyond the rows that say at once which stream it is
    assert run("checkpoint-1", changed=70)[0] == 3  # its turn had not come
    assert run("checkpoint-2", changed=70, ignore_data_skip=True)[0] == 3  # its new rows, on purpose


def test_train__drops_rows_of_a_stream_and_lists_them(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    rows = pair_rows.to_list()
    rows[5]["chosen"] = None
    stream = Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"unusable row in the stream: .* \(row 5\)"):
        trainer_of(tmp_path, tiny_model, tokenizer, stream, **STREAM)
    trainer_of(tmp_path, tiny_model, tokenizer, stream, drop_unusable_rows=True, **STREAM).train()
    listed = [json.loads(line) for line in (tmp_path / "out" / DROPPED_FILE).read_text().splitlines()]
    assert [line["row"] for line in listed] == [5]
    assert "1 of the first 6 rows of the stream dropped" in caplog.text


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_steps": -1}, "max_steps must be given for a stream"),
        ({"dataloader_num_workers": 2}, "dataloader_num_workers must be 0 or 1 for a stream, got 2"),
        (
            {"max_tokens_per_pack": 10, "gradient_mode": "joint"},
            "example 0 of the stream is longer than the token",
        ),
    ],
)
def test_trainer__refuses_what_a_stream_cannot_give(tmp_path, tiny_model, tokenizer, pair_rows, fields, text):
    with pytest.raises(ValueError, match=text):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows.to_iterable_dataset(), **STREAM | fields)


def test_trainer__reads_an_evaluation_whole(tmp_path, tiny_model, tokenizer, pair_rows):
    stream = pair_rows.to_iterable_dataset()
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, stream, eval_dataset=stream, **STREAM)
    whole = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows, **STREAM)
    assert trainer.evaluate()["eval_loss"] == whole.evaluate()["eval_loss"]

    def endless():
        yield from itertools.cycle(pair_rows)

    with pytest.raises(ValueError, match=r"more than 100000 rows"):
        trainer.evaluate(IterableDataset.from_generator(endless))


def test_sft__a_stream_needs_its_fill_given(tmp_path, tiny_model, tokenizer, completion_rows):
    stream = completion_rows.to_iterable_dataset()
    losses = []
    for rows, fill in ((stream, None), (stream, 6), (completion_rows, 6)):
        fields = {"max_eos_fill": fill, "max_steps": 3, "learning_rate": 0.0}
        args = config(tmp_path, DiffusionSFTConfig, train_sampling_strategy="sequential", **fields)

        def trainer(rows=rows, args=args):
            return DiffusionSFTTrainer(tiny_model, args=args, train_dataset=rows, processing_class=tokenizer)

        if fill is None:
            with pytest.raises(ValueError, match="max_eos_fill must be given for a stream"):
                trainer()
            continue
        made = trainer()
        made.train()
        losses.append(logged(made, "loss"))
    assert losses[0] == losses[1]
