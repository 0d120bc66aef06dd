"""PEFT adapters on our models: putting one on, loading and saving it under LLaDA's names, telling a new one.

A saved adapter names layers as LLaDA's own class does, in its weights and in adapter_config.json, so it does
the same there as here; adapters that the original class wrote load here. To get one model without an adapter,
merge: `load_adapter(base, folder).merge_and_unload().save_pretrained(out)`, or
`checkpoint.load_policy(folder).save_pretrained(out)`, which also finds the base.
"""

import contextlib
import copy
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import is_peft_available

from vrpo.models import adapter_config
from vrpo.models.adapter_config import CONFIG_FILE, WEIGHTS_FILE, adapter_folder, require_peft
from vrpo.models.names import EMBEDDING, HEAD, is_original, to_here, to_original

_PICKLED_WEIGHTS_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."


def is_peft_model(model: nn.Module) -> bool:
    """Whether the model is wrapped by PEFT; False where the package is not installed."""
    if not is_peft_available():
        return False
    from peft import PeftModel

    return isinstance(model, PeftModel)


def add_adapter(model: nn.Module, peft_config: Any, *, seed: int) -> nn.Module:
    """The model wrapped with a new adapter, whose first weights are a pure function of `seed`.

    Layers may be called by LLaDA's names (ff_proj) or by those here (gate_proj). The global random state is
    left as it was, and the config is not changed.

    Errors: ValueError without peft, if the model has an adapter already, for a name that is no layer, an
        adapter on the head (the fused loss would bypass it), or a kind that cannot be merged.
    """
    require_peft("peft_config")
    from peft import get_peft_model

    if is_peft_model(model):
        raise ValueError("peft_config was given, but model is a PeftModel already: pass one of them")
    adapter_config.check_kind(peft_config, "peft_config")
    adapter_config.check_mergeable(peft_config, "peft_config")
    adapter_config.check_tied(peft_config, "peft_config", model.config)
    config = adapter_config.resolve_new(peft_config, model.config.num_hidden_layers)
    with _drawn_from(seed, model):
        return get_peft_model(model, config)


@contextlib.contextmanager
def _drawn_from(seed: int, model: nn.Module) -> Iterator[None]:
    """PEFT draws from the global generators, and only inside this block they start from `seed`."""
    devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=sorted(devices)):
        torch.manual_seed(seed)  # noqa: TID251 -- put back at the end of the block
        yield


@dataclass(frozen=True)
class SavedAdapter:
    """An adapter as it lies on disk: its folder, its PeftConfig, and its weights under the file's names."""

    folder: Path
    config: Any
    weights: dict[str, Tensor]


def read_adapter(path_or_id: str | os.PathLike, revision: str | None = None) -> SavedAdapter:
    """Config and weights of a folder or hub id.

    Errors: ValueError without peft, and naming the file that is missing, broken, or of an unsupported kind.
    """
    require_peft(f"{path_or_id} holds an adapter, which")
    folder = adapter_folder(path_or_id, revision)
    if folder is None:
        raise ValueError(f"{path_or_id} has no {CONFIG_FILE}")
    return SavedAdapter(folder, adapter_config.read_config(folder / CONFIG_FILE), read_weights(folder))


def load_adapter(
    model: nn.Module, adapter: str | os.PathLike | SavedAdapter, *, is_trainable: bool = False
) -> nn.Module:
    """The base model wrapped with a saved adapter, every weight accounted for.

    An embedding that was resized before the adapter was trained is resized here too; its rows are in
    the adapter's file. Random states are left as they were.

    Args:
        model: the base, a LLaDAForMaskedDiffusion; it is changed in place.
        adapter: folder or hub id with adapter_config.json and adapter_model.safetensors, whose layers have
            LLaDA's names or those here (as older versions of this package wrote); or of `read_adapter`.
        is_trainable: whether training goes on with it.
    Errors: ValueError naming file and weights: one that fits nothing, a layer without weights, wrong shapes;
        those of `read_adapter`.
    """
    from peft import PeftModel

    saved = adapter if isinstance(adapter, SavedAdapter) else read_adapter(adapter)
    config, num_blocks = copy.deepcopy(saved.config), model.config.num_hidden_layers
    if any(is_original(name.removeprefix(_PREFIX)) for name in saved.weights):
        selection = adapter_config.select(config, num_blocks, ["original"])
        config = adapter_config.spell(config, selection, num_blocks, original=False)
    config.inference_mode = not is_trainable
    _resize_embedding(model, saved)
    with _drawn_from(0, model):
        try:
            wrapped = PeftModel(model, config)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{saved.folder / CONFIG_FILE} does not fit the model: {error}") from error
    _fill(wrapped, saved.weights, "default", saved.folder)
    return wrapped if is_trainable else wrapped.eval()


def load_adapter_weights(model: nn.Module, folder: str | os.PathLike, adapter_name: str = "default") -> None:
    """Fills an adapter that the model has already from a folder, for example a checkpoint's.

    Errors: as `load_adapter`.
    """
    _fill(model, read_weights(Path(folder)), adapter_name, Path(folder))


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of adapter_model.safetensors (or .bin, weights only) on the CPU, under the file's names.

    Errors: ValueError naming the file if it is missing, broken or empty.
    """
    from peft import load_peft_weights

    file = folder / WEIGHTS_FILE
    if not file.is_file():
        file = folder / _PICKLED_WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(
            f"{folder} has {CONFIG_FILE} but no {WEIGHTS_FILE}: the adapter's weights are missing"
        )
    try:
        weights = load_peft_weights(str(folder), device="cpu")
    except Exception as error:  # safetensors, pickle and zip each have their own
        raise ValueError(
            f"{file} cannot be read, it may be cut off: {' '.join(str(error).split())}"
        ) from error
    if not weights:
        raise ValueError(f"{file} holds no weights")
    return weights


def _canonical(name: str, adapter_name: str) -> str:
    """A weight's name here without what PEFT's versions write differently: prefix, adapter, wrappers."""
    parts = to_here(name.removeprefix(_PREFIX)).split(".")
    parts = [part for part in parts if part not in ("default", adapter_name, "modules_to_save")]
    if parts[-2:] == ["lora_magnitude_vector", "weight"]:
        parts.pop()
    return ".".join(parts)


def _fill(model: nn.Module, weights: dict[str, Tensor], adapter_name: str, folder: Path) -> None:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    expected = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    by_name = {_canonical(name, adapter_name): name for name in expected}
    found: dict[str, Tensor] = {}
    unknown, misshapen = [], []
    for name, tensor in weights.items():
        canonical = _canonical(name, adapter_name)
        target = by_name.get(canonical)
        if target is None:
            if not _fill_embedding(model, canonical, tensor):
                unknown.append(name)
        elif tensor.shape != expected[target].shape:
            misshapen.append(f"{name} {tuple(tensor.shape)} instead of {tuple(expected[target].shape)}")
        else:
            found[target] = tensor
    missing = [to_original(by) for by, name in by_name.items() if name not in found]
    if misshapen:
        missing = []  # they are the same ones
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:4])}" + (", ..." if len(names) > 4 else "")
        for what, names in (
            ("weights fit no layer that its config selects", unknown),
            ("weights are missing", missing),
            ("weights have a wrong shape", misshapen),
        )
        if names
    ]
    if problems:
        raise ValueError(
            f"the adapter in {folder} does not fit the model and its config; " + "; ".join(problems)
        )
    result = set_peft_model_state_dict(model, found, adapter_name=adapter_name)
    assert not result.unexpected_keys, result.unexpected_keys


def _fill_embedding(model: nn.Module, canonical: str, tensor: Tensor) -> bool:
    """Base weights of embedding and head, which PEFT saves with the adapter if their size has changed."""
    name = canonical.replace(".base_layer.", ".")
    for layer in (EMBEDDING, HEAD):
        if name == f"{layer.here}.weight":
            weight = unwrapped(model.get_base_model(), layer.here).weight
            if weight.shape != tensor.shape:
                return False
            with torch.no_grad():
                weight.copy_(tensor)
            return True
    return False


def _resize_embedding(model: nn.Module, saved: SavedAdapter) -> None:
    given = {
        _canonical(name, "default").replace(".base_layer.", "."): tensor.shape[:1]
        for name, tensor in saved.weights.items()
    }
    rows = {layer.here: given.get(f"{layer.here}.weight") for layer in (EMBEDDING, HEAD)}
    if rows[EMBEDDING.here] in (None, (model.config.vocab_size,)):
        return
    if not model.config.tie_word_embeddings and rows[HEAD.here] != rows[EMBEDDING.here]:
        raise ValueError(f"{saved.folder} has a resized embedding but not the head of the same size")
    with _drawn_from(0, model):
        model.resize_token_embeddings(*rows[EMBEDDING.here], mean_resizing=False)


def unwrapped(base: nn.Module, name: str) -> nn.Module:
    """The base model's own layer under PEFT's wrappers."""
    module = base.get_submodule(name)
    while True:
        inner = getattr(module, "original_module", None) or getattr(module, "base_layer", None)
        if inner is None:
            return module
        module = inner


def rename_saved_adapters(model: nn.Module, folder: str | os.PathLike) -> None:
    """Give the files that PEFT's save_pretrained wrote LLaDA's names.

    `default` lies in the folder itself, other adapters in subfolders. Both names are understood, so an
    interruption between two files leaves an adapter that loads.
    """
    from safetensors.torch import load_file, save_file

    num_blocks = model.config.num_hidden_layers
    for adapter_name, config in model.peft_config.items():
        place = Path(folder) / ("" if adapter_name == "default" else adapter_name)
        weights = {
            _PREFIX + to_original(name.removeprefix(_PREFIX)) if name.startswith(_PREFIX) else name: tensor
            for name, tensor in load_file(place / WEIGHTS_FILE).items()
        }
        aside = place / f"{WEIGHTS_FILE}.tmp"
        save_file(weights, aside, metadata={"format": "pt"})
        aside.replace(place / WEIGHTS_FILE)
        selection = adapter_config.select(config, num_blocks, ["here"])
        spelled = adapter_config.spell(config, selection, num_blocks, original=True)
        spelled.inference_mode = True
        # AutoPeftModelForCausalLM finds the class of the base by it.
        spelled.task_type = spelled.task_type or "CAUSAL_LM"
        spelled.auto_mapping = None
        spelled.save_pretrained(str(place))


def equals_its_base(model: nn.Module) -> bool:
    """Whether the model computes the same with its adapters on and off, bit for bit.

    Asked of outputs and not of weights, because each kind of adapter has its own neutral value: zero for
    LoRA's B, one for IA3, the base's own rows for modules_to_save and trainable tokens. The whole model
    answers for a few tokens, the embedding for all of them. Compiled layers answer uncompiled: a compiler
    fuses a layer with its adapter and without it differently, and so rounds differently.
    """
    vocab_size = model.config.vocab_size
    tokens = torch.linspace(0, vocab_size - 1, 16).long().unique()[None]
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()

    def ask() -> Iterator[Tensor]:
        yield model(input_ids=tokens.to(device)).logits
        if type(model.get_input_embeddings()) is not nn.Embedding:
            for ids in torch.arange(vocab_size, device=device).split(4096):
                yield model.get_input_embeddings()(ids)

    def ask_base() -> Iterator[Tensor]:
        answers = ask()
        while True:
            with model.disable_adapter():
                answer = next(answers, None)
            if answer is None:
                return
            yield answer

    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            pairs = zip(ask(), ask_base(), strict=True)
            return all(bool(((on == off) | (on.isnan() & off.isnan())).all()) for on, off in pairs)
    finally:
        model.train(was_training)
