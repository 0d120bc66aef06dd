"""--dataset_streaming trains on the rows of the file, which is not read beforehand."""

import torch
from tiny import error_of, train_flags

from vrpo.commands.main import main
from vrpo.models import load_model

ORDER = ("--train_sampling_strategy=sequential", "--lr_scheduler_type=constant")


def test_train__streamed_is_trained_as_the_dataset(files, model_path, tmp_path):
    ends = []
    for name, flags in (("whole", ()), ("stream", ("--dataset_streaming",))):
        assert main(train_flags(files, model_path, tmp_path / name, *ORDER, *flags)) == 0
        ends.append(load_model(str(tmp_path / name)).state_dict())
    before = load_model(model_path).state_dict()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in before)
    assert not all(torch.equal(ends[1][name], before[name]) for name in before)


def test_train__a_stream_needs_its_steps_and_takes_a_dry_run(files, model_path, tmp_path, capsys):
    flags = train_flags(files, model_path, tmp_path, "--dataset_streaming")
    assert "needs max_steps" in error_of(capsys, [*flags, "--max_steps=-1"])
    assert main([*flags, "--dry_run"]) == 0
    text = capsys.readouterr().out
    assert "a stream; of its first" in text and "steps      2 in total, of 4 examples" in text


def test_sft__streams_but_trains_no_tokenizer_on_a_stream(files, model_path, tmp_path, capsys):
    new = ["sft", "--config", str(files / "sft.yaml"), "--dataset_streaming"]
    assert "trains a tokenizer" in error_of(capsys, new)
    flags = train_flags(
        files, model_path, tmp_path, "--dataset_streaming", f"--dataset_name={files / 'sft.jsonl'}"
    )
    assert main(["sft", *flags[1:], "--max_eos_fill=4"]) == 0
    assert (tmp_path / "model.safetensors").is_file()
