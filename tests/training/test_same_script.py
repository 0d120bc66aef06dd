"""One script trains with TRL's DPOTrainer and with VRPOTrainer: only import and class names differ."""

import json
import math
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

SCRIPT = """
import json, sys
from datasets import load_dataset
from {module} import {config}, {trainer}

model, rows, output = sys.argv[1:]
args = {config}(
    output_dir=output,
    max_steps=3,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=1e-2,
    lr_scheduler_type="constant",
    beta=0.2,
    loss_type="sigmoid",
    max_length=64,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    bf16=False,
    use_cpu=True,
    disable_tqdm=True,
    seed=0,
)
dataset = load_dataset("json", data_files=rows, split="train")
trainer = {trainer}(model=model, args=args, train_dataset=dataset)
trainer.train()
trainer.save_model(output)
print(json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))
"""
OURS = {"module": "vrpo", "config": "VRPOConfig", "trainer": "VRPOTrainer"}
THEIRS = {"module": "trl", "config": "DPOConfig", "trainer": "DPOTrainer"}


def log_of(names, model, rows, output) -> list[dict]:
    """The script in a process of its own, as a user runs it."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(**names), str(model), str(rows), str(output)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def test_script__differs_from_that_of_trl_in_the_names_only(tmp_path, tiny_model, tokenizer, pair_rows):
    pytest.importorskip("trl")
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in pair_rows))
    tiny_model.save_pretrained(tmp_path / "diffusion")
    causal = LlamaConfig(
        vocab_size=tiny_model.config.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(causal).save_pretrained(tmp_path / "causal")
    for name in ("diffusion", "causal"):
        tokenizer.save_pretrained(tmp_path / name)
    ours = log_of(OURS, tmp_path / "diffusion", rows, tmp_path / "ours")
    theirs = log_of(THEIRS, tmp_path / "causal", rows, tmp_path / "theirs")
    for log in (ours, theirs):
        assert len(log) == 3
        assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)  # policy == reference
        assert log[-1]["rewards/margins"] != 0
        assert log[0]["rewards/accuracies"] is not None and log[0]["logps/chosen"] < 0
    assert theirs[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    # The one default that TRL does not have: the recipe of LLaDA 1.5 adds 0.05 of an SFT loss.
    preference = ours[0]["loss"] - 0.05 * ours[0]["vrpo/sft_loss"]
    assert preference == pytest.approx(math.log(2), abs=1e-4)
    for name in ("ours", "theirs"):
        assert (tmp_path / name / "model.safetensors").is_file()
