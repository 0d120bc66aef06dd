"""Decoding as public code does it: LLaDA's published loop, written anew, for one prompt or a padded batch.

Every step computes the logits of every position, (B, L, V), takes a maximum and a softmax over all of them,
and then uses those of the masked positions of one block. A position is masked where the mask token stands.
Temperature 0 and low-confidence remasking only. Cheapest form of what was published: no noise is made where
none is added, and probabilities have the dtype of the logits.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vrpo.generation import SamplerConfig

PAD_TOKEN_ID = 0  # attention leaves it out


@torch.no_grad()
def decode_padded(
    model: nn.Module, prompts: Sequence[Tensor], config: SamplerConfig, mask_token_id: int
) -> Tensor:
    """(B, G) responses of B prompts in one batch, padded on the left to the longest.

    The mask token itself is never predicted, as a trained model would not: its logits are set to -inf.
    """
    device = next(model.parameters()).device
    longest, num_new = max(map(len, prompts)), config.max_new_tokens
    tokens_BL = torch.full((len(prompts), longest + num_new), PAD_TOKEN_ID, device=device)
    attend_BL = torch.zeros_like(tokens_BL)
    for tokens_L, attend_L, prompt in zip(tokens_BL, attend_BL, prompts, strict=True):
        tokens_L[longest - len(prompt) : longest] = prompt
        attend_L[longest - len(prompt) :] = 1
    tokens_BL[:, longest:] = mask_token_id
    attention = {} if attend_BL.all() else {"attention_mask": attend_BL}
    steps = config.steps // config.num_blocks
    for block in range(config.num_blocks):
        end = longest + (block + 1) * config.block_length
        for step in range(steps):
            logits_BLV = model(input_ids=tokens_BL, **attention).logits
            logits_BLV[..., mask_token_id] = -torch.inf
            token_BL = logits_BLV.argmax(dim=-1)
            confidence_BL = logits_BLV.softmax(dim=-1).gather(-1, token_BL[..., None])[..., 0]
            confidence_BL[:, end:] = -torch.inf
            confidence_BL[tokens_BL != mask_token_id] = -torch.inf
            count = config.block_length // steps + (step < config.block_length % steps)
            best_Bn = confidence_BL.topk(count, dim=1).indices
            tokens_BL.scatter_(1, best_Bn, token_BL.gather(1, best_Bn))
    return tokens_BL[:, longest:].cpu()


def decode_one_by_one(
    model: nn.Module, prompts: Sequence[Tensor], config: SamplerConfig, mask_token_id: int
) -> Tensor:
    """The same, one prompt after the other."""
    return torch.cat([decode_padded(model, [prompt], config, mask_token_id) for prompt in prompts])
