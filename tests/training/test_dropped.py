"""Rows that cannot be used stop a run, or are left out, counted and listed; never in silence."""

import json

import pytest
from trainers import trainer_of

from vrpo.training.dropped import DROPPED_FILE


def with_bad_rows(rows, *bad):
    rows = rows.to_list()
    for number in bad:
        rows[number] = rows[number] | {"chosen": rows[number]["rejected"]}
    return rows


def listed(tmp_path):
    return [json.loads(line) for line in (tmp_path / "out" / DROPPED_FILE).read_text().splitlines()]


def test_trainer__lists_what_it_drops(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    train, evaluation = with_bad_rows(pair_rows, 3), with_bad_rows(pair_rows, 0, 5)
    with pytest.raises(ValueError, match="unusable rows in the dataset"):
        trainer_of(tmp_path, tiny_model, tokenizer, train)
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, train, eval_dataset=evaluation, drop_unusable_rows=True, max_steps=1
    )
    assert len(trainer.train_dataset) == 11 and len(trainer.eval_dataset) == 10
    dropped = [(line["split"], line["row"]) for line in listed(tmp_path)]
    assert dropped == [("train", 3), ("eval", 0), ("eval", 5)]
    assert {line["reason"] for line in listed(tmp_path)} == {"chosen and rejected are the same"}
    assert "train data: 11 of 12 rows" in caplog.text and "1 unusable rows dropped" in caplog.text
    trainer.train()
    trainer.evaluate(with_bad_rows(pair_rows, 1))
    assert [line["row"] for line in listed(tmp_path) if line["split"] == "eval"] == [1]


def test_trainer__writes_no_list_where_nothing_is_dropped(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, drop_unusable_rows=True)
    assert not (tmp_path / "out" / DROPPED_FILE).exists()


def test_trainer__drops_examples_beyond_the_token_budget(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    rows = pair_rows.to_list()
    rows[7]["chosen"] = " plus" * 40
    fields = {"max_tokens_per_pack": 100, "gradient_mode": "joint"}
    with pytest.raises(ValueError, match="1 of 12 examples are longer than the token budget"):
        trainer_of(tmp_path, tiny_model, tokenizer, rows, **fields)
    fields["drop_unusable_rows"] = True
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, rows, **fields)
    assert trainer.train_dataset["example_id"][:] == [*range(7), *range(8, 12)]
    assert [line["row"] for line in listed(tmp_path)] == [7]
    assert "max_tokens_per_pack=100" in listed(tmp_path)[0]["reason"]
    assert "1 of 12 examples dropped: longer than the token budget" in caplog.text
    with pytest.raises(ValueError, match="12 of 12 examples are longer than the token budget"):
        trainer_of(tmp_path, tiny_model, tokenizer, rows, **fields | {"max_tokens_per_pack": 20})
