"""Per-row negative log-likelihood under a linear head, without storing the logits."""

from vrpo_kernels.linear_cross_entropy.api import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
)
from vrpo_kernels.linear_cross_entropy.metrics import RowMetrics
from vrpo_kernels.linear_cross_entropy.plan import Plan, plan_linear_cross_entropy
from vrpo_kernels.linear_cross_entropy.vocab_parallel import vocab_parallel_linear_cross_entropy

__all__ = [
    "Plan",
    "RowMetrics",
    "linear_cross_entropy",
    "linear_cross_entropy_replay",
    "linear_cross_entropy_statistics",
    "plan_linear_cross_entropy",
    "vocab_parallel_linear_cross_entropy",
]
