"""Rotary positions of queries and keys, multiplied and added in float32 and rounded once."""

from vrpo_kernels.rotary.op import rotary

__all__ = ["rotary"]
