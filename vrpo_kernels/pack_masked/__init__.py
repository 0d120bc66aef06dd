"""Corrupted copies of responses in one varlen pack, and sums of row weights per token."""

from vrpo_kernels.pack_masked.op import PackedTokens, pack_masked, token_weight_sums

__all__ = ["PackedTokens", "pack_masked", "token_weight_sums"]
