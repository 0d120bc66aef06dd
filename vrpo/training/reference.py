"""The frozen reference of preference training: which model it is, checked, on its device or sharded."""

import copy
from collections.abc import Iterable

import torch
from accelerate.utils import fsdp2_prepare_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from vrpo.models.adapters import equals_its_base, is_peft_model
from vrpo.models.files import first_few
from vrpo.models.partitioned import any_partitioned, local_part
from vrpo.training.compiled import compile_layers
from vrpo.training.precision import prepare_reference
from vrpo.training.trainer import DiffusionTrainer, switch_dropout_off
from vrpo.training.trunk import frozen_copy
from vrpo.training.zero import frozen_engine_copy, running_engine


def build_reference(trainer: DiffusionTrainer, ref_model: PreTrainedModel | None) -> nn.Module | None:
    """The frozen reference, or None when the policy with its adapter switched off is one.

    Errors: ValueError for an adapter that is trained already, a ref_model of another precision, and engines
        that cannot hold a second model.
    """
    check_reference(trainer, ref_model)
    if ref_model is None:
        if is_peft_model(trainer.model):
            return None
        ref_model = _copy_of_policy(trainer)
    ref_model.requires_grad_(False)
    ref_model.eval()
    if trainer.args.disable_dropout:
        switch_dropout_off(ref_model)
    compile_layers(ref_model, trainer.args)
    if trainer.is_deepspeed_enabled:
        return running_engine(trainer.accelerator, ref_model)
    if trainer.is_fsdp_enabled:
        if not trainer.accelerator.is_fsdp2:
            raise ValueError(
                "a second model as reference is not supported under FSDP1: set version 2 in fsdp_config, "
                "or use peft_config (the reference is then the model with its adapter switched off)"
            )
        # accelerator.prepare_model would leave it whole, and accelerator.prepare wants an optimizer.
        return fsdp2_prepare_model(trainer.accelerator, ref_model)
    return prepare_reference(trainer.accelerator, ref_model)


def _copy_of_policy(trainer: DiffusionTrainer) -> nn.Module:
    if trainer.is_deepspeed_enabled:
        return frozen_engine_copy(trainer.accelerator, trainer.model)
    # Shared parameters would be sharded twice.
    return (copy.deepcopy if trainer.is_fsdp_enabled else frozen_copy)(trainer.model)


def check_reference(trainer: DiffusionTrainer, ref_model: nn.Module | None) -> None:
    """ValueError for a reference that the policy does not start from, moves with, or rounds unlike."""
    if ref_model is not None:
        _check_apart(trainer.model, ref_model)
        _check_same_computation(trainer.model, ref_model)
    elif is_peft_model(trainer.model):
        _check_adapter_is_new(trainer)


def _check_apart(model: nn.Module, ref_model: nn.Module) -> None:
    """ValueError for a reference that training would move: it holds weights that the policy trains.

    So does the base that was given to PEFT's get_peft_model, which puts the adapter into it. By memory and
    not by object, because views and `load_state_dict(assign=True)` share the one and not the other.
    """
    trained = {_memory(p) for p in model.parameters() if p.requires_grad and local_part(p).numel()}
    shared = [
        name for name, p in ref_model.named_parameters() if local_part(p).numel() and _memory(p) in trained
    ]
    if shared:
        raise ValueError(
            f"ref_model shares weights with the model and would move with it: {first_few(shared)}. Pass None "
            "(a frozen copy; with PEFT the model with its adapter switched off) or a model loaded by itself."
        )


def _memory(tensor: Tensor) -> tuple[torch.device, int]:
    # "meta" tensors have no memory; the object stands for it.
    return tensor.device, id(tensor) if tensor.is_meta else local_part(tensor).data_ptr()


def _check_same_computation(model: nn.Module, ref_model: nn.Module) -> None:
    """ValueError where the two would round differently, or do not share a vocabulary."""
    policy, reference = _dtypes(model), _dtypes(ref_model)
    # Adapters keep their own dtype, and a reference of another size has other names.
    shared = policy.keys() & reference.keys()
    if {name: policy[name] for name in shared} != {name: reference[name] for name in shared}:
        raise ValueError(
            f"ref_model has parameters in {_spelled(reference, shared)}, the policy in "
            f"{_spelled(policy, shared)}: with different precisions the score is not 0 at the start. Load "
            "both in one dtype."
        )
    configs = model.config, ref_model.config
    attention, other = (config._attn_implementation for config in configs)
    if attention != other:
        raise ValueError(
            f"ref_model computes attention with {other!r}, the policy with {attention!r}: their roundings "
            "differ, so the score is not 0 at the start. Load both with one attn_implementation."
        )
    if configs[0].vocab_size != configs[1].vocab_size:
        raise ValueError(
            f"ref_model has a vocabulary of {configs[1].vocab_size}, the policy of {configs[0].vocab_size}: "
            "they must read the same token ids."
        )


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    """Parameters and buffers by the name they have without PEFT; RoPE's buffers round like weights."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer.", "."): tensor.dtype
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def _spelled(dtypes: dict[str, torch.dtype], names: Iterable[str]) -> str:
    return " and ".join(sorted({str(dtypes[name]) for name in names}))


def _check_adapter_is_new(trainer: DiffusionTrainer) -> None:
    # Switching the adapter off gives the base model; that is the start of training only if the two agree.
    if any_partitioned(trainer.model.parameters()):
        if trainer.adapter_is_new:
            return  # weights that are partitioned already cannot be asked
        raise ValueError("under DeepSpeed ZeRO-3 pass the base model and peft_config instead of a PeftModel")
    if not equals_its_base(trainer.model):
        raise ValueError(
            "model starts from a trained adapter: its output is not exactly the base's, so the base is not "
            "what training starts from. Merge it first (model.merge_and_unload(), with peft_config for a new "
            "adapter), or pass ref_model."
        )
