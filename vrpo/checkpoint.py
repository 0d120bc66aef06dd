"""A model for the commands: a checkpoint, or a LoRA adapter saved by `vrpo train` on top of one."""

import json
from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import is_peft_available

from vrpo.models import load_model

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


def require_peft(who: str) -> None:
    """ValueError unless the peft package is installed."""
    if not is_peft_available():
        raise ValueError(f"{who} needs the package peft: pip install 'vrpo[peft]'")
