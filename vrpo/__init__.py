"""Preference training of masked-diffusion language models with variance-reduced ELBO estimates (VRPO).

The public names are imported when they are first used: `import vrpo.step` or `import vrpo.models` needs
neither `datasets` nor the trainers.
"""

import importlib
from typing import Any

_HOMES = {
    "DiffusionKTOConfig": "vrpo.training.kto_config",
    "DiffusionKTOTrainer": "vrpo.training.kto_trainer",
    "DiffusionSFTConfig": "vrpo.training.config",
    "DiffusionSFTTrainer": "vrpo.training.sft_trainer",
    "VRPOConfig": "vrpo.training.config",
    "VRPOTrainer": "vrpo.training.vrpo_trainer",
}

__all__ = [
    "DiffusionKTOConfig",
    "DiffusionKTOTrainer",
    "DiffusionSFTConfig",
    "DiffusionSFTTrainer",
    "VRPOConfig",
    "VRPOTrainer",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
