"""What the training commands accept beside the trainers' configs; names follow TRL's."""

from dataclasses import dataclass, field
from typing import Any


def _field(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ScriptArguments:
    """The data of a training run."""

    dataset_name: str | list[str] = field(
        metadata={
            "help": "Training data: a file (.jsonl, .ndjson, .json, .csv, .tsv, .parquet, also as .gz), "
            "several of them, a folder, or a hub name."
        }
    )
    dataset_config: str | None = _field(None, "Configuration of a hub dataset.")
    dataset_train_split: str = _field(
        "train", "Split to train on; slices such as train[:500] work. A file has no split but train."
    )
    dataset_test_split: str | None = _field(
        None, "Split of dataset_name to evaluate on, instead of eval_dataset_name."
    )
    eval_dataset_name: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Data to evaluate on every eval_steps and at the end: files, a folder or a hub name."
        },
    )
    dataset_streaming: bool = _field(
        False,
        "Read the training data while it is trained on, instead of all of it before; max_steps must be "
        "given, and a split has no slice.",
    )
    dry_run: bool = _field(
        False,
        "Train nothing and save no weights: print what the data is like, the steps, an estimate of memory "
        "and time, and the first pack with its masks.",
    )


@dataclass
class ModelArguments:
    """The model, and LoRA adapters on it."""

    model_name_or_path: str | None = _field(
        None, "Checkpoint to start from: a folder or a hub name, in LLaDA's format."
    )
    model_revision: str = _field("main", "Branch, tag or commit of a hub model.")
    dtype: str = _field(
        "float32",
        "Dtype of the weights: float32, bfloat16, float16 or auto (the checkpoint's). Training rounds "
        "small updates away in anything but float32.",
    )
    attn_implementation: str = _field(
        "vrpo", "Attention over packs: vrpo (the best one here), vrpo_sdpa, vrpo_varlen or vrpo_fa."
    )
    use_peft: bool = _field(False, "Train LoRA adapters instead of all weights.")
    lora_r: int = _field(16, "Rank of the adapters.")
    lora_alpha: int = _field(32, "Adapter output is scaled by lora_alpha / lora_r.")
    lora_dropout: float = _field(0.0, "Dropout of the adapters; off while disable_dropout is set.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Names of the layers that get adapters. Unset: every linear one but the head."},
    )
