"""One precision for all models of a step: the reference runs as accelerate makes the policy run.

accelerate puts autocast and fp32 outputs into `model.forward`, and compiles it where asked. A score is
exactly 0 at the start only if the reference got the same, so it goes through the same function.
"""

from dataclasses import replace

from accelerate import Accelerator
from torch import nn


def prepare_reference(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The frozen model on the accelerator's device, with the autocast and the compilation of the policy."""
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
