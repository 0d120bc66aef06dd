"""LLaDA: the Monte-Carlo log-likelihood of an answer, without logits.

Replaces: the loop body of get_log_likelihood (get_log_likelihood.py of ML-GSAI/LLaDA, commit b7e6c35) and of
    get_loglikelihood (eval_llada.py): the model's call, the guidance and the weighted sum.
Faster: the head meets the masked tokens only, and once with guidance. No `.item()` per batch.
Memory: no (B, L, V) logits. The masks come from the caller, so a mask token in the text is no masked token.
CPU toy, forward: 3.6 times as fast, 6 instead of 113 MiB (results.csv).
"""

import torch
from torch import Tensor, nn

from vrpo_kernels import elbo_from_hidden, last_hidden


def log_likelihood(
    model: nn.Module,
    weight: Tensor,
    noised_ids: Tensor,
    clean_ids: Tensor,
    masked: Tensor,
    p_mask: Tensor,
    *,
    cfg_scale: float = 0.0,
    unguided_ids: Tensor | None = None,
) -> Tensor:
    """Mean over the batch's samples of sum_masked log p / p_mask: an estimate in nats, 0-dim.

    Args:
        model, weight: the model, wrapped or not, and the weight of its head, (V, D).
        noised_ids, clean_ids, masked: (B, L), B samples of one sequence; where each is masked.
        p_mask: (B,), share of the answer that is masked.
        cfg_scale, unguided_ids: classifier-free guidance with these inputs, whose prompt is masked.
    """
    if cfg_scale > 0:
        guided, unguided = last_hidden(model, torch.cat([noised_ids, unguided_ids])).chunk(2)
        hidden = unguided + (cfg_scale + 1) * (guided - unguided)
    else:
        hidden = last_hidden(model, noised_ids)
    return elbo_from_hidden(hidden, weight, clean_ids, masked, 1 / p_mask).mean()
