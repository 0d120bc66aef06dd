"""Lay out all masked copies of a batch as one variable-length sequence."""

from vrpo.batch import MaskDraw, PackedBatch, ResponseBatch
from vrpo_kernels import pack_masked


def pack(batch: ResponseBatch, draw: MaskDraw, mask_token_id: int) -> PackedBatch:
    """Corrupt and pack: K copies of every sequence, the drawn response tokens replaced by the mask token.

    The prompt is never masked. Rows are known by position, so a mask token that stands in the text itself
    is neither scored nor lost.

    Args: batch and the draw made for it; mask_token_id >= 0.
    Returns: a PackedBatch on the device of the batch.
    """
    tokens_T, position_T, cu_seqlens_S1, row_N, target_N = pack_masked(
        batch.tokens_U,
        batch.prompt_length_R,
        batch.response_length_R,
        draw.position_N,
        draw.offsets_S1,
        num_samples=draw.num_samples,
        mask_token_id=mask_token_id,
    )
    return PackedBatch(
        tokens_T=tokens_T,
        position_T=position_T,
        cu_seqlens_S1=cu_seqlens_S1,
        max_seqlen=int(batch.length_R.max()),
        row_N=row_N,
        target_N=target_N,
        weight_N=draw.weight_N,
        offsets_S1=draw.offsets_S1,
        num_samples=draw.num_samples,
        replicate_K=draw.replicate_K,
    )
