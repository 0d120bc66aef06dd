"""What a command line gives and nobody would read is refused, and said of what it needs."""

import pytest
from tiny import error_of, generate_flags, score_flags, train_flags, variance_flags

SPLITS = {
    "train": (train_flags, "--dataset_train_split=nonsense"),
    "sft": (train_flags, "--dataset_test_split=test"),
    "kto": (train_flags, "--dataset_test_split=test[:2]"),
    "score": (score_flags, "--dataset_split=test"),
    "variance": (variance_flags, "--dataset_split=test"),
    "generate": (generate_flags, "--dataset_split=test"),
}


@pytest.mark.parametrize("command", SPLITS)
def test_main__a_file_has_no_splits(files, model_path, tmp_path, capsys, command):
    make, flag = SPLITS[command]
    flags = make(files, model_path, tmp_path / "out", f"--dataset_name={files / 'pairs.jsonl'}", flag)
    assert "pairs.jsonl: a file has no splits but 'train'" in error_of(capsys, [command, *flags[1:]])
