"""Per-row cross-entropy for code that already has logits."""

from vrpo_kernels.cross_entropy.op import cross_entropy

__all__ = ["cross_entropy"]
