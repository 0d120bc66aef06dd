"""Fused ELBO operations for masked-diffusion language models."""

from vrpo_kernels.backend import choose, describe
from vrpo_kernels.checks import set_debug
from vrpo_kernels.cross_entropy import cross_entropy
from vrpo_kernels.elbo import elbo_from_hidden, elbo_from_logits
from vrpo_kernels.last_hidden import last_hidden
from vrpo_kernels.linear_cross_entropy import (
    Plan,
    RowMetrics,
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    plan_linear_cross_entropy,
    vocab_parallel_linear_cross_entropy,
)
from vrpo_kernels.mask_select import mask_select
from vrpo_kernels.pack_masked import PackedTokens, pack_masked, token_weight_sums
from vrpo_kernels.philox import philox4x32
from vrpo_kernels.rms_norm import rms_norm
from vrpo_kernels.rotary import rotary
from vrpo_kernels.rows import gather_rows
from vrpo_kernels.segment_attention import segment_attention
from vrpo_kernels.segments import segment_sum
from vrpo_kernels.token_logps import token_logps

__all__ = [
    "PackedTokens",
    "Plan",
    "RowMetrics",
    "choose",
    "cross_entropy",
    "describe",
    "elbo_from_hidden",
    "elbo_from_logits",
    "gather_rows",
    "last_hidden",
    "linear_cross_entropy",
    "linear_cross_entropy_replay",
    "linear_cross_entropy_statistics",
    "mask_select",
    "pack_masked",
    "philox4x32",
    "plan_linear_cross_entropy",
    "rms_norm",
    "rotary",
    "segment_attention",
    "segment_sum",
    "set_debug",
    "token_logps",
    "token_weight_sums",
    "vocab_parallel_linear_cross_entropy",
]
