"""Fused ELBO operations for masked-diffusion language models."""

from vrpo_kernels.backend import choose, describe
from vrpo_kernels.linear_cross_entropy import (
    Plan,
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    plan_linear_cross_entropy,
)
from vrpo_kernels.philox import philox4x32

__all__ = [
    "Plan",
    "choose",
    "describe",
    "linear_cross_entropy",
    "linear_cross_entropy_replay",
    "linear_cross_entropy_statistics",
    "philox4x32",
    "plan_linear_cross_entropy",
]
