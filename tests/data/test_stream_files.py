"""A stream gives the rows of its files in their order, without a cache."""

import json

import pytest
from datasets import Dataset

from vrpo import data


@pytest.fixture
def folder(tmp_path, pair_rows):
    rows = pair_rows.to_list()
    (tmp_path / "train-0.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))
    (tmp_path / "train-1.json").write_text(json.dumps(rows[5:8]))
    Dataset.from_list(rows[8:]).to_parquet(str(tmp_path / "train-2.parquet"))
    (tmp_path / "test.jsonl").write_text(json.dumps(rows[0]) + "\n")
    return tmp_path


def test_load_stream__gives_the_rows_of_load_rows(folder, tmp_path, pair_rows):
    files = [str(folder / f"train-{end}") for end in ("0.jsonl", "1.json", "2.parquet")]
    for name in (str(folder), files):
        stream = data.load_stream(name)
        for _ in range(2):  # each pass anew
            assert list(stream) == data.load_rows(name).to_list() == pair_rows.to_list()
    assert len(list(data.load_stream(str(folder), split="test"))) == 1
    pair_rows.save_to_disk(str(tmp_path / "saved"))
    assert list(data.load_stream(str(tmp_path / "saved"))) == pair_rows.to_list()


def test_load_stream__reads_a_file_no_further_than_it_is_used(tmp_path, pair_rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in pair_rows) + "no JSON\n")
    rows = iter(data.load_stream(str(path)))
    assert [next(rows) for _ in range(12)] == pair_rows.to_list()
    with pytest.raises(ValueError, match=r"rows.jsonl: line 13"):
        next(rows)


def test_load_stream__refuses_what_it_cannot_read(folder, tmp_path, pair_rows):
    with pytest.raises(ValueError, match="has a slice"):
        data.load_stream(str(folder), split="train[:2]")
    with pytest.raises(FileNotFoundError, match="no such file"):
        data.load_stream(str(folder / "absent.jsonl"))
    with pytest.raises(ValueError, match="belongs to a hub name"):
        data.load_stream(str(folder / "test.jsonl"), config="a")
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(ValueError, match="expected a file ending in"):
        data.load_stream(str(tmp_path / "a.txt"))
    for name in (str(folder / "test.jsonl"), [str(folder), str(folder / "test.jsonl")]):
        with pytest.raises(ValueError, match="a file has no splits but 'train', got 'test'"):
            data.load_stream(name, split="test")
    pair_rows.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(ValueError, match="a saved Dataset has no splits"):
        data.load_stream(str(tmp_path / "saved"), split="test")
    with pytest.raises(ValueError, match="cannot be streamed together"):
        data.load_stream([str(tmp_path / "saved"), str(folder / "test.jsonl")])
