"""The recipes of examples/scaling parse, and are refused where they were not launched as they say."""

import json
from pathlib import Path

import pytest
import torch

from vrpo.commands.options import parse
from vrpo.commands.table import COMMANDS

FOLDER = Path(__file__).parents[2] / "examples/scaling"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("full_fsdp2", "fsdp=True shards a model"),
        ("full_zero3", "deepspeed=.* needs a launcher"),
        ("lora_zero3", "deepspeed=.* needs a launcher"),
    ],
)
@pytest.mark.filterwarnings("ignore:.gradient_checkpointing. is deprecated:FutureWarning")
def test_parse__a_recipe_for_many_gpus_says_how_to_launch_it(name, message, monkeypatch):
    monkeypatch.chdir(FOLDER.parents[1])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    if name.endswith("zero3"):
        pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=message):
        parse(COMMANDS["train"], [f"--config={FOLDER / name}.yaml", "--bf16=false"])


def test_parse__the_recipe_for_one_gpu(tmp_path):
    flags = [f"--config={FOLDER / 'lora_one_gpu.yaml'}", "--use_cpu", f"--output_dir={tmp_path}"]
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        (script, model, config, *_), _ = parse(COMMANDS["train"], flags)
    assert model.use_peft and config.bf16 and config.max_tokens_per_pack == 16384
    assert script.dataset_name == "preferences.jsonl"


def test_zero3_json__leaves_the_batch_to_the_trainer():
    settings = json.loads((FOLDER / "zero3.json").read_text())
    assert settings["zero_optimization"]["stage"] == 3
    assert settings["gradient_accumulation_steps"] == settings["gradient_clipping"] == "auto"
