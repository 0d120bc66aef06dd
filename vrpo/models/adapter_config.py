"""Which layers an adapter's config selects, read and written in the original names or those here.

PEFT's own matching decides (`check_target_module_exists`), applied to the names that the config was written
for: `["ff_out"]` means the down projections and the head in LLaDA's class, and nothing here. What it selects
is then spelled out in the names that are needed.
"""

import copy
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import is_peft_available

from vrpo.models.names import EMBEDDING, HEAD, Layer, layers

ALL_LINEAR = "all-linear"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PATTERNS = ("rank_pattern", "alpha_pattern")
# Initialisations that leave the base model as it is. The others (PiSSA, OLoRA, ...) move part of it into the
# adapter: then the base on disk is not the one that was trained on.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal", "eva")
# These change the sequence or have no merged form, so packs and the folders we write cannot hold them.
_NO_KINDS = ("ADAPTION_PROMPT", "POLY", "XLORA", "MULTITASK_PROMPT_TUNING", "CPT", "CARTRIDGE")


def require_peft(who: str) -> None:
    """ValueError unless the peft package is installed."""
    if not is_peft_available():
        raise ValueError(f"{who} needs the package peft: pip install 'vrpo[peft]'")


def read_config(file: str | Path) -> Any:
    """The PeftConfig of an adapter_config.json.

    Errors: ValueError naming the file for broken JSON, an unknown kind of adapter, fields of wrong types.
    """
    require_peft(str(file))
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    try:
        raw = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    kind = raw.get("peft_type") if isinstance(raw, dict) else None
    if not isinstance(kind, str) or kind not in PEFT_TYPE_TO_CONFIG_MAPPING:
        raise ValueError(f"{file} must be a PEFT config with a known peft_type, got {kind!r}")
    base = raw.get("base_model_name_or_path")
    if base is not None and not isinstance(base, str):
        raise ValueError(f"{file}: base_model_name_or_path must be a word, got {base!r}")
    try:
        config = PEFT_TYPE_TO_CONFIG_MAPPING[kind].from_pretrained(str(Path(file).parent))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is not a config of a {kind} adapter: {error}") from error
    check_kind(config, str(file))
    return config


def adapter_folder(path_or_id: str | os.PathLike, revision: str | None = None) -> Path | None:
    """The folder (for a hub id: in the cache) that holds adapter_config.json; None if there is none.

    Errors: ValueError for a folder whose adapters all lie in subfolders: which one is meant?
    """
    path = Path(path_or_id)
    if path.is_dir():
        if (path / CONFIG_FILE).is_file():
            return path
        inside = sorted(file.parent.name for file in path.glob(f"*/{CONFIG_FILE}"))
        inside = [name for name in inside if not name.startswith("checkpoint-")]
        if inside and not (path / "config.json").is_file():
            raise ValueError(
                f"{path} holds adapters in subfolders only ({', '.join(inside)}): name one of them"
            )
        return None
    if path.exists() or path.is_absolute() or not is_peft_available():
        return None
    from huggingface_hub.errors import HFValidationError
    from transformers.utils.peft_utils import find_adapter_config_file

    try:
        file = find_adapter_config_file(str(path_or_id), revision=revision)
    except (HFValidationError, OSError):
        return None  # no repository of that name; whoever loads the model says so
    if file is None:
        return None
    from transformers.utils import cached_file

    cached_file(str(path_or_id), WEIGHTS_FILE, revision=revision, _raise_exceptions_for_missing_entries=False)
    return Path(file).parent


def base_of(folder: Path, config: Any) -> str:
    """Where the base model of an adapter's folder is: a folder, or a hub id.

    A folder that is not at its path any more is looked for beside the adapter, which may have moved with it.
    Errors: ValueError naming the config if it names no base, or one that is nowhere.
    """
    name = config.base_model_name_or_path
    if not name:
        raise ValueError(f"{folder / CONFIG_FILE} names no base model (base_model_name_or_path)")
    path = Path(name)
    candidates = [path] if path.is_absolute() else [path, folder / path, folder.parent / path]
    candidates += [folder / path.name, folder.parent / path.name]
    for candidate in candidates:
        if (candidate / "config.json").is_file():
            return str(candidate)
    if path.is_absolute() or name.startswith(".") or len(path.parts) > 2 or path.exists():
        raise ValueError(
            f"{folder / CONFIG_FILE} names the base model {name!r}, which is not there: put it there, or "
            "write its new place into base_model_name_or_path"
        )
    return name


def check_kind(config: Any, source: str) -> None:
    """ValueError for adapters that cannot be trained on packs, merged, or given back to LLaDA's class."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning or kind in _NO_KINDS:
        raise ValueError(
            f"{source}: adapters of kind {kind} are not supported, since they cannot be merged into "
            "the weights; use LoRA"
        )
    init = getattr(config, "init_lora_weights", True)
    if init not in _INITIALISATIONS:
        raise ValueError(
            f"{source}: init_lora_weights={init!r} changes the base model, so that the one on disk would "
            f"not fit the adapter; use one of {', '.join(map(repr, _INITIALISATIONS))}"
        )
    for name in ("target_parameters", "layer_replication"):
        if getattr(config, name, None):
            raise ValueError(f"{source}: {name} is not supported; use target_modules")


def check_mergeable(config: Any, source: str) -> None:
    """ValueError for what `load_adapter` can open but `load_policy`, which merges, cannot."""
    if getattr(config, "lora_bias", False):
        raise ValueError(f"{source}: lora_bias=True cannot be merged, since LLaDA's layers have no bias")


def check_tied(config: Any, source: str, model_config: Any) -> None:
    """ValueError for an adapter on an embedding that is the head too.

    In training it moves the one and not the other (or, by PEFT's tied tokens, a head the fused loss does not
    know); merged into the one matrix it would move both.
    """
    if not model_config.tie_word_embeddings:
        return
    kind = getattr(config.peft_type, "value", config.peft_type)
    targets = select(config, model_config.num_hidden_layers, ["here", "original"]).targets
    has_tokens = kind == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None)
    if EMBEDDING in targets or has_tokens:
        raise ValueError(
            f"{source}: an adapter on the embedding ({EMBEDDING.here.rpartition('.')[2]}) cannot be merged, "
            "since this model's head is its embedding (weight_tying); leave the embedding out, or train it "
            "whole with modules_to_save, which gives the head a weight of its own"
        )


@dataclass(frozen=True)
class Selection:
    """What a config selects. targets, feedforward, to_save: layers. ranks, alphas: layer -> value.
    tokens: layer -> token ids."""

    targets: list[Layer] = field(default_factory=list)
    feedforward: list[Layer] = field(default_factory=list)
    to_save: list[Layer] = field(default_factory=list)
    ranks: dict[Layer, Any] = field(default_factory=dict)
    alphas: dict[Layer, Any] = field(default_factory=dict)
    tokens: dict[Layer, list[int]] | list[int] | None = None


def select(config: Any, num_blocks: int, names: Sequence[str]) -> Selection:
    """The layers that the config means.

    Args:
        names: which of a layer's names the config may use: "original", "here" or both.
    """
    everything = layers(num_blocks)

    def where(test: Callable[[str], Any]) -> list[Layer]:
        return [layer for layer in everything if any(test(getattr(layer, name)) for name in names)]

    def values(patterns: dict[str, Any] | None, targets: list[Layer]) -> dict[Layer, Any]:
        found: dict[Layer, Any] = {}
        for layer in targets:
            for pattern, value in (patterns or {}).items():
                if any(re.match(rf"(.*\.)?({pattern})$", getattr(layer, name)) for name in names):
                    found.setdefault(layer, value)
        return found

    targets = _targets(config, where)
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict):
        tokens = {
            layer: ids for name, ids in tokens.items() for layer in where(lambda n, t=name: n.endswith(t))
        }
    feedforward = getattr(config, "feedforward_modules", None) or []
    to_save = getattr(config, "modules_to_save", None) or []
    return Selection(
        targets=targets,
        feedforward=[layer for layer in where(lambda name: _in_list(feedforward, name)) if layer in targets],
        to_save=where(lambda name: any(name.endswith(end) for end in to_save)),
        ranks=values(getattr(config, "rank_pattern", None), targets),
        alphas=values(getattr(config, "alpha_pattern", None), targets),
        tokens=tokens,
    )


def _targets(config: Any, where: Callable[[Callable[[str], Any]], list[Layer]]) -> list[Layer]:
    from peft.tuners.tuners_utils import check_target_module_exists

    target = getattr(config, "target_modules", None)
    if not target:
        return []
    if isinstance(target, str) and target.lower() == ALL_LINEAR:
        config = copy.copy(config)
        config.target_modules = r"(model\.transformer\.blocks|model\.layers)\..*_(proj|out)"
    return [layer for layer in where(lambda n: bool(check_target_module_exists(config, n)))]


def _in_list(wanted: str | Sequence[str], name: str) -> bool:
    if isinstance(wanted, str):
        return bool(re.fullmatch(wanted, name))
    return any(name == one or name.endswith(f".{one}") for one in wanted)


def spell(config: Any, selection: Selection, num_blocks: int, *, original: bool) -> Any:
    """A copy of the config that selects these layers.

    Args:
        original: also under their original names, so that both classes find them; else under the names here.
    """

    def names(chosen: Sequence[Layer], *, whole: bool = False) -> list[str]:
        return list(
            dict.fromkeys(n for pair in _pairs(chosen, num_blocks, whole) for n in _names(pair, original))
        )

    spelled = copy.deepcopy(config)
    if getattr(config, "target_modules", None):
        spelled.target_modules = names(selection.targets)
        if hasattr(config, "exclude_modules"):
            # The short name ff_out would take the head with it.
            exclude_head = original and "ff_out" in spelled.target_modules and HEAD not in selection.targets
            spelled.exclude_modules = [HEAD.original, HEAD.here] if exclude_head else None
    for name in ("layers_to_transform", "layers_pattern"):
        if hasattr(config, name):
            setattr(spelled, name, None)
    for name, chosen in zip(_PATTERNS, (selection.ranks, selection.alphas), strict=True):
        if getattr(config, name, None):
            setattr(spelled, name, _spell_values(chosen, num_blocks, original))
    if getattr(config, "feedforward_modules", None):
        spelled.feedforward_modules = names(selection.feedforward)
    if getattr(config, "modules_to_save", None):
        # PEFT compares ends of names here: only whole ones mean one layer.
        spelled.modules_to_save = names(selection.to_save, whole=True)
    if isinstance(selection.tokens, dict):
        spelled.trainable_token_indices = _spell_tokens(selection.tokens, original)
    return spelled


def _names(pair: tuple[str, str], original: bool) -> tuple[str, ...]:
    return pair if original else pair[1:]


def _pairs(chosen: Sequence[Layer], num_blocks: int, whole: bool = False) -> list[tuple[str, str]]:
    """(original, here) of each layer; one short pair for a layer that is chosen in every block."""
    pairs = []
    for layer in chosen:
        pair = (layer.original, layer.here)
        if ".blocks." in layer.original and not whole:
            short = _short(pair)
            if sum(_short((other.original, other.here)) == short for other in chosen) == num_blocks:
                pair = short
        pairs.append(pair)
    return list(dict.fromkeys(pairs))


def _short(pair: tuple[str, str]) -> tuple[str, str]:
    if ".blocks." not in pair[0]:
        return pair
    return pair[0].rpartition(".")[2], pair[1].rpartition(".")[2]


def _spell_values(chosen: dict[Layer, Any], num_blocks: int, original: bool) -> dict[str, Any]:
    # Keys are regular expressions of ends of names, and the first that fits counts. One key for both
    # spellings, because PEFT warns of keys that fit nothing.
    spelled: dict[str, Any] = {}
    for value in dict.fromkeys(chosen.values()):
        alike = [layer for layer, other in chosen.items() if other == value]
        for pair in _pairs(alike, num_blocks):
            spelled["|".join(dict.fromkeys(map(re.escape, _names(pair, original))))] = value
    return spelled


def _spell_tokens(tokens: dict[Layer, list[int]], original: bool) -> dict[str, list[int]] | list[int]:
    if set(tokens) == {EMBEDDING}:
        return tokens[EMBEDDING]  # a list means the input embedding, whatever it is called
    if original:
        raise ValueError(
            "trainable_token_indices of other layers than the embedding cannot be saved under LLaDA's names"
        )
    return {layer.here: ids for layer, ids in tokens.items()}


def resolve_new(config: Any, num_blocks: int) -> Any:
    """A copy of a new adapter's config, in the names here; it may use those or LLaDA's, or both.

    Errors: ValueError for a name or pattern that fits no layer, and for an adapter on the head.
    """
    names = ["here", "original"]
    selection = select(config, num_blocks, names)
    everything = [name for layer in layers(num_blocks) for name in (layer.here, layer.original)]

    def check(what: str, given: Sequence[str], test: Callable[[str, str], Any]) -> None:
        unknown = [one for one in given if not any(test(one, name) for name in everything)]
        if unknown:
            raise ValueError(
                f"{what} {', '.join(map(repr, unknown))} fits no layer; there are {_known_names()}"
            )

    target = getattr(config, "target_modules", None)
    if isinstance(target, str) and not selection.targets:
        raise ValueError(f"target_modules {target!r} fits no layer; there are {_known_names()}")
    if target and not isinstance(target, str):
        check("target_modules", sorted(target), lambda one, name: _in_list([one], name))
        if not selection.targets:
            raise ValueError(
                "target_modules, layers_to_transform and exclude_modules leave no layer to adapt"
            )
    check(
        "modules_to_save",
        getattr(config, "modules_to_save", None) or [],
        lambda end, name: name.endswith(end),
    )
    for field_name in _PATTERNS:
        patterns = getattr(config, field_name, None) or {}
        check(field_name, list(patterns), lambda one, name: re.match(rf"(.*\.)?({one})$", name))
    tokens = getattr(config, "trainable_token_indices", None)
    if isinstance(tokens, dict):
        check("trainable_token_indices", list(tokens), lambda end, name: name.endswith(end))
    if HEAD in selection.targets:
        raise ValueError(
            "target_modules selects the head (lm_head, in LLaDA's names model.transformer.ff_out), and an "
            "adapter on it would be bypassed by the fused loss: name down_proj for the ff_out of the blocks, "
            "or train the head whole with modules_to_save=['lm_head']"
        )
    if selection == select(config, num_blocks, ["here"]):
        return copy.deepcopy(config)
    return spell(config, selection, num_blocks, original=False)


def _known_names() -> str:
    short = [_short((layer.original, layer.here)) for layer in layers(1)]
    return ", ".join(here if here == original else f"{here} ({original})" for original, here in short)
