"""Whether a model path leads somewhere, asked before any work."""

from pathlib import Path

import torch
from transformers import PretrainedConfig

from vrpo.models.adapter_config import adapter_folder
from vrpo.models.attention import ATTENTION_NAMES
from vrpo.models.files import in_parts
from vrpo.models.loading import load_config, parse_dtype

_CONFIGS = ("config.json", "adapter_config.json")


def check_model_path(path_or_id: str, *, argument: str, revision: str = "main") -> PretrainedConfig | None:
    """The configuration of a checkpoint folder or hub name; None of an adapter.

    Errors: ValueError or OSError of one sentence that names the argument and what is wrong: nothing there, a
        file, a folder without a model, no such hub name, or a model of another kind.
    """
    path, told = Path(path_or_id), f"{argument} {path_or_id!r}"
    check_revision(path_or_id, revision, argument)
    if not path_or_id.strip():
        raise ValueError(f"{told} must be a folder or a hub name")
    if path.is_file():
        raise ValueError(f"{told} must be the folder of a model, not a file")
    if path.is_dir():
        if not any((path / name).is_file() for name in _CONFIGS):
            if parts := in_parts(path):
                raise ValueError(f"{argument}: {parts}")
            raise ValueError(f"{told} holds no model: it has neither {' nor '.join(_CONFIGS)}")
        if (path / "adapter_config.json").is_file():
            return None
    elif path.is_absolute() or path_or_id.startswith(("./", "../", "~")) or len(path.parts) > 2:
        raise FileNotFoundError(f"{told}: no such folder")
    try:
        return load_config(path_or_id, revision=revision)
    except OSError as error:
        if path.is_dir():
            raise
        if adapter_folder(path_or_id, revision) is not None:
            return None
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise OSError(f"{told} is neither a folder nor a model that the hub gives ({reason})") from error


def check_revision(path_or_id: str, revision: str, argument: str = "model_name_or_path") -> None:
    """ValueError for a revision of what is on this machine, and has none."""
    if revision != "main" and Path(path_or_id).expanduser().exists():
        raise ValueError(
            f"model_revision={revision!r} does nothing with {argument} {path_or_id!r}, which is here and has "
            "no revisions: leave it out, or give a hub name"
        )


def check_device(name: str | None) -> str:
    """The device asked for, else a GPU where there is one, else the CPU.

    Errors: ValueError naming the devices that are there.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device must be one of {', '.join(there)}, got {name!r}") from error
    known = str(device) in there or (device.index is None and any(d.startswith(device.type) for d in there))
    if not known:
        raise ValueError(f"device must be one of {', '.join(there)}, which are here; got {name!r}")
    return name


def check_loading(dtype: str, attn_implementation: str) -> None:
    """ValueError naming the argument unless both are words that `load_model` knows."""
    parse_dtype(dtype)
    if attn_implementation not in ATTENTION_NAMES:
        raise ValueError(
            f"attn_implementation must be one of {', '.join(ATTENTION_NAMES)}, got {attn_implementation!r}"
        )
