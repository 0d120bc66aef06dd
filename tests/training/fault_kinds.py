"""The kinds of tiny training runs that test_faults.py stops and starts again, and what a run's end is."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig
from transformers import TrainerCallback

from vrpo import (
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    VRPOConfig,
    VRPOTrainer,
)
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model
from vrpo.training import reference_cache
from vrpo.training.trainer import DiffusionTrainer

reference_cache.PART_EXAMPLES = 2  # five parts in each epoch of the precomputed ELBOs

PAIRS = [
    {"prompt": f"{n}?", "chosen": "one " * (1 + n % 3), "rejected": f"two {n}", "completion": f" {2 * n}."}
    for n in range(10)
]
COMMON: dict[str, Any] = {
    "num_samples": 2,
    "max_length": 32,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2,
    "max_steps": 5,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "logging_steps": 3,  # not a multiple of what is saved: sums are carried over
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "resume_from_checkpoint": "auto",
}
BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
KINDS: dict[str, dict[str, Any]] = {
    "sft": {"max_eos_fill": 4},
    "vrpo": BEST | {"max_tokens_per_pack": 120},
    # An epoch is three steps: the evaluation at its end and every second checkpoint meet. The base model is
    # at no path, so the run writes it.
    "lora": {"eval_strategy": "epoch", "disable_dropout": False, "save_steps": 3},
    "kto": BEST,
    "precomputed": {"precompute_ref_log_probs": True, "eval_strategy": "steps", "eval_steps": 3},
    "synced": {"sync_ref_model": True, "ref_model_sync_steps": 3, "ref_model_mixup_alpha": 0.5},
    "streamed": {"streaming_shuffle_buffer": 4},
    # Ten rows: an epoch ends with a step of one batch, and a checkpoint lies between steps of four.
    "accumulated": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "save_steps": 1},
    # Every pair is divided over packs.
    "replayed": {"gradient_mode": "replay", "max_tokens_per_pack": 40},
}


class Run:
    """One kind of training: how its trainer is made, from the same start every time."""

    def __init__(self, kind: str, folder: Path):
        self.kind = kind
        texts = [text for row in PAIRS for text in row.values()]
        self.tokenizer = train_tokenizer(texts, vocab_size=300)
        self.rows: Dataset | IterableDataset = Dataset.from_list(PAIRS)
        self.evaluation = self.rows.select(range(4))
        if kind == "streamed":
            self.rows = self.rows.to_iterable_dataset(num_shards=3)
        elif kind == "kto":
            self.rows = Dataset.from_list(
                [
                    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
                    for row in PAIRS[:5]
                    for side in ("chosen", "rejected")
                ]
            )
        if kind != "streamed":  # tokenised once
            trainer = self.trainer(str(folder), [], precompute_ref_log_probs=False)
            self.rows, self.evaluation = trainer.train_dataset, trainer.eval_dataset

    def trainer(self, output_dir: str, callbacks: list[TrainerCallback], **changes: Any) -> DiffusionTrainer:
        trainer_class, config = {
            "sft": (DiffusionSFTTrainer, DiffusionSFTConfig),
            "kto": (DiffusionKTOTrainer, DiffusionKTOConfig),
        }.get(self.kind, (VRPOTrainer, VRPOConfig))
        fields = COMMON | KINDS[self.kind]
        if config is not DiffusionSFTConfig:
            fields |= changes
        model = create_model(self.tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.2, seed=3)
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])
        return trainer_class(
            model,
            args=config(output_dir=output_dir, **fields),
            train_dataset=self.rows,
            eval_dataset=self.evaluation if "eval_strategy" in fields else None,
            processing_class=self.tokenizer,
            peft_config=lora if self.kind == "lora" else None,
            callbacks=callbacks,
        )

    def train(self, output_dir: Path, callbacks: list[TrainerCallback]) -> dict[str, Any]:
        """All that a run ends with, in memory and on the disk, in the form `same` compares."""
        trainer = self.trainer(str(output_dir), callbacks)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model(str(output_dir))
        kept = ("*.safetensors", "reference_elbos/**/*.arrow", "base_model/*.safetensors")
        state = trainer.state
        return {
            "log": curve(trainer),
            "weights": trainer.model.state_dict(),
            "reference": trainer.ref_model.state_dict() if self.kind == "synced" else None,
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": trainer.lr_scheduler.state_dict(),
            "best": (state.best_global_step, state.best_metric, state.best_model_checkpoint is not None),
            "saved": {
                str(path.relative_to(output_dir)): path.read_bytes()
                for pattern in kept
                for path in sorted(output_dir.glob(pattern))
            },
        }


def curve(trainer) -> list[dict[str, float]]:
    """What was logged at steps, without what was measured of the process: times and memory.

    The summary of one call of train() is not of the run.
    """
    measured = ("runtime", "per_second", "peak_memory_gb")
    return [
        {key: value for key, value in entry.items() if not key.endswith(measured)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def differing(left: Any, right: Any, name: str = "end") -> list[str]:
    """The names of what is not the same, bit for bit."""
    if isinstance(left, dict) and isinstance(right, dict):
        if left.keys() != right.keys():
            return [f"{name} has {sorted(map(str, left.keys() ^ right.keys()))} once"]
        return [found for key in left for found in differing(left[key], right[key], f"{name}.{key}")]
    if isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [found for index, pair in pairs for found in differing(*pair, f"{name}.{index}")]
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return [] if left.dtype == right.dtype and torch.equal(left, right) else [name]
    return [] if left == right else [name]
