"""What the commands load: a checkpoint, or an adapter merged into its base model."""

import torch
from transformers import PreTrainedModel

from vrpo.models import load_model
from vrpo.models.adapter_config import adapter_folder, base_of, check_mergeable, check_tied
from vrpo.models.adapters import load_adapter, read_adapter
from vrpo.models.partitioned import any_partitioned
from vrpo.models.quantized import Quantization


def load_policy(
    path_or_id: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "vrpo",
    revision: str = "main",
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
) -> PreTrainedModel:
    """`models.load_model`; of an adapter's folder, the base with the adapter merged.

    The result is a model as any other: `save_pretrained` writes a checkpoint without an adapter. On a base
    that is quantized the adapter stays apart, as it was in training: merging would round it away.

    Args: as `load_model`. revision: of the repository that is named; adapter_config.json has the base's.
    Errors: ValueError if the path holds an adapter and peft is not installed, or naming the file that is
        broken or missing; those of `load_model`.
    """
    loading = {
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        "quantization": quantization,
        "device": device,
    }
    if adapter_folder(path_or_id, revision) is None:
        return load_model(path_or_id, revision=revision, **loading)
    saved = read_adapter(path_or_id, revision)
    check_mergeable(saved.config, str(saved.folder))
    base = base_of(saved.folder, saved.config)
    try:
        model = load_model(base, revision=saved.config.revision or "main", **loading)
    except (OSError, ValueError) as error:
        raise ValueError(f"the base model of the adapter in {saved.folder}: {error}") from error
    if any_partitioned(model.parameters()):
        raise ValueError(
            f"{saved.folder} holds an adapter, and DeepSpeed ZeRO-3 loads its base in parts, into which "
            "nothing can be merged: merge it beforehand (vrpo.models.checkpoint.load_policy(folder)"
            ".save_pretrained(...) in one process, the tokenizer beside it) and name that folder"
        )
    check_tied(saved.config, str(saved.folder), model.config)
    if quantization is not None and quantization.name is not None:
        return load_adapter(model, saved)
    merged = load_adapter(model, saved).merge_and_unload(safe_merge=True)
    # What is merged is not what lies at the base's path.
    merged.name_or_path = merged.config.name_or_path = str(saved.folder)
    return merged.eval().requires_grad_(True)  # PEFT froze the base
