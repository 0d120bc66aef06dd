"""The base model of an adapter: is it on disk as it is in memory, and if not, put it there.

An adapter is worth nothing without the very weights it was trained on. They are at no path when the base is
an earlier adapter merged in, a new model, or one whose embedding was resized; and a checkpoint can change on
disk. So they are compared, by value, before training.
"""

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from vrpo import disk
from vrpo.models.adapter_config import CONFIG_FILE
from vrpo.models.adapters import unwrapped
from vrpo.models.loading import load_config
from vrpo.models.names import HEAD, layers, to_here

BASE_FOLDER = "base_model"


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Name here -> weight of the base under PEFT's wrappers; a tied head is left out."""
    base = model.get_base_model()
    names = [layer.here for layer in layers(base.config.num_hidden_layers)]
    if base.config.tie_word_embeddings:
        names.remove(HEAD.here)
    return {f"{name}.weight": unwrapped(base, name).weight.detach() for name in names}


def is_saved(model: nn.Module, path_or_id: str, revision: str | None = None) -> bool:
    """Whether the base equals the checkpoint at a path or in the hub's cache, bit for bit in its dtype."""
    if not path_or_id:
        return False
    try:
        saved_config = load_config(path_or_id, revision=revision or "main", local_files_only=True)
        files = _weight_files(path_or_id, revision)
    except (OSError, ValueError):
        return False
    if _architecture(saved_config) != _architecture(model.get_base_model().config):
        return False
    try:
        return bool(files) and _same(base_weights(model), files)
    except SafetensorError:  # damaged
        return False


def _architecture(config: Any) -> dict[str, Any]:
    apart = ("torch_dtype", "transformers_version", "architectures", "_name_or_path", "bos_token_id")
    return {key: value for key, value in config.to_diff_dict().items() if key not in apart}


def _weight_files(path_or_id: str, revision: str | None) -> list[str]:
    def find(name: str) -> str | None:
        return cached_file(
            path_or_id,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    single = find(SAFE_WEIGHTS_NAME)
    if single is not None:
        return [single]
    index = find(SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    names = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
    files = [find(name) for name in names]
    return [] if None in files else files


def _same(weights: dict[str, Tensor], files: list[str]) -> bool:
    left = dict(weights)
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 -- not a mapping
                weight = left.pop(to_here(name), None)
                if weight is None:
                    continue  # a tied head, written twice
                saved = opened.get_tensor(name)
                if not torch.equal(saved.to(weight.device, weight.dtype), weight):
                    return False
    return not left


def keep_base(model: nn.Module, tokenizer: Any, output_dir: str | os.PathLike) -> Path | None:
    """Write the base to output_dir/base_model, unless the path that its adapters name holds it already.

    Written aside and renamed once it is on the disk. Call it on one process, before the weights are sharded.
    A base that was quantized as it was loaded is not on disk in that form, nor wanted there: it comes from
    its checkpoint.

    Returns: the folder that the adapters must name, or None if the one they name is right.
    Errors: ValueError if another base, or a damaged one, lies there and adapters beside it need it; OSError
        where it cannot be written.
    """
    base = model.get_base_model()
    named = {config.base_model_name_or_path or base.name_or_path for config in model.peft_config.values()}
    revision = next(iter(model.peft_config.values())).revision
    path = next(iter(named))
    is_quantized = getattr(base, "is_quantized", False)
    if len(named) == 1 and (is_quantized or is_saved(model, path, revision)):
        return Path(path).resolve() if Path(path).is_dir() else None
    folder = Path(output_dir).resolve() / BASE_FOLDER
    if is_saved(model, str(folder)):
        return folder
    users = _adapters_on(folder)
    if users:
        raise ValueError(
            f"{folder} is the base of the adapter in {users[0]} and not the model that is to be trained; "
            "choose another output_dir, or start from the same model again; if it is that model and only its "
            "files are damaged, remove the folder, and it is written again"
        )
    weights = base_weights(model)
    if base.config.tie_word_embeddings:
        weights[f"{HEAD.here}.weight"] = base.get_input_embeddings().weight.detach()
    aside = folder.with_name(folder.name + ".tmp")
    with disk.writing(aside, f"the base model could not be written to {folder}"):
        base.save_pretrained(aside, state_dict=weights)
        if tokenizer is not None:
            tokenizer.save_pretrained(aside)
        disk.replace_folder(aside, folder)
    return folder


def _adapters_on(folder: Path) -> list[Path]:
    """Folders of adapters beside a base that name it: the run's last one and its checkpoints."""
    if not folder.is_dir():
        return []
    found = []
    for place in (folder.parent, *sorted(folder.parent.glob("checkpoint-*"))):
        try:
            named = json.loads((place / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if isinstance(named, str) and Path(named).name == folder.name:
            found.append(place)
    return found
