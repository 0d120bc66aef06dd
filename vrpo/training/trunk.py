"""The shared trunk: the lowest layers, where they are frozen, run once for policy and reference.

Below the first layer that trains, policy and reference compute the same activations. They are computed once,
without a graph, and handed to both. With the upper half of the layers trained, a step costs 2.5 forward
passes of the model instead of 4 (half a pass for the trunk, a half for the reference, 1.5 for the policy with
backward) and stores the activations of the upper half alone.
"""

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from vrpo.batch import PackedBatch
from vrpo.models.adapters import is_peft_model
from vrpo.models.partitioned import any_partitioned, local_part, same_everywhere, whole_shape

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def body_of(model: nn.Module) -> nn.Module:
    """Embedding, layers and last norm, under PEFT too."""
    return (model.get_base_model() if is_peft_model(model) else model).model


def train_top_layers(model: nn.Module, number: int) -> None:
    """Freezes the embedding and all but the top `number` layers; the last norm and the head stay trainable.

    A head that is tied to the embedding is frozen with it.
    """
    body = body_of(model)
    check_number(number, len(body.layers))
    for frozen in (body.embed_tokens, *body.layers[: len(body.layers) - number]):
        frozen.requires_grad_(False)


def adapter_on_top_layers(peft_config: Any, number: int, num_layers: int) -> Any:
    """A copy of a new adapter's config that adapts the top `number` layers only.

    Errors: ValueError if it selects layers by number already, or trains the embedding.
    """
    check_number(number, num_layers)
    if getattr(peft_config, "layers_to_transform", None) is not None:
        raise ValueError(
            "train_top_layers and layers_to_transform of peft_config both say which layers train: give one"
        )
    if not hasattr(peft_config, "layers_to_transform"):
        raise ValueError(f"train_top_layers cannot place a {type(peft_config).__name__}: use a LoraConfig")
    config = copy.deepcopy(peft_config)
    config.layers_to_transform = list(range(num_layers - number, num_layers))
    if config.target_modules == "all-linear":  # PEFT takes layer numbers with a list of names only
        config.target_modules = set(_LINEAR)
    if isinstance(config.target_modules, str):
        raise ValueError(
            f"train_top_layers needs target_modules as a list of names, got the pattern "
            f"{config.target_modules!r}: give layers_to_transform or a pattern with the layers instead"
        )
    return config


def check_number(number: int, num_layers: int) -> None:
    if not 1 <= number <= num_layers:
        raise ValueError(f"train_top_layers must be in [1, {num_layers}], the model's layers, got {number}")


def frozen_layers(model: nn.Module) -> tuple[int, str]:
    """(n, why no more): the lowest n layers, and what is below them, neither train nor carry an adapter."""
    body = body_of(model)
    if reason := _why_not_frozen(body.embed_tokens, "the embedding"):
        return 0, reason
    for index, layer in enumerate(body.layers[:-1]):
        if reason := _why_not_frozen(layer, f"layer {index}"):
            return index, reason
    return len(body.layers) - 1, "the last layer never belongs to it"


def _why_not_frozen(module: nn.Module, what: str) -> str:
    if any(parameter.requires_grad for parameter in module.parameters()):
        return f"{what} is trained"
    # A frozen adapter may still tell the policy from the model with its adapter off.
    if any(hasattr(part, "base_layer") or hasattr(part, "original_module") for part in module.modules()):
        return f"{what} has an adapter"
    return ""


def shared_layers(model: nn.Module, ref_model: nn.Module | None, wanted: bool | None) -> int:
    """How many of the lowest layers policy and reference share; 0 where nothing is to be shared.

    Args:
        ref_model: before anything is sharded. None: the model with its adapter off, or a copy of it.
        wanted: None: as far as possible; True: ValueError with the reason if there is nothing; False: 0.
    """
    if wanted is False:
        return 0
    number, reason = frozen_layers(model)
    if number and ref_model is not None:
        number, reason = _equal_layers(body_of(model), body_of(ref_model), number, reason)
    if wanted and not number:
        raise ValueError(
            f"share_trunk=True: policy and reference have no lowest layers in common: {reason}. Freeze the "
            "lower layers (train_top_layers, or layers_to_transform of a LoraConfig), or leave it out"
        )
    return number


def _equal_layers(body: nn.Module, other: nn.Module, number: int, reason: str) -> tuple[int, str]:
    if len(body.layers) != len(other.layers) or not _equal(body.embed_tokens, other.embed_tokens):
        return 0, "the reference is another model"
    for index in range(number):
        if not _equal(body.layers[index], other.layers[index]):
            return index, f"layer {index} of the reference has other weights"
    return number, reason


def _equal(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules hold the same tensors, bit for bit; a collective under ZeRO-3."""
    mine, theirs = one.state_dict(keep_vars=True), other.state_dict(keep_vars=True)
    if mine.keys() != theirs.keys():
        return False
    if any_partitioned(mine.values()) != any_partitioned(theirs.values()):
        return False
    equal = all(
        tensor.dtype == theirs[name].dtype
        and whole_shape(tensor) == whole_shape(theirs[name])
        and bool(torch.equal(local_part(tensor), local_part(theirs[name]).to(local_part(tensor).device)))
        for name, tensor in mine.items()
    )
    if not any_partitioned(mine.values()):
        return equal
    return same_everywhere(equal, next(iter(mine.values())).device)


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model that shares the parameters which do not train: they never move."""
    frozen = {id(p): p for p in model.parameters() if not p.requires_grad}
    return copy.deepcopy(model, frozen)


@torch.no_grad()
def with_trunk(model: nn.Module, pack: PackedBatch, trunk_layers: int) -> PackedBatch:
    """The pack with the activations after the model's lowest `trunk_layers` layers."""
    pack = replace(pack, trunk_layers=trunk_layers)
    output = model(**{**pack.model_inputs(), "rows": None, "targets": None})
    # In the dtype they had inside: what mixed precision widened on the way out is narrowed without loss.
    return replace(pack, trunk_TD=output.trunk_hidden[0].to(output.trunk_dtype))
