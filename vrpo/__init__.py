"""Preference training of masked-diffusion language models with variance-reduced ELBO estimates (VRPO)."""

from vrpo.config import DiffusionSFTConfig, VRPOConfig
from vrpo.trainer import DiffusionSFTTrainer, VRPOTrainer

__all__ = ["DiffusionSFTConfig", "DiffusionSFTTrainer", "VRPOConfig", "VRPOTrainer"]
