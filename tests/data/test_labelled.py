"""Unpaired preferences: labels that travel with their rows, pairs taken apart, what is refused."""

import pytest
from datasets import Dataset

from vrpo.data import LabelledCollator, prepare_completions, prepare_labelled, prepare_pairs
from vrpo.training.resume import digest_of_dataset

ROWS = [
    {"prompt": "What is 2?", "completion": " two", "label": True},
    {"prompt": "What is 3?", "completion": " four", "label": False},
    {"prompt": "What is 4?", "completion": " four", "label": 1},
]


def rows(*labels):
    return [row | {"label": label} for row, label in zip(ROWS, labels, strict=True)]


def test_prepare_labelled__keeps_the_labels_beside_the_tokens_of_completions(tokenizer):
    prepared, report = prepare_labelled(rows(True, False, True), tokenizer)
    plain, _ = prepare_completions(ROWS, tokenizer)
    assert prepared["label"][:] == [1, 0, 1]
    assert prepared["example_id"][:] == [0, 1, 2]
    for name in ("prompt_ids", "completion_ids"):
        assert prepared[name][:] == plain[name][:]
    assert report.kept == 3
    again, _ = prepare_labelled(prepared, tokenizer)
    assert again is prepared
    tokens = Dataset.from_dict({name: prepared[name][:] for name in prepared.column_names})
    assert prepare_labelled(tokens, None)[0]["label"][:] == [1, 0, 1]


def test_prepare_labelled__takes_pairs_apart(tokenizer, pair_rows):
    prepared, _ = prepare_labelled(pair_rows, tokenizer)
    pairs, _ = prepare_pairs(pair_rows, tokenizer)
    assert len(prepared) == 2 * len(pairs)
    assert prepared["label"][:] == [1, 0] * len(pairs)
    assert prepared["example_id"][:] == list(range(2 * len(pairs)))
    for side, name in enumerate(("chosen_ids", "rejected_ids")):
        assert prepared["completion_ids"][side::2] == pairs[name][:]
        assert prepared["prompt_ids"][side::2] == pairs["prompt_ids"][:]
    assert prepare_labelled(prepared, tokenizer)[0] is prepared
    assert prepare_labelled(pairs, tokenizer)[0]["completion_ids"][:] == prepared["completion_ids"][:]


@pytest.mark.parametrize("label", [2, -1, "true", 1.0, None])
def test_prepare_labelled__names_rows_with_a_wrong_label(tokenizer, label):
    given = [{**ROWS[0], "label": label}] * 2
    with pytest.raises(ValueError, match=r"label must be true or false, got"):
        prepare_labelled(given, tokenizer)


def test_prepare_labelled__drops_rows_with_a_wrong_label_where_asked_to(tokenizer):
    prepared, report = prepare_labelled(rows(1, 7, 0), tokenizer, drop_unusable_rows=True)
    assert prepared["label"][:] == [1, 0] and prepared["example_id"][:] == [0, 2]
    assert len(report.unusable) == 1


def test_prepare_labelled__refuses_rows_without_a_label(tokenizer, completion_rows):
    with pytest.raises(ValueError, match="lacks the column label, true for a desirable"):
        prepare_labelled(completion_rows, tokenizer)
    prepared, _ = prepare_completions(completion_rows, tokenizer)
    with pytest.raises(ValueError, match="prepared for another trainer: it lacks label"):
        prepare_labelled(prepared, tokenizer)


def test_prepare_labelled__refuses_ids_that_would_not_fit(tokenizer, pair_rows):
    high = pair_rows.select([0]).add_column("example_id", [2**31])
    with pytest.raises(ValueError, match=r"example_id must be below 2\*\*31"):
        prepare_labelled(high, tokenizer)


def test_labelled_collator__side_is_the_label(tokenizer):
    prepared, _ = prepare_labelled(rows(True, False, True), tokenizer)
    batch = LabelledCollator()(list(prepared))["responses"]
    assert batch.side_R.tolist() == [0, 1, 0]
    assert batch.num_sides == 1 and batch.num_examples == 3
    assert batch.examples(1, 3).side_R.tolist() == [1, 0]


def test_digest_of_dataset__tells_other_labels_apart(tokenizer):
    one, other = (prepare_labelled(rows(*labels), tokenizer)[0] for labels in ((1, 0, 1), (1, 1, 1)))
    assert digest_of_dataset(one) != digest_of_dataset(other)
