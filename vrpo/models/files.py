"""What a checkpoint's files must be before a model is made of them: one sentence naming the file if not."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import cached_file

from vrpo.models.names import to_original
from vrpo.models.partitioned import any_partitioned, in_any_process, local_part

_INDEX, _WEIGHTS = "model.safetensors.index.json", "model.safetensors"
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")

# model_type, in lower case, of diffusion language models other than LLaDA -> their name.
_DIFFUSION = {
    "dream": "Dream",
    "sdar": "SDAR",
    "sdar_moe": "SDAR",
    "llada2_moe": "LLaDA2",
    "lladamoe": "LLaDA-MoE",
    "llada_moe": "LLaDA-MoE",
    "mdlm": "MDLM",
    "bd3lm": "BD3-LM",
}


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in a file.

    Errors: ValueError naming the file if it is empty, not text, not JSON, or holds something else.
    """
    try:
        text = Path(path).read_bytes().decode("utf-8")
        found = json.loads(text)
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        reason = "is empty" if not Path(path).stat().st_size else f"is not JSON ({error})"
        raise ValueError(f"{path} {reason}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(found).__name__} ({str(found)[:40]})")
    return found


def find_file(path_or_id: str, name: str, **hub_kwargs: Any) -> str:
    """Where a file of a checkpoint folder or hub name lies; keywords that do not say where are ignored.

    Errors: OSError of one line if there is none.
    """
    where = {key: value for key, value in hub_kwargs.items() if key in _WHERE}
    try:
        found = cached_file(path_or_id, name, **where)
    except OSError as error:
        raise OSError(" ".join(str(error).split())) from error
    if found is None:
        raise FileNotFoundError(f"{path_or_id} holds no {name}")
    return found


def why_unsupported(raw: dict[str, Any]) -> str:
    """What is known of a model of a foreign `model_type`, as a sentence that is true of it."""
    model_type, classes = raw.get("model_type"), raw.get("architectures")
    if model_type == "llada":
        return "Load LLaDA with vrpo.models.load_model: this is another class of it"
    if isinstance(model_type, str) and model_type.lower() in _DIFFUSION:
        name = _DIFFUSION[model_type.lower()]
        return f"{name} is a diffusion language model that this version does not support yet"
    if isinstance(model_type, str) and model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        causal = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
        has_own_code = bool(raw.get("auto_map")) or raw.get("mask_token_id") is not None
        if causal and not has_own_code and classes in (None, [], [causal]):
            return "A causal language model cannot fill in masked tokens"
    return "This version does not know the architecture"


def check_weight_files(folder: str | Path) -> None:
    """Whether the safetensors of a checkpoint folder are all there and whole; reads their headers only.

    Errors: ValueError or FileNotFoundError naming the file: no weights, pickled weights only (which are not
        read: unpickling runs code), a broken index, a missing, cut or corrupt file, a tensor that is not in
        the file that the index names.
    """
    folder = Path(folder)
    if (folder / _WEIGHTS).is_file():
        _tensors_of(folder / _WEIGHTS)
        return
    if not (folder / _INDEX).is_file():
        if parts := in_parts(folder):
            raise ValueError(parts)
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles:
            raise ValueError(
                f"{folder} holds its weights as {pickles[0]}: pickled weights are not read, since that can "
                "run code; convert them to safetensors"
            )
        raise FileNotFoundError(f"{folder} holds no weights: neither {_WEIGHTS} nor {_INDEX}")
    weight_map = read_object(folder / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ValueError(f"{folder / _INDEX} must hold a weight_map from tensors to files")
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / _INDEX} names {file}, which is not there")
        missing = {name for name, place in weight_map.items() if place == file} - _tensors_of(folder / file)
        if missing:
            raise ValueError(f"{folder / file} lacks {first_few(missing)}, which {_INDEX} says it holds")


def in_parts(folder: str | Path) -> str | None:
    """What to say of a folder with a model in the parts of FSDP2's or DeepSpeed's processes, if it is one.

    Of the folder of a checkpoint, or of that with the parts inside it.
    """
    folder = Path(folder)
    for parts in (folder, *sorted(folder.glob("pytorch_model_fsdp_*"))):
        if (parts / ".metadata").is_file() and any(parts.glob("*.distcp")):
            whole = parts.parent if parts == folder else folder
            return (
                f"{folder} holds its weights in the parts of FSDP's processes: join them with accelerate "
                f"merge-weights {parts} {whole}, and name {whole}, which needs config.json and the tokenizer"
            )
    whole = folder if (folder / "zero_to_fp32.py").is_file() else folder.parent
    if any((*folder.glob("*_optim_states.pt"), *folder.glob("global_step*/*_optim_states.pt"))):
        return (
            f"{folder} holds its weights in the parts of DeepSpeed's processes: join them with python "
            f"{whole / 'zero_to_fp32.py'} {whole} {whole} --safe_serialization, and name {whole}, which "
            "needs config.json and the tokenizer"
        )
    return None


def _tensors_of(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        reason = "is empty" if not size else f"is cut or not safetensors, {size} bytes ({error})"
        raise ValueError(f"{path} {reason}") from error


def check_finite(model: nn.Module, source: str) -> None:
    """ValueError naming the first weights of a model that hold NaN or infinities; source is what it is of.

    A collective where ZeRO-3 loaded the model in parts.
    """
    bad = [
        to_original(name)
        for name, parameter in model.named_parameters()
        if not parameter.is_meta and not _is_finite(local_part(parameter))
    ]
    if any_partitioned(model.parameters()):
        bad = list(in_any_process(bad))
    if bad:
        raise ValueError(f"{source} holds NaN or infinite weights: {first_few(bad, in_order=True)}")


def _is_finite(tensor: torch.Tensor) -> bool:
    # The extremes are NaN where anything is: one pass without a tensor of booleans, 10 to 17 times faster.
    return tensor.numel() == 0 or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def first_few(names, limit: int = 6, in_order: bool = False) -> str:
    """The first names of a list, sorted unless in_order, and how many more there are."""
    names = [str(name) for name in names] if in_order else sorted(str(name) for name in names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
