"""Bidirectional attention inside the segments of a pack, on a CPU without a call per segment."""

from vrpo_kernels.segment_attention.op import reasons_against, segment_attention

__all__ = ["reasons_against", "segment_attention"]
