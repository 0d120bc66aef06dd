"""NeMo AutoModel: its masked-diffusion and its block-diffusion loss, without logits.

Replaces: MDLMCrossEntropyLoss.forward and BlockDiffusionCrossEntropyLoss.forward
    (nemo_automodel/components/loss/dllm_loss.py of NVIDIA-NeMo/Automodel, commit 36044ad3d). They get the
    hidden states and the head's weight instead of logits: `last_hidden(model, **batch)`.
Faster: the head meets the tokens that count only.
Memory: no (B, L, V) logits, nor their gradient, nor `full_tensor()` of either.
CPU toy, forward + backward: 5.3 times as fast, 44 instead of 198 MiB (results.csv).
"""

import torch
from torch import Tensor

from vrpo_kernels import elbo_from_hidden


def mdlm_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    noise_mask: Tensor,
    p_mask: Tensor,
    loss_mask: Tensor,
    num_diffusion_tokens: int | None = None,
) -> Tensor:
    """Sum of nll / p_mask over the corrupted and supervised tokens, over the supervised tokens of the step.

    Args:
        hidden: (B, L, D). weight: (V, D). target_ids, noise_mask, loss_mask: (B, L).
        p_mask: (B, L), probability with which each token was corrupted.
        num_diffusion_tokens: of all micro-batches; None leaves the sum as it is.
    """
    masked = noise_mask & loss_mask.bool()
    elbo = elbo_from_hidden(hidden, weight, target_ids, masked, 1 / p_mask.clamp_min(1e-8))
    return -elbo.sum() / max(num_diffusion_tokens or 1, 1)


def block_diffusion_loss(
    hidden: Tensor,
    weight: Tensor,
    target_ids: Tensor,
    loss_mask: Tensor,
    num_diffusion_tokens: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean nll of all supervised tokens, corrupted or not (uniform noise: DiffusionGemma).

    softcap: the model's final_logit_softcapping, which is applied after the head and so not in `hidden`.
    """
    supervised = loss_mask.bool()
    ones = torch.ones_like(target_ids, dtype=torch.float32)
    elbo = elbo_from_hidden(hidden, weight, target_ids, supervised, ones, softcap=softcap)
    count = supervised.sum() if num_diffusion_tokens is None else torch.tensor(num_diffusion_tokens)
    return -elbo.sum() / count.clamp_min(1)
