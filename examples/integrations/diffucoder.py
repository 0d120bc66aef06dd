"""DiffuCoder: log-probabilities of coupled GRPO from two complementary masks, without logits.

Replaces: selective_log_softmax, get_logits and their use in _get_per_token_logps (src/open_r1/coupled_grpo.py
    of apple/ml-diffucoder, commit f735e01).
Faster: a token needs a row of the fully masked copy and one of the copy that masks it: 2 rows of the
    completion instead of 3 of the whole sequence; no loop over the sequences.
Memory: no (3B, L, V) logits, nor their gradient. The row of the position before (Dream's shift) is read where
    it lies.
CPU toy, forward + backward: 3.4 times as fast, 137 instead of 397 MiB (results.csv).
"""

import torch
from torch import Tensor, nn

from vrpo_kernels import last_hidden, token_logps


def coupled_logps(
    model: nn.Module,
    weight: Tensor,
    clean_ids: Tensor,
    is_completion: Tensor,
    masked: Tensor,
    mask_ratio: float,
    mask_id: int,
    *,
    shift: bool = True,
) -> Tensor:
    """(B, L) fp32, 0 outside the completion: (log p_all + w log p_own) / 2 for every completion token.

    p_all sees the whole completion masked; p_own sees the half masked that the token belongs to, with
    w = 1 / mask_ratio in the first half and 1 / (1 - mask_ratio) in its complement.

    Args:
        model, weight: the model, wrapped or not, and the weight of its head, (V, D).
        clean_ids: (B, L). is_completion, masked: (B, L) bool; masked is the first half of the completion.
        mask_ratio: probability with which a token is in the first half. mask_id: the mask token.
    """
    halves = torch.stack([is_completion, masked, is_completion & ~masked])
    noised_ids = torch.where(halves, mask_id, clean_ids)
    hidden = last_hidden(model, noised_ids.flatten(0, 1))
    tokens = clean_ids.expand_as(noised_ids).flatten(0, 1)
    logps = token_logps(hidden, weight, tokens, halves.flatten(0, 1), shift=shift)
    whole, first, second = logps.view(noised_ids.shape)
    return (whole + first / mask_ratio + second / (1 - mask_ratio)) / 2
