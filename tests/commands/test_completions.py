"""`--log_completions` of the training commands: answers during training."""

import json

import pytest
from tiny import error_of, train_flags

from vrpo.commands.main import main

SHORT = ["--log_completions", "--completions_max_new_tokens=4", "--completions_freq=1"]


def samples(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def test_train__answers_the_first_prompts_of_the_data(files, model_path, tmp_path, capsys):
    more = [*SHORT, "--num_prompts=3", "--num_completions_to_print=1", "--completions_steps=2"]
    assert main(train_flags(files, model_path, tmp_path / "out", *more)) == 0
    rows = [json.loads(line) for line in (files / "pairs.jsonl").read_text().splitlines()[:3]]
    found = samples(tmp_path / "out")
    assert [line["step"] for line in found] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert [line["prompt"] for line in found] == 3 * [row["prompt"] for row in rows]
    printed = capsys.readouterr()
    assert (printed.out + printed.err).count(f"{rows[0]['prompt']!a} -> ") == 3
    assert f"{rows[1]['prompt']!a} -> " not in printed.out + printed.err


def test_train__answers_prompts_of_their_own_in_the_chat_template(files, model_path, tmp_path):
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "Why?"}\n')
    more = [*SHORT, f"--completions_dataset_name={own}", "--completions_block_length=2"]
    assert main(train_flags(files, model_path, tmp_path / "out", *more)) == 0
    assert {line["prompt"] for line in samples(tmp_path / "out")} == {"Why?"}
    held = [*SHORT, f"--eval_dataset_name={files / 'sft.jsonl'}"]
    flags = [
        flag for flag in train_flags(files, model_path, tmp_path / "sft", *held) if "num_samples" not in flag
    ]
    flags[0], flags[2] = "sft", f"--dataset_name={files / 'sft.jsonl'}"
    assert main([*flags, "--max_eos_fill=0"]) == 0
    assert len({line["prompt"] for line in samples(tmp_path / "sft")}) == 4  # of the evaluation data


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--num_prompts=3"], "num_prompts does nothing without log_completions"),
        (["--log_completions", "--completions_freq=0"], "completions_freq must be"),
        ([*SHORT, "--completions_steps=9"], "completions_*: steps must be between"),
        ([*SHORT, "--completions_max_new_tokens=64"], "the model has positions for 64"),
        ([*SHORT, "--completions_dataset_name=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_train__refuses_answers_that_cannot_be_given(files, model_path, tmp_path, capsys, more, told):
    assert told in error_of(capsys, train_flags(files, model_path, tmp_path / "out", *more))
    assert not (tmp_path / "out" / "trainer_state.json").exists()
