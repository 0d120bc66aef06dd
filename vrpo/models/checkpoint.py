"""What the commands need around a model: checkpoints and adapters, the device, places to write to."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel

from vrpo.models import load_model
from vrpo.models.adapters import require_peft

_ADAPTER_CONFIG = "adapter_config.json"


def load_policy(path_or_id: str, *, dtype: str, attn_implementation: str, revision: str) -> PreTrainedModel:
    """`models.load_model`, or the base model of an adapter folder with the adapter merged into it.

    Errors: ValueError if the path holds an adapter and peft is not installed; those of `load_model`.
    """
    adapter = Path(path_or_id) / _ADAPTER_CONFIG
    if not adapter.is_file():
        return load_model(path_or_id, dtype=dtype, attn_implementation=attn_implementation, revision=revision)
    require_peft(f"{path_or_id} holds a LoRA adapter, which")
    from peft import PeftModel

    base = json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"]
    model = load_model(base, dtype=dtype, attn_implementation=attn_implementation, revision=revision)
    return PeftModel.from_pretrained(model, path_or_id).merge_and_unload()


def default_device(name: str | None) -> str:
    """The device asked for, else a GPU where there is one, else the CPU."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def check_writable(output_file: str) -> Path:
    """Make the folder and open the file, so that an unwritable place is known before the work.

    Errors: ValueError naming the file and the reason.
    """
    path = Path(output_file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise ValueError(f"output_file {output_file!r} cannot be written: {error.strerror}") from error
    return path
