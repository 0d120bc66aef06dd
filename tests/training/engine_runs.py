"""One process of test_engines.py: trains tiny models on several engines, each from the same start.

    torchrun --nproc_per_node N engine_runs.py OUT engine/case[/resume]...

A run writes its model to OUT/<engine>-<case>-<N>, its log beside it as log.json, and a checkpoint in the
middle of its second epoch. OUT/start holds `first_model`, saved. `resume` goes on from the checkpoint that a
run of `resume` processes wrote.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import Any

import engines
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedTokenizerFast

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import train_tokenizer
from vrpo.generation.callback import LogCompletionsCallback
from vrpo.generation.config import SamplerConfig
from vrpo.models import LLaDAForMaskedDiffusion, create_model, load_model
from vrpo.training.trainer import DiffusionTrainer

ROWS = [
    # Lengths differ, so that the token budget cuts the ranks' batches into different numbers of packs.
    {"prompt": f"What is {n}?", "chosen": "one " * (1 + n % 7), "rejected": f"two {n}"}
    for n in range(32)
]
CASES: dict[str, dict[str, Any]] = {
    # VRPO of all weights against a frozen copy, and the second half of every pack's forward computed again.
    "full": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "lora": {},
    # Every pair is divided over packs.
    "replay": {"max_tokens_per_pack": 40, "gradient_mode": "replay"},
    "sft": {"max_eos_fill": 9},
    # One copy of one token each: most micro-batches of a rank mask nothing.
    "sparse": {"mask_design": "t", "num_samples": 1, "max_eos_fill": 0, "max_tokens_per_pack": 20},
    # As "full"; the backend runs what was captured as it is.
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
    "bf16": {"bf16": True},
    "bf16full": {"bf16": True},
    # Two models that are loaded, as the commands do it: under ZeRO-3 in parts from the start.
    "loaded": {},
    # The reference ELBOs of all epochs first.
    "known": {"precompute_ref_log_probs": True},
    "knownlora": {"precompute_ref_log_probs": True},
    "knownbf16": {"precompute_ref_log_probs": True, "bf16": True},
    # Of two layers the lower one is frozen, and runs once for policy and reference.
    "trunk": {"train_top_layers": 1},
    # Rows that come one after the other, shuffled and dealt out on the way.
    "stream": {"max_eos_fill": 0, "max_steps": 4},
    # Before, between and after the steps; the last batch of 10 rows is filled up.
    "evaluated": {"eval_strategy": "steps", "eval_steps": 2, "eval_on_start": True},
    # "full", but under FSDP2 whole gradients are added up until the end of the step.
    "summed": {},
    # Answers to prompts before, between and after the steps.
    "samples": {},
}
GLOBAL_BATCH = 8
STEPS = 4
SAVED_STEP = 3


def has_deepspeed() -> bool:
    return importlib.util.find_spec("deepspeed") is not None


def tokenizer_of_rows() -> PreTrainedTokenizerFast:
    return train_tokenizer([text for row in ROWS for text in row.values()], vocab_size=300)


def first_model(num_layers: int = 1) -> LLaDAForMaskedDiffusion:
    return create_model(tokenizer_of_rows(), d_model=16, n_layers=num_layers, n_heads=2, init_std=0.2, seed=3)


def build(engine: str, case: str, folder: Path, **settings: Any) -> DiffusionTrainer:
    """A trainer on the engine; `settings` as `engines.use` takes them."""
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    arguments = engines.use(engine, **settings)
    is_sft = case in ("sft", "sparse", "stream")
    rows: list[dict[str, str]] = ROWS
    if is_sft:
        word = "one" if case == "sparse" else None
        rows = [{"prompt": row["prompt"], "completion": word or row["chosen"]} for row in ROWS]
    fields = {
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "num_samples": 2,
        "max_tokens_per_pack": 110,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-2,  # without it the first steps are signs of gradients, which rounding turns
        "warmup_steps": 0,
        "max_grad_norm": 0.5,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": SAVED_STEP,
        "report_to": "none",
        "training_report": False,  # a figure takes longer than the training
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "bf16": False,
    }
    trainer_class, config = (DiffusionSFTTrainer, DiffusionSFTConfig) if is_sft else (VRPOTrainer, VRPOConfig)
    if case == "summed":
        accelerator_config = {"gradient_accumulation_kwargs": {"sync_each_batch": False}}
        arguments["accelerator_config"] = arguments["accelerator_config"] | accelerator_config
    # Before the model: transformers loads one in parts where the arguments say ZeRO-3.
    args = config(output_dir=str(folder), **fields | CASES[case] | arguments)
    tokenizer, dataset = tokenizer_of_rows(), Dataset.from_list(rows)
    model = first_model(2 if case == "trunk" else 1)
    is_loaded = case in ("loaded", "known")
    if is_loaded:
        model = load_model(folder.parent / "start")
    if not engine.startswith("zero") and "bf16" not in case:  # DeepSpeed trains no float64
        model = model.double()
    return trainer_class(
        model,
        args=args,
        **({"ref_model": load_model(folder.parent / "start")} if case == "loaded" else {}),
        train_dataset=dataset.to_iterable_dataset(num_shards=2) if case == "stream" else dataset,
        eval_dataset=dataset.select(range(10)) if case == "evaluated" else None,
        callbacks=[callback(tokenizer)] if case == "samples" else None,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj", "o_proj"])
        if case in ("lora", "replay", "bf16", "knownlora")
        else None,
    )


def callback(tokenizer: PreTrainedTokenizerFast) -> LogCompletionsCallback:
    prompts = [tokenizer(text)["input_ids"] for text in ("What is 1?", "What is 17?")]
    return LogCompletionsCallback(prompts, freq=2, config=SamplerConfig(max_new_tokens=6))


def train(engine: str, case: str, folder: Path, resume: Path | None = None, **settings: Any) -> None:
    trainer = build(engine, case, folder, **settings)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.save_model()
    if trainer.is_world_process_zero():
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        (folder / "log.json").write_text(json.dumps(log))
        log = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
        (folder / "eval.json").write_text(json.dumps(log))


def main(out: str, *jobs: str) -> None:
    world_size = int(os.environ["WORLD_SIZE"])
    for job in jobs:
        engine, case, *start = job.split("/")
        engine, _, kind = engine.partition("+")
        settings = {"state_dict_type": "SHARDED_STATE_DICT"} if kind == "sharded" else {}
        name = f"{engine}{kind}-{case}-{world_size}"
        resume = None
        if start:
            folder = Path(out, f"{engine}{kind}-{case}-{start[0]}")
            resume = folder / f"checkpoint-{SAVED_STEP}"
            name += f"-from-{start[0]}"
        train(engine, case, Path(out, name), resume, **settings)


if __name__ == "__main__":
    main(*sys.argv[1:])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
