"""One precision for all models of a step: the reference runs as accelerate makes the policy run.

accelerate puts autocast and fp32 outputs into `model.forward`. A score is exactly 0 at the start only if the
reference got the same, so it goes through the same function. What enters an adapter is left to autocast.
"""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

_HALF = (torch.bfloat16, torch.float16)


def prepare_reference(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The frozen model on the accelerator's device, with the autocast of the policy."""
    listed = list(accelerator._models)
    prepared = accelerator.prepare_model(release(model), evaluation_mode=True)
    # Trainer.evaluation_loop prepares the policy only while this list is empty.
    accelerator._models[:] = listed
    return prepared


def keep_output_dtype(accelerator: Accelerator) -> None:
    """FSDP2 casts what a model returns to the dtype it computes in; NLLs are fp32 and stay so."""
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and accelerator.is_fsdp2 and plugin.mixed_precision_policy is not None:
        plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)


def release(model: nn.Module) -> nn.Module:
    """The model without what an earlier trainer's accelerator left on it.

    Its forward would autocast as that trainer did, and `accelerator.prepare` would return it as it is:
    without the precision of this trainer and, after an evaluation, without DistributedDataParallel.
    """
    original = model.__dict__.pop("_original_forward", None)
    if original is not None:
        del model.forward
        if getattr(original, "__func__", None) is not type(model).forward:
            model.forward = original  # someone's own, of before accelerate's
    model.__dict__.pop("_is_accelerate_prepared", None)
    return model


def leave_adapter_inputs_to_autocast(model: nn.Module) -> None:
    """LoRA layers of a PeftModel no longer widen what enters them where autocast would round it back.

    PEFT casts each input to the float32 of the adapter's weights, and 16-bit autocast casts it back before
    the matmul: the same bits, for two more passes over every activation. Each call decides by the autocast it
    runs under, which gradient checkpointing restores when it computes a layer again; without autocast nothing
    changes, nor for a peft that knows no such switch, for layers that somebody switched off already, and for
    those whose numbers would be others: with dropout, several adapters at work at once, and variants such as
    DoRA.
    """
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if not isinstance(layer, Linear) or not getattr(layer, "cast_input_dtype_enabled", False):
            continue
        if _cast_unless_autocast_does not in layer._forward_pre_hooks.values():
            layer.register_forward_pre_hook(_cast_unless_autocast_does)


def _cast_unless_autocast_does(layer: nn.Module, args: tuple[Any, ...]) -> None:
    cast = not (bool(args) and _autocast_decides(args[0]) and _is_plain(layer))
    if layer.cast_input_dtype_enabled is not cast:
        layer.cast_input_dtype_enabled = cast


def _autocast_decides(x: Tensor) -> bool:
    """Whether 16-bit autocast is on and casts tensors such as this one (float64 it leaves alone)."""
    kind = x.device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return is_on and torch.get_autocast_dtype(kind) in _HALF and x.dtype in (*_HALF, torch.float32)


def _is_plain(layer: nn.Module) -> bool:
    """Whether all that happens to an input is one float32 matmul.

    The gradients of several adapters' matmuls are added in float32 where they share a widened input.
    """
    drops = any(dropout.training and getattr(dropout, "p", 0) for dropout in layer.lora_dropout.values())
    is_wide = all(weight.dtype is torch.float32 for weight in layer.lora_A.parameters())
    is_one = sum(name in layer.lora_A for name in layer.active_adapters) <= 1
    return is_wide and is_one and not drops and not getattr(layer, "lora_variant", None)
