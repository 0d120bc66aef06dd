"""d1: per-token log-probabilities for diffu-GRPO, with classifier-free guidance, without logits.

Replaces: DiffuGRPOTrainer._get_per_token_logps and get_logits (diffu-grpo/diffu_grpo_trainer.py of
    dllm-reasoning/d1, commit 837888f); the same function of dllm (dllm/pipelines/rl/grpo/trainer.py).
Faster: the head meets the completion only and, with guidance, once instead of twice: it is linear, so the
    guided logits are the head of guided hidden states (a bias is kept, a soft-cap would not commute).
Memory: no (2B, L, V) logits, nor their gradient.
CPU toy, forward + backward: 4.2 times as fast, 80 instead of 268 MiB (results.csv).
"""

import torch
from torch import Tensor, nn

from vrpo_kernels import last_hidden, token_logps


def per_token_logps(
    model: nn.Module,
    weight: Tensor,
    noised_ids: Tensor,
    clean_ids: Tensor,
    logits_to_keep: int,
    *,
    cfg_scale: float = 0.0,
    mask_id: int | None = None,
) -> Tensor:
    """(B, logits_to_keep) fp32: log p of every completion token given the noised sequence.

    Args:
        model, weight: the model, wrapped or not, and the weight of its head, (V, D).
        noised_ids, clean_ids: (B, L) the model's input and the tokens before masking.
        logits_to_keep: length of the completion, the last positions.
        cfg_scale: s in unguided + (s + 1) (guided - unguided); 0 switches guidance off.
        mask_id: what stands for the prompt in the unguided pass.
    """
    is_completion = torch.zeros_like(clean_ids, dtype=torch.bool)
    is_completion[:, clean_ids.shape[1] - logits_to_keep :] = True
    if cfg_scale > 0:
        unguided_ids = torch.where(is_completion, noised_ids, mask_id)
        guided, unguided = last_hidden(model, torch.cat([noised_ids, unguided_ids])).chunk(2)
        hidden = unguided + (cfg_scale + 1) * (guided - unguided)
    else:
        hidden = last_hidden(model, noised_ids)
    return token_logps(hidden, weight, clean_ids, is_completion)[:, clean_ids.shape[1] - logits_to_keep :]
