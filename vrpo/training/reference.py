"""The frozen reference of preference training: which model it is, checked, on its device or sharded."""

import copy

from accelerate.utils import fsdp2_prepare_model
from torch import nn
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from vrpo.models.adapters import is_peft_model
from vrpo.training.trainer import DiffusionTrainer, switch_dropout_off


def build_reference(trainer: DiffusionTrainer, ref_model: PreTrainedModel | None) -> nn.Module | None:
    """The frozen reference, or None when the policy with its adapter switched off is one.

    Errors: ValueError for an adapter that is trained already, a ref_model of another precision, and engines
        that cannot hold a second model.
    """
    if ref_model is None:
        if is_peft_model(trainer.model):
            return _check_adapter_is_new(trainer.model)
        ref_model = copy.deepcopy(trainer.model)
    else:
        _check_same_precision(trainer.model, ref_model)
    ref_model.requires_grad_(False)
    ref_model.eval()
    if trainer.args.disable_dropout:
        switch_dropout_off(ref_model)
    if trainer.is_deepspeed_enabled and is_deepspeed_zero3_enabled():
        raise ValueError(
            "a second model as reference is not supported under DeepSpeed ZeRO-3: use peft_config (the "
            "reference is then the model with its adapter switched off), ZeRO-2, or FSDP"
        )
    if trainer.is_fsdp_enabled:
        if not trainer.accelerator.is_fsdp2:
            raise ValueError(
                "a second model as reference is not supported under FSDP1: set version 2 in fsdp_config, "
                "or use peft_config (the reference is then the model with its adapter switched off)"
            )
        # accelerator.prepare_model would leave it whole, and accelerator.prepare wants an optimizer.
        return fsdp2_prepare_model(trainer.accelerator, ref_model)
    return ref_model.to(trainer.args.device)


def _check_same_precision(model: nn.Module, ref_model: nn.Module) -> None:
    policy, reference = ({p.dtype for p in m.parameters()} for m in (model, ref_model))
    if policy != reference:
        raise ValueError(
            f"ref_model has parameters in {reference}, the policy in {policy}: with different "
            "precisions the score is not 0 at the start. Load both in one dtype."
        )


def _check_adapter_is_new(model: nn.Module) -> None:
    # Switching the adapter off gives the base model; that is the start of training only if B = 0.
    for name, parameter in model.named_parameters():
        if "lora_B" in name and parameter.detach().count_nonzero():
            raise ValueError(
                f"model starts from a trained adapter ({name} is not zero), so switching it off would "
                "not give the model that training starts from. Merge it first "
                "(model.merge_and_unload()) or pass ref_model."
            )
