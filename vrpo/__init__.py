"""Preference training of masked-diffusion language models with variance-reduced ELBO estimates (VRPO)."""

from vrpo.training.config import DiffusionSFTConfig, VRPOConfig
from vrpo.training.trainer import DiffusionSFTTrainer, VRPOTrainer

__all__ = ["DiffusionSFTConfig", "DiffusionSFTTrainer", "VRPOConfig", "VRPOTrainer"]
