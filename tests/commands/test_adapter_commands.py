"""The commands on adapters' folders."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset

from vrpo.commands.main import main
from vrpo.models.checkpoint import load_policy

QUICK = [
    "--max_steps=2", "--per_device_train_batch_size=4", "--gradient_accumulation_steps=1", "--warmup_steps=0",
    "--learning_rate=1e-2", "--report_to=none", "--use_cpu=true", "--save_strategy=no", "--num_samples=2",
]  # fmt: skip


@pytest.fixture
def files(tmp_path, monkeypatch, tiny_model, tokenizer, pair_rows, completion_rows):
    """A working folder with base, pairs.jsonl and sft.jsonl, all named relative to it."""
    monkeypatch.chdir(tmp_path)
    tiny_model.save_pretrained("base")
    tokenizer.save_pretrained("base")
    for name, rows in (("pairs", pair_rows), ("sft", completion_rows)):
        with open(f"{name}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in Dataset.to_list(rows))
    return tmp_path


def sft(model, output, *more):
    flags = [f"--model_name_or_path={model}"] if model else []
    return main(["sft", *flags, "--dataset_name=sft.jsonl", f"--output_dir={output}", *QUICK, *more])


def train(model, output, *more):
    flags = [f"--model_name_or_path={model}", "--dataset_name=pairs.jsonl", f"--output_dir={output}"]
    return main(["train", *flags, *QUICK, *more])


def elbo(model, *more):
    flags = ["--dataset_name=sft.jsonl", "--output_file=scores.jsonl", "--num_samples=8"]
    assert main(["score", f"--model_name_or_path={model}", *flags, *more]) == 0
    with open("scores.summary.json", encoding="utf-8") as file:
        return json.load(file)["elbo/completion_per_token"]


def test_train__on_an_adapters_folder_keeps_the_first(files):
    assert sft("base", "a1", "--use_peft", "--max_steps=6") == 0
    assert train("a1", "a2", "--use_peft", "--learning_rate=1e-7") == 0
    assert train("a1", "full", "--learning_rate=1e-7") == 0
    first = elbo("a1")
    assert abs(first - elbo("base")) > 0.01
    assert elbo("a2") == pytest.approx(first, abs=1e-4)
    assert elbo("full") == pytest.approx(first, abs=1e-4)
    assert (files / "full" / "model.safetensors").is_file()
    assert main(["generate", "--model_name_or_path=a2", "--prompt=What is 2?", "--max_new_tokens=8"]) == 0


def test_score__in_another_folder_finds_the_base(files, monkeypatch):
    assert sft("base", "a1", "--use_peft") == 0  # the base was named relative to this folder
    (files / "elsewhere").mkdir()
    monkeypatch.chdir(files / "elsewhere")
    elbo("../a1", "--dataset_name=../sft.jsonl")


def test_sft__a_new_model_with_an_adapter_keeps_the_model(files):
    (files / "new.yaml").write_text(
        "new_model: {vocab_size: 300, d_model: 32, n_layers: 1, n_heads: 2, mlp_hidden_size: 64}\n"
    )
    assert sft(None, "out", "--config=new.yaml", "--use_peft") == 0
    assert (files / "out" / "base_model" / "model.safetensors").is_file()
    elbo("out")


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}),
        (["attn_out", "gate_proj"], {"attn_out", "ff_proj"}),
    ],
)
def test_train__lora_target_modules(files, names, found):
    assert train("base", "out", "--use_peft", "--lora_target_modules", *names) == 0
    config = json.loads((files / "out" / "adapter_config.json").read_text())
    assert {name for name in config["target_modules"] if name in LLADA} == found


LLADA = {"q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"}


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (["qkv_proj"], "'qkv_proj' fits no layer; there are"),
        (["all-linear", "q_proj"], "'all-linear' fits no layer"),
        (["lm_head"], "selects the head"),
    ],
)
def test_train__lora_target_modules_that_are_none(files, capsys, names, told):
    assert train("base", "out", "--use_peft", "--lora_target_modules", *names) == 2
    assert told in capsys.readouterr().err
    assert not (files / "out" / "adapter_config.json").exists()


def test_train__equal_seeds_give_equal_adapters(files):
    for name in ("one", "two"):
        assert train("base", name, "--use_peft", "--seed=5") == 0
    one, two = (load_policy(name).state_dict() for name in ("one", "two"))
    assert all(one[name].equal(two[name]) for name in one)


@pytest.mark.parametrize("command", ["score", "generate", "train"])
def test_commands__a_broken_adapter_is_told_in_one_line(files, capsys, command):
    assert sft("base", "a1", "--use_peft") == 0
    file = files / "a1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    capsys.readouterr()
    flags = {
        "score": ["--dataset_name=sft.jsonl", "--output_file=s.jsonl"],
        "generate": ["--prompt=What is 2?"],
        "train": ["--dataset_name=pairs.jsonl", "--output_dir=out", *QUICK],
    }[command]
    assert main([command, "--model_name_or_path=a1", *flags]) == 2
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert told.startswith("vrpo: error:") and "a1/adapter_model.safetensors cannot be read" in told


def test_score__an_adapter_of_the_hub_in_a_fresh_process(files):
    assert sft("base", "a1", "--use_peft") == 0
    snapshot = files / "hub" / "models--someone--adapter" / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    for name in ("adapter_config.json", "adapter_model.safetensors"):  # without a tokenizer
        (files / "a1" / name).rename(snapshot / name)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("0123")
    command = [sys.executable, "-m", "vrpo", "score", "--model_name_or_path=someone/adapter"]
    command += ["--dataset_name=sft.jsonl", "--output_file=s.jsonl"]
    offline = os.environ | {"HF_HUB_CACHE": str(files / "hub"), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, env=offline, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
