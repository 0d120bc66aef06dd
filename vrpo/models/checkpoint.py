"""What the commands load: a checkpoint, or an adapter merged into its base model."""

import json
from pathlib import Path

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
