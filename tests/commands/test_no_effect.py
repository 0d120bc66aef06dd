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


IDLE = {
    "lora_r": ("--lora_r=8", "lora_r=8 does nothing without use_peft"),
    "lora_alpha": ("--lora_alpha=8", "lora_alpha=8 does nothing without use_peft"),
    "lora_dropout": ("--lora_dropout=0.5", "lora_dropout=0.5 does nothing without use_peft"),
    "lora_target_modules": ("--lora_target_modules=q_proj", "does nothing without use_peft"),
    "hub_model_id": ("--hub_model_id=a/b", "hub_model_id='a/b' does nothing without push_to_hub"),
    "hub_revision": ("--hub_revision=x", "does nothing without push_to_hub"),
    "hub_private_repo": ("--hub_private_repo=true", "does nothing without push_to_hub or report_to=trackio"),
    "run_name": ("--run_name=x", "run_name='x' does nothing without a logger"),
    "project": ("--project=x", "project='x' does nothing without report_to=trackio"),
    "trackio_space_id": ("--trackio_space_id=a/b", "does nothing without report_to=trackio"),
    "model_revision": ("--model_revision=x", "model_revision='x' does nothing with model_name_or_path"),
    "ref_model_sync_steps": ("--ref_model_sync_steps=1", "does nothing without sync_ref_model=True"),
    "streaming_shuffle_buffer": ("--streaming_shuffle_buffer=5", "does nothing without a stream"),
    "eval_steps": ("--eval_steps=2", "does nothing without eval_strategy='steps'"),
}


@pytest.mark.parametrize("name", IDLE)
def test_train__refuses_a_flag_that_nothing_reads(files, model_path, tmp_path, capsys, name):
    flag, message = IDLE[name]
    assert message in error_of(capsys, train_flags(files, model_path, tmp_path / "out", flag))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["dtype=bfloat16", "attn_implementation=vrpo_sdpa", "model_revision=x"])
def test_sft__a_new_model_is_not_loaded(files, tmp_path, capsys, name):
    flags = ["sft", "--config", str(files / "sft.yaml"), f"--output_dir={tmp_path / 'out'}", f"--{name}"]
    assert "does nothing without model_name_or_path: a new_model" in error_of(capsys, flags)


@pytest.mark.parametrize("command", ["score", "generate", "plan"])
def test_commands__a_local_model_has_no_revisions(files, model_path, tmp_path, capsys, command):
    make = {"score": score_flags, "generate": generate_flags}
    flags = ["plan", f"--model_name_or_path={model_path}"]
    if command in make:
        data = f"--dataset_name={files / 'pairs.jsonl'}"
        flags = make[command](files, model_path, tmp_path / "out", data)
    assert "model_revision='x' does nothing with" in error_of(capsys, [*flags, "--model_revision=x"])


def test_plan__refuses_adapters_without_use_peft(model_path, capsys):
    flags = ["plan", f"--model_name_or_path={model_path}", "--lora_r=8"]
    assert "lora_r=8 does nothing without use_peft" in error_of(capsys, flags)
