"""Models that only run beside DeepSpeed's policy: in an engine of the same stage and precision, no optimizer.

The engine casts weights and buffers as the policy's does, so that policy and reference round alike, and under
ZeRO-3 each process keeps its part of the weights and gathers a layer while it runs.
"""

import copy
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from vrpo.models.partitioned import is_partitioned

_OF_TRAINING = ("optimizer", "scheduler", "train_batch_size", "gradient_clipping")


def zero_stage(accelerator: Accelerator) -> int | None:
    """The stage of ZeRO that the policy is trained with; None without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return None
    return accelerator.state.deepspeed_plugin.zero_stage


def loads_universal(accelerator: Accelerator) -> bool:
    """Whether DeepSpeed is to load checkpoints in their universal form, for any number of processes."""
    if zero_stage(accelerator) is None:
        return False
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    return bool(config.get("checkpoint", {}).get("load_universal", False))


def running_engine(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """The model in an engine without an optimizer; under ZeRO-3 partitioned, else whole in each process.

    Weights and buffers are cast in place, to the dtype that the policy's engine casts to.
    """
    import deepspeed

    engine, *_ = deepspeed.initialize(model=model, config=running_config(accelerator))
    return engine


def leave_engine(engine: nn.Module) -> None:
    """Takes the model out of an engine, as another one may take it up: partitioned weights stay in parts."""
    engine.empty_partition_cache()
    engine.destroy()
    for name in ("module_forward_pre_hook", "module_forward_post_hook"):  # which destroy() leaves
        hook = getattr(engine, name, None)
        if hook is not None:
            hook.remove()


def running_config(accelerator: Accelerator) -> dict[str, Any]:
    """The configuration of the policy's engine without what trains; "auto" becomes DeepSpeed's default."""
    plugin = accelerator.state.deepspeed_plugin
    config = _without_auto(plugin.deepspeed_config)
    for name in _OF_TRAINING:
        config.pop(name, None)
    config |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    for name in ("bf16", "fp16"):
        config[name] = {**config.get(name, {}), "enabled": accelerator.mixed_precision == name}
    zero = config.setdefault("zero_optimization", {})
    zero.pop("offload_optimizer", None)
    if plugin.zero_stage != 3:
        config["zero_optimization"] = {"stage": 0}
    return config


def _without_auto(config: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in config.items() if value != "auto"}
    return {
        name: _without_auto(value) if isinstance(value, dict) else copy.deepcopy(value)
        for name, value in kept.items()
    }


def frozen_engine_copy(accelerator: Accelerator, model: nn.Module) -> nn.Module:
    """A deep copy of a model whose weights may be in parts; those of the copy are too, and do not train.

    A collective. No process holds more than one module's whole weights at a time.
    """
    memo: dict[int, Any] = {}
    for module in model.modules():
        parameters = [p for p in module.parameters(recurse=False) if is_partitioned(p) and id(p) not in memo]
        if parameters:
            copies = _copies_in_parts(parameters, running_config(accelerator))
            memo |= {id(p): new for p, new in zip(parameters, copies, strict=True)}
    return copy.deepcopy(model, memo).requires_grad_(False)


def _copies_in_parts(parameters: list[nn.Parameter], config: dict[str, Any]) -> list[nn.Parameter]:
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        copies = [nn.Parameter(p.detach().clone(), requires_grad=False) for p in parameters]
    deepspeed.zero.Init(module=nn.ParameterList(copies), config_dict_or_path=config)
    return copies
