"""axolotl: the loss of its diffusion plugin, without logits.

Replaces: DiffusionTrainer._compute_diffusion_loss from the model's call to the loss
    (src/axolotl/integrations/diffusion/trainer.py of axolotl-ai-cloud/axolotl, commit 067b021c8).
Faster: the head meets the masked tokens only; the accuracy comes from the same pass; no loop over samples.
Memory: no (B, L, V) logits, no shifted copy of them, no fp32 copy of the masked rows, no gradient of any.
The plugin predicts the first token of a sequence by its own row. Here it must not be masked (special tokens
never are): ValueError on a CPU, NaN on CUDA.
CPU toy, forward + backward: 6.3 times as fast, 53 instead of 252 MiB (results.csv).
"""

import torch
from torch import Tensor, nn

from vrpo_kernels import last_hidden, token_logps


def diffusion_loss(
    model: nn.Module,
    weight: Tensor,
    inputs: dict[str, Tensor],
    clean_ids: Tensor,
    masked: Tensor,
    p_mask: Tensor,
    labels: Tensor | None = None,
    *,
    importance_weighting: bool = True,
) -> tuple[Tensor, Tensor]:
    """The loss, and the share of masked tokens that are the model's first choice.

    Loss: mean over sequences of (sum_masked nll / p_mask) / (answer tokens); see Args for the other forms.

    Args:
        model, weight: the model, wrapped or not, and the weight of its head, (V, D).
        inputs: what the model is called with: the noised input_ids, an attention_mask.
        clean_ids, masked: (B, L). p_mask: (B, L), probability of each token to be masked.
        labels: (B, L), -100 outside the answers. None: over all B L tokens at once.
        importance_weighting: False leaves 1 / p_mask out and, without labels, divides by the masked tokens.
    """
    hidden = last_hidden(model, **inputs)
    logp, metrics = token_logps(hidden, weight, clean_ids, masked, shift=True, return_metrics=True)
    accuracy = metrics.top1.sum() / masked.sum().clamp_min(1)
    # p_mask is 0 at padding, which is never masked.
    term = -logp / torch.where(masked, p_mask, 1) if importance_weighting else -logp
    if labels is not None:
        return (term.sum(dim=1) / (labels != -100).sum(dim=1).clamp_min(1)).mean(), accuracy
    return term.sum() / (clean_ids.numel() if importance_weighting else masked.sum().clamp_min(1)), accuracy
