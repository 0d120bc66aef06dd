"""What score, variance and generate refuse before they work, and what they leave behind."""

import json
import os
import shutil

import pytest
import torch
from tiny import error_of, generate_flags, score_flags, variance_flags

from vrpo.commands.main import main
from vrpo.models import load_model, load_tokenizer

COMMANDS = {"score": score_flags, "variance": variance_flags, "generate": generate_flags}


def flags_of(command, files, model_path, output):
    flags = COMMANDS[command](files, model_path, output)
    return [*flags, f"--dataset_name={files / 'pairs.jsonl'}"] if command == "generate" else flags


@pytest.mark.parametrize("command", COMMANDS)
def test_commands__never_write_onto_an_input(files, model_path, capsys, command):
    data = files / "pairs.jsonl"
    before = data.read_bytes()
    os.makedirs(files / "other", exist_ok=True)
    for output in (data, files / "other" / ".." / "pairs.jsonl", f"{model_path}/config.json"):
        assert "must not" in error_of(capsys, flags_of(command, files, model_path, output))
    assert data.read_bytes() == before
    load_model(model_path)


def test_score__summary_never_overwrites_the_data(files, model_path, tmp_path, capsys):
    data = tmp_path / "x.summary.json"
    data.write_bytes((files / "pairs.jsonl").read_bytes())
    flags = score_flags(files, model_path, tmp_path / "x.jsonl", f"--dataset_name={data}")
    assert "must not overwrite dataset_name" in error_of(capsys, flags)


@pytest.mark.parametrize("command", COMMANDS)
def test_commands__failed_work_leaves_the_last_result(
    files, model_path, tmp_path, capsys, monkeypatch, command
):
    def broken_sampler(*args, **options):
        raise FloatingPointError("the logits are NaN")

    monkeypatch.setattr("vrpo.generation.answer.generate", broken_sampler)
    output = tmp_path / "result.json"
    output.write_text("earlier")
    broken = nan_model(model_path, tmp_path / "broken")
    assert "NaN" in error_of(capsys, flags_of(command, files, broken, output))
    assert output.read_text() == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "result.json"]


def test_variance__plot_and_figures_need_two_names(files, model_path, tmp_path, capsys):
    assert "another suffix" in error_of(capsys, variance_flags(files, model_path, tmp_path / "x.png"))


BAD_NUMBERS = {
    "score": {
        "--beta=0": "beta must be positive",
        "--beta=inf": "beta",
        "--max_length=1": "max_length must be at least 2",
        "--max_tokens_per_pack=0": "max_tokens_per_pack must be at least 1",
        "--seed=-1": "seed must be in [0, 2**32)",
        "--seed=4294967296": "seed must be in [0, 2**32)",
        "--device=gpu": "device must be one of cpu",
        "--device=cuda:99": "device must be one of cpu",
        "--device=meta": "device must be one of cpu",
        "--dtype=int8": "dtype must be",
        "--attn_implementation=eager": "attn_implementation must be one of vrpo",
        "--num_samples=0": "num_samples must be at least 1",
    },
    "variance": {
        "--target_variance=0": "target_variance must be positive",
        "--target_variance=-1": "target_variance must be positive",
        "--target_variance=nan": "target_variance",
        "--num_repeats=1": "num_repeats must be at least 2",
        "--noise_repeats=-1": "noise_repeats must be at least 0",
        "--num_pairs=0": "num_pairs must be at least 1",
        "--num_samples=0": "num_samples must be at least 1",
        "--max_tokens_per_pack=-5": "max_tokens_per_pack must be at least 1",
        "--beta=-0.1": "beta must be positive",
    },
}


@pytest.mark.parametrize(("command", "flag"), [(c, flag) for c in BAD_NUMBERS for flag in BAD_NUMBERS[c]])
def test_commands__bad_numbers_are_told_before_anything_is_read(capsys, tmp_path, files, command, flag):
    flags = COMMANDS[command](files, "absent-model", tmp_path / "x.json")
    message = error_of(capsys, [*flags, "--dataset_name=absent.jsonl", flag])
    assert BAD_NUMBERS[command][flag] in message
    assert not list(tmp_path.iterdir())


def nan_model(model_path, target):
    model = load_model(model_path)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(target)
    load_tokenizer(model_path).save_pretrained(target)
    return str(target)


def changed_model(model_path, target, **config):
    model = load_model(model_path)
    for name, value in config.items():
        setattr(model.config, name, value)
    if model.config.vocab_size != len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(model.config.vocab_size)
    model.save_pretrained(target)
    load_tokenizer(model_path).save_pretrained(target)
    return str(target)


def half(model_path, target):
    load_model(model_path, dtype="bfloat16").save_pretrained(target)
    load_tokenizer(model_path).save_pretrained(target)
    return str(target)


def other_tokenizer(model_path, target):
    load_model(model_path).save_pretrained(target)
    tokenizer = load_tokenizer(model_path)
    tokenizer.add_tokens(["<another>"])
    tokenizer.save_pretrained(target)
    return str(target)


UNLIKE = {
    "dtype": (half, "give dtype=float32"),
    "vocabulary": (lambda path, to: changed_model(path, to, vocab_size=400), "different vocabularies"),
    "mask": (lambda path, to: changed_model(path, to, mask_token_id=7), "mask token is"),
    "tokenizer": (other_tokenizer, "different tokenizers"),
    "positions": (lambda path, to: changed_model(path, to, max_position_embeddings=8), "max_length=8"),
}


@pytest.mark.parametrize("command", ["score", "variance"])
@pytest.mark.parametrize("case", UNLIKE)
def test_commands__unlike_models_are_not_compared(files, model_path, tmp_path, capsys, command, case):
    make, message = UNLIKE[case]
    reference = make(model_path, tmp_path / "reference")
    flags = COMMANDS[command](files, model_path, tmp_path / "x.json")
    assert message in error_of(capsys, [*flags, f"--ref_model_name_or_path={reference}"])


BAD_MODELS = {
    "typo": ("runs/typo/model", "no such folder"),
    "hub name": ("typo", "neither a folder nor a model"),
    "file": ("{files}/pairs.jsonl", "must be the folder of a model, not a file"),
    "empty folder": ("{empty}", "holds no model"),
    "nothing": ("", "model_name_or_path"),
}


@pytest.mark.parametrize("command", ["train", *COMMANDS])
@pytest.mark.parametrize("case", BAD_MODELS)
def test_commands__bad_model_paths_are_named(files, tmp_path, capsys, command, case):
    path, message = BAD_MODELS[case]
    (tmp_path / "empty").mkdir()
    path = path.format(files=files, empty=tmp_path / "empty")
    if command == "train":
        flags = ["train", f"--dataset_name={files / 'pairs.jsonl'}", f"--output_dir={tmp_path / 'out'}"]
        flags += [f"--model_name_or_path={path}", "--use_cpu"]
    else:
        flags = flags_of(command, files, path, tmp_path / "x.json")
    told = error_of(capsys, flags)
    assert message in told
    assert "model_name_or_path" in told


def test_variance__equal_models_get_no_advice(files, model_path, tmp_path, capsys):
    output = tmp_path / "v.json"
    assert main(variance_flags(files, model_path, output)) == 0
    assert "model and reference are the same" in capsys.readouterr().out

    def refuse(word):
        raise AssertionError(word)

    told = json.loads(output.read_text(), parse_constant=refuse)
    assert told["target"] == 0 and told["noise"] is None


def test_train__output_dir_never_is_the_model_or_the_data(files, model_path, tmp_path, capsys):
    before = (files / "sft" / "model.safetensors").read_bytes()
    flags = ["train", f"--dataset_name={files / 'pairs.jsonl'}", f"--model_name_or_path={model_path}"]
    for output in (model_path, f"{model_path}/../sft", f"{model_path}/more"):
        told = error_of(capsys, [*flags, "--use_cpu", f"--output_dir={output}"])
        assert "must be apart from model_name_or_path" in told
    assert (files / "sft" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("config", "output"),
    [("score.yaml", "./score.yaml"), ("score.yaml", "~/score.yaml"), ("a.summary.json", "a.jsonl")],
)
def test_score__never_overwrites_its_config(files, model_path, tmp_path, capsys, monkeypatch, config, output):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / config).write_text("num_samples: 2\n")
    flags = score_flags(files, model_path, output, f"--config={config}")
    assert "must not overwrite --config" in error_of(capsys, flags)
    assert (tmp_path / config).read_text() == "num_samples: 2\n"


@pytest.mark.parametrize("command", ["score", "variance"])
def test_commands__mask_token_in_the_data_is_refused_whoever_knows_it(
    files, model_path, tmp_path, capsys, command
):
    model = tmp_path / "model"  # as LLaDA's: the config names the mask token, the tokenizer does not
    shutil.copytree(model_path, model)
    settings = json.loads((model / "tokenizer_config.json").read_text())
    mask = settings.pop("mask_token")
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    data = tmp_path / "pairs.jsonl"
    data.write_text(json.dumps({"prompt": "a", "chosen": f" b {mask}", "rejected": " c"}) + "\n")
    flags = COMMANDS[command](files, model, tmp_path / "out.json", f"--dataset_name={data}")
    assert "the mask token" in error_of(capsys, flags)
