"""RMSNorm as LLaDA rounds it, in one pass on a CPU."""

from vrpo_kernels.rms_norm.op import rms_norm

__all__ = ["rms_norm"]
