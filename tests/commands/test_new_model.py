"""A model from nothing but text: its section, its rows, and going on with it."""

import json

import pytest
import torch
import yaml
from tiny import SIZES, error_of

from vrpo.commands.main import main
from vrpo.models import load_model, load_tokenizer

SECTIONS = {
    "null": (None, "new_model must be a mapping, got the word"),
    "word": ("tiny", "new_model must be a mapping, got the word 'tiny'"),
    "list": ([1, 2], "new_model must be a mapping, got a list"),
    "missing size": ({"d_model": 32}, "new_model needs exactly"),
    "text": (SIZES | {"d_model": "wide"}, "d_model must be a positive integer, got 'wide'"),
    "fraction": (SIZES | {"d_model": 32.0}, "d_model must be a positive integer, got 32.0"),
    "boolean": (SIZES | {"n_layers": True}, "n_layers must be a positive integer, got True"),
    "negative": (SIZES | {"n_layers": -1}, "n_layers must be a positive integer"),
    "tiny vocabulary": (SIZES | {"vocab_size": 261}, "vocab_size must be at least 262"),
    "heads": (SIZES | {"n_heads": 5}, "d_model must be an even multiple of n_heads"),
    "odd heads": (SIZES | {"d_model": 12, "n_heads": 4}, "d_model must be an even multiple of n_heads"),
    "huge": (SIZES | {"d_model": 2**40}, "parameters"),
}


def config_with(files, folder, **changes):
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load((files / "sft.yaml").read_text()) | changes))
    return f"--config={path}"


@pytest.mark.parametrize("case", SECTIONS)
def test_new_model__a_wrong_section_is_one_line_before_data_are_read(files, tmp_path, capsys, case):
    section, message = SECTIONS[case]
    config = config_with(files, tmp_path, new_model=section, dataset_name="absent.jsonl")
    assert message in error_of(capsys, ["sft", config])


def rows_file(folder, rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def turn(role, content):
    return {"role": role, "content": content}


ROWS = {
    "messages": {"messages": [turn("user", "What is 1?"), turn("assistant", "One.")]},
    "parts": {
        "messages": [turn("user", [{"type": "text", "text": "What is 1?"}]), turn("assistant", "One.")]
    },
    "prompt and completion": {"prompt": [turn("user", "What?")], "completion": [turn("assistant", "One.")]},
    "tools": {
        "messages": [turn("user", "What is 1?"), turn("assistant", "One.")],
        "tools": [{"type": "function", "function": {"name": "count", "description": "d", "parameters": {}}}],
    },
}


@pytest.mark.parametrize("case", ROWS)
def test_new_model__learns_from_rows_of_every_shape(files, tmp_path, case):
    rows = rows_file(tmp_path, [ROWS[case]] * 4)
    changes = {"dataset_name": rows, "output_dir": str(tmp_path / "out"), "max_steps": 1}
    assert main(["sft", config_with(files, tmp_path, **changes)]) == 0
    assert load_model(str(tmp_path / "out")).config.num_hidden_layers == 2


UNUSABLE = {
    "null": {"prompt": None, "completion": "a"},
    "number": {"prompt": 3, "completion": "a"},
    "message without content": {"messages": [turn("user", None), turn("assistant", "a")]},
    "no list": {"messages": "hello"},
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_new_model__unusable_rows_are_named(files, tmp_path, capsys, case):
    rows = rows_file(tmp_path, [UNUSABLE[case]] * 2)
    config = config_with(files, tmp_path, dataset_name=rows, output_dir=str(tmp_path / "out"))
    assert "row" in error_of(capsys, ["sft", config])


def test_new_model__goes_on_with_the_tokenizer_it_started_with(files, tmp_path, capsys):
    rows = [json.loads(line) for line in (files / "sft.jsonl").read_text().splitlines()]
    small = {"dataset_name": rows_file(tmp_path, rows), "output_dir": str(tmp_path / "out"), "save_steps": 1}
    section = SIZES | {"vocab_size": 1000}
    assert main(["sft", config_with(files, tmp_path, **small, new_model=section, max_steps=1)]) == 0
    first = load_tokenizer(str(tmp_path / "out")).get_vocab()
    rows += [{"prompt": "Something else entirely?", "completion": f" Words, words {n}."} for n in range(12)]
    rows_file(tmp_path, rows)
    resume = {"resume_from_checkpoint": "true", "max_steps": 2}
    narrow = config_with(files, tmp_path, **small, **resume, new_model=section | {"d_model": 64})
    assert "d_model is 64, but resume_from_checkpoint" in error_of(capsys, ["sft", narrow])
    code = main(["sft", config_with(files, tmp_path, **small, **resume, new_model=section)])
    if code == 0:
        assert load_tokenizer(str(tmp_path / "out")).get_vocab() == first
        assert torch.isfinite(load_model(str(tmp_path / "out")).lm_head.weight).all()
    else:  # refused, where resuming on other data is
        assert "data" in capsys.readouterr().err


def test_new_model__resume_without_a_checkpoint_is_told(files, tmp_path, capsys):
    config = config_with(files, tmp_path, output_dir=str(tmp_path / "out"), resume_from_checkpoint="true")
    assert "has no checkpoint" in error_of(capsys, ["sft", config])
