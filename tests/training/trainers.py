"""What the tests of the trainers share: a quick configuration, a trainer, and how to read its log."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from vrpo import VRPOConfig, VRPOTrainer
from vrpo.training.config import DiffusionConfig

LORA = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, target_modules=["q_proj", "v_proj"])


def config(tmp_path: Path, kind: type = VRPOConfig, **fields: Any) -> DiffusionConfig:
    settings = {
        "output_dir": str(tmp_path / "out"),
        "num_samples": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "training_report": False,
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return kind(**settings | fields)


def trainer_of(tmp_path, model, tokenizer, rows, kind=VRPOTrainer, **fields) -> VRPOTrainer:
    extra = {
        name: fields.pop(name)
        for name in ("ref_model", "peft_config", "eval_dataset", "callbacks", "compute_metrics", "model_init")
        if name in fields
    }
    if "peft_config" in extra:  # PEFT writes the base model's name into it
        extra["peft_config"] = copy.deepcopy(extra["peft_config"])
    return kind(
        model, args=config(tmp_path, **fields), train_dataset=rows, processing_class=tokenizer, **extra
    )


def logged(trainer, key: str) -> list:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def parameters(model) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])
