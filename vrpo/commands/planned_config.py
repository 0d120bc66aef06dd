"""The config of a training that will run elsewhere: read for `vrpo plan`, which launches nothing."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vrpo.training.config import DiffusionConfig, VRPOConfig

_ADAMW = ("adamw_torch", "adamw_torch_fused")
_NOT_MODELLED = ("torch_compile", "activation_offloading")


@dataclass
class PlannedConfig(VRPOConfig):
    """VRPOConfig, but for what asks for GPUs or a launcher: that is remembered and not obeyed.

    engine: "fsdp2", "zero2" or "zero3" where fsdp or deepspeed ask for it; None otherwise.
    is_narrow: whether matmuls are in 16 bits; None where that is left to the GPU.
    checkpoints: whether fsdp_config asks for activation checkpointing.
    not_modelled: what the file asks for and the cost model does not know.
    Errors: ValueError for engines that it does not know either, and whatever VRPOConfig refuses.
    """

    def __post_init__(self):
        self.engine = _engine(self)
        self.is_narrow = True if self.bf16 or self.fp16 else self.bf16
        self.checkpoints = _checkpoints_by_fsdp(self.fsdp_config)
        self.not_modelled = _not_modelled(self)
        self.fsdp, self.fsdp_config, self.deepspeed = False, None, None
        self.use_cpu, self.bf16, self.fp16, self.tf32, self.torch_compile = True, False, False, None, False
        self.activation_offloading = False
        super().__post_init__()


def checkpoints(config: DiffusionConfig) -> bool:
    """Whether a training keeps the activations of one layer at a time."""
    # The name changed in transformers 5.23.
    if any(getattr(config, f"{what}_checkpointing", False) for what in ("activation", "gradient")):
        return True
    return getattr(config, "checkpoints", False) or _checkpoints_by_fsdp(config.fsdp_config)


def _engine(config: VRPOConfig) -> str | None:
    is_fsdp = config.fsdp and str(config.fsdp).lower() != "false"
    if is_fsdp and config.deepspeed:
        raise ValueError("fsdp and deepspeed are two engines for one model: keep one of them")
    if is_fsdp:
        version = _fsdp(config.fsdp_config).get("version", 2)
        if str(version) != "2":
            raise ValueError(f"fsdp_config: version {version} is not modelled; set version 2")
        return "fsdp2"
    if not config.deepspeed:
        return None
    stage = _section(_read("deepspeed", config.deepspeed), "zero_optimization").get("stage", 0)
    if stage not in (2, 3):
        raise ValueError(f"deepspeed: ZeRO stage {stage!r} is not modelled, only 2 and 3")
    return f"zero{stage}"


def _checkpoints_by_fsdp(given: Any) -> bool:
    return _is_on(_fsdp(given).get("activation_checkpointing", False))


def _not_modelled(config: VRPOConfig) -> tuple[str, ...]:
    optim = getattr(config.optim, "value", config.optim)
    found = [] if optim in _ADAMW else [f"optim {optim} (AdamW with moments in the dtype of the weights is)"]
    found += [name for name in _NOT_MODELLED if getattr(config, name)]
    if config.precompute_ref_log_probs or config.precompute_only:
        found.append("the time of precomputing the reference")
    fsdp = _fsdp(config.fsdp_config)
    if _is_on(fsdp.get("cpu_offload", False)) or "offload" in str(config.fsdp):
        found.append("cpu_offload of fsdp_config")
    if not _is_on(fsdp.get("reshard_after_forward", True)):
        found.append("reshard_after_forward=false of fsdp_config")
    zero = _section(_read("deepspeed", config.deepspeed), "zero_optimization")
    for name in ("offload_optimizer", "offload_param"):
        if _section(zero, name).get("device", "none") != "none":
            found.append(f"{name} of deepspeed")
    return tuple(found)


def _is_on(value: Any) -> bool:
    return str(value).lower() not in ("false", "0", "none")


def _fsdp(given: Any) -> dict[str, Any]:
    """fsdp_config by the names without the prefix that transformers takes off too."""
    return {key.removeprefix("fsdp_"): value for key, value in _read("fsdp_config", given).items()}


def _read(name: str, given: Any) -> dict[str, Any]:
    """The mapping that an argument is: itself, as JSON, or in a file; empty where it is not given."""
    if given is None or isinstance(given, Mapping):
        return dict(given or {})
    try:
        text = given if given.lstrip().startswith("{") else Path(given).expanduser().read_text("utf-8")
        found = json.loads(text)
    except (OSError, ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{name}={given!r} is neither a mapping nor a JSON file: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{name}={given!r} must hold a JSON object")
    return found


def _section(settings: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = settings.get(name) or {}
    if not isinstance(found, Mapping):
        raise ValueError(f"deepspeed: {name} must be an object, got {found!r}")
    return found
