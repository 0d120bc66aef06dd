"""What each codebase computes, in our words, from all logits: what the drop-ins are compared with.

Plain PyTorch, one formula each, on logits (B, L, V) that are aligned with the tokens unless said otherwise.
Where a codebase picks the masked rows before its cross-entropy, so does its formula. No line is theirs; where
the code lies is said in the drop-in of the same name.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """-log softmax(logits)[tokens], at every position."""
    each = F.cross_entropy(logits.flatten(0, -2), tokens.flatten(), reduction="none")
    return each.view(tokens.shape)


def masked_nll(logits: Tensor, tokens: Tensor, masked: Tensor) -> Tensor:
    """The same at masked positions, 0 elsewhere; the masked rows of the logits are copied out first."""
    each = torch.zeros(tokens.shape, dtype=logits.dtype)
    return each.masked_scatter(masked, nll(logits[masked], tokens[masked]))


def one_later(logits: Tensor) -> Tensor:
    """Aligns a model that predicts the token at i at i - 1; the first position keeps its own row."""
    return torch.cat([logits[:, :1], logits[:, :-1]], dim=1)


def guided(logits: Tensor, unguided: Tensor, cfg_scale: float) -> Tensor:
    """Classifier-free guidance as LLaDA and d1 write it."""
    return unguided + (cfg_scale + 1) * (logits - unguided)


def dllm(
    logits: Tensor, tokens: Tensor, maskable: Tensor, masked: Tensor, weight_B: Tensor, norm: str
) -> Tensor:
    """Weighted NLL of masked tokens, divided by maskable tokens (batch, sequence) or by the batch size."""
    term = nll(logits, tokens) * masked * weight_B[:, None]
    if norm == "token":
        return term.sum() / maskable.sum()
    if norm == "sequence":
        return (term.sum(1) / maskable.sum(1)).mean()
    return term.sum() / len(tokens)


def d1(logits: Tensor, tokens: Tensor, logits_to_keep: int) -> Tensor:
    """(B, logits_to_keep) log-probabilities of the last tokens."""
    return -nll(logits[:, -logits_to_keep:], tokens[:, -logits_to_keep:])


def llada(logits: Tensor, tokens: Tensor, masked: Tensor, p_mask: Tensor) -> Tensor:
    """Masked log-probabilities over the masking rate, summed, averaged over the samples."""
    return -(masked_nll(logits, tokens, masked) / p_mask[:, None]).sum() / len(tokens)


def diffucoder(whole: Tensor, first: Tensor, second: Tensor, tokens: Tensor, masked: Tensor, ratio: float):
    """(B, L): the fully masked copy and the copy that masks the token, its share undone, half each."""
    own = torch.where(masked, -nll(first, tokens) / ratio, -nll(second, tokens) / (1 - ratio))
    return (own - nll(whole, tokens)) / 2


def espo(logits: Tensor, coupled: Tensor, tokens: Tensor, completion: Tensor, masked: Tensor, p_mask: Tensor):
    """(B,): the mask's estimate and its complement's, each with its own rate, averaged."""
    length = completion.sum(1).to(p_mask.dtype)
    other = length / (length + 1) - p_mask
    other = torch.where(other > 0, other, 1)  # where the complement is empty
    here = masked_nll(logits, tokens, masked).sum(1) / p_mask
    rest = masked_nll(coupled, tokens, completion & ~masked).sum(1)
    return -(here + rest / other) / 2


def dare(logits: Tensor, tokens: Tensor, masked: Tensor, p_mask: list[float], bounds: list[int]) -> Tensor:
    """(S,) of a pack, logits (T, V): each sequence's masked log-probabilities over its masking rate."""
    term = -masked_nll(logits, tokens, masked)
    ranges = zip(bounds[:-1], bounds[1:], p_mask, strict=True)
    return torch.stack([term[first:last].sum() / p for first, last, p in ranges])


def automodel(
    logits: Tensor, tokens: Tensor, noised: Tensor, p_mask: Tensor, supervised: Tensor, count: int
) -> Tensor:
    """NLL over the masking rate of tokens that are noised and supervised, over the step's token count."""
    return (nll(logits, tokens) / p_mask)[noised & supervised].sum() / count


def automodel_blocks(logits: Tensor, tokens: Tensor, supervised: Tensor, softcap: float) -> Tensor:
    """Mean NLL of the supervised tokens, of Gemma's capped logits."""
    return nll(softcap * torch.tanh(logits / softcap), tokens)[supervised].mean()


def nemo_rl(logits: list[Tensor], tokens: Tensor, masked: list[Tensor], coefficients: list[float]) -> Tensor:
    """(B, L): over the quadrature points, coefficient times log-probability of what each has masked."""
    points = zip(logits, masked, coefficients, strict=True)
    return sum(-coefficient * nll(values, tokens) * at for values, at, coefficient in points)


def axolotl(
    logits: Tensor, tokens: Tensor, masked: Tensor, p_mask: Tensor, answer: Tensor | None, weigh: bool
) -> Tensor:
    """Masked NLL, over the masking rate if weighed; per answer token and sequence, or over all tokens."""
    rate = torch.where(masked, p_mask, 1) if weigh else 1
    term = masked_nll(logits, tokens, masked) / rate
    if answer is not None:
        return (term.sum(1) / answer.sum(1)).mean()
    return term.sum() / (tokens.numel() if weigh else masked.sum())
