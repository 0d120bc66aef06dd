"""Which positions of each segment are masked: integers in, integers out."""

from vrpo_kernels.mask_select.op import mask_select

__all__ = ["mask_select"]
