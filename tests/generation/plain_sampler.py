"""LLaDA's sampler as its paper describes it (arXiv 2502.09992, Algorithms 4 and 5, appendix B.4).

One sequence at a time, logits of all positions, Python loops, confidences as fp64 probabilities. It shares
no code with the product; it counts its random numbers in the same way, so that draws can be compared.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PlainSettings:
    """LLaDA's own arguments. logits_eos_inf and confidence_eos_eot_inf hold the ids they act on."""

    gen_length: int
    block_length: int
    steps: int
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    logits_eos_inf: tuple[int, ...] = ()
    confidence_eos_eot_inf: tuple[int, ...] = ()


def plain_decode(
    logits_of: Callable[[Tensor], Tensor],
    prompt: Sequence[int],
    settings: PlainSettings,
    *,
    mask_id: int,
    seed: int = 0,
    sample: int = 0,
) -> list[int]:
    """The response to one prompt; logits_of maps tokens (L,) to logits (L, V)."""
    tokens = torch.tensor([*prompt, *[mask_id] * settings.gen_length])
    is_open = [True] * settings.gen_length
    num_blocks = settings.gen_length // settings.block_length
    number = 0
    for block in range(num_blocks):
        calls = _share(settings.steps, num_blocks, block)
        for call in range(calls):
            candidates = []
            logits = _logits(logits_of, tokens, len(prompt), settings.cfg_scale, mask_id)
            for j in range(block * settings.block_length, (block + 1) * settings.block_length):
                if is_open[j]:
                    row = logits[len(prompt) + j].double()
                    draw = [_uniform(seed, purpose, j, sample, number) for purpose in (2, 3)]
                    token, confidence = _token_and_confidence(row, settings, mask_id, *draw)
                    candidates.append((-confidence, j, token))
            # The most confident first; of equals the one further left.
            for _, j, token in sorted(candidates)[: _share(settings.block_length, calls, call)]:
                tokens[len(prompt) + j] = token
                is_open[j] = False
            number += 1
    return tokens[len(prompt) :].tolist()


def _share(total: int, parts: int, part: int) -> int:
    """Of `total` things dealt evenly to `parts`, how many the given part gets; remainder to the first."""
    return total // parts + (1 if part < total % parts else 0)


def _logits(logits_of, tokens, prompt_length, cfg_scale, mask_id) -> Tensor:
    logits = logits_of(tokens)
    if cfg_scale > 0:
        without_prompt = tokens.clone()
        without_prompt[:prompt_length] = mask_id
        unconditional = logits_of(without_prompt)
        logits = unconditional + (cfg_scale + 1) * (logits - unconditional)
    return logits


def _token_and_confidence(row, settings, mask_id, token_draw, order_draw) -> tuple[int, float]:
    row = row.clone()
    row[[mask_id, *settings.logits_eos_inf]] = -torch.inf
    if settings.temperature == 0:
        token = int(row.argmax())
    else:
        probabilities = (row / settings.temperature).softmax(0)
        token = int((probabilities.cumsum(0) <= token_draw * probabilities.sum()).sum())
    if settings.remasking == "random":
        return token, order_draw
    # Appendix B.4: EOS and EoT are excluded from the confidence, though not from the prediction.
    if token in settings.confidence_eos_eot_inf:
        return token, 0.0
    row[list(settings.confidence_eos_eot_inf)] = -torch.inf
    return token, float(row.softmax(0)[token])


def _uniform(seed: int, purpose: int, position: int, sample: int, step: int) -> float:
    """53 bits of the Philox words of these integers, in [0, 1)."""
    high, low = _philox(seed, (position, purpose << 28, sample, step))[:2]
    return ((high >> 5) * 2**26 + (low >> 6)) / 2**53


def _philox(seed: int, counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x32-10 in Python's integers (Salmon et al., SC 2011, section 4.3)."""
    a, b, c, d = counter
    keys = [seed % 2**32, seed >> 32]
    for _ in range(10):
        x, y = 0xD2511F53 * a, 0xCD9E8D57 * c
        a, b, c, d = (y >> 32) ^ b ^ keys[0], y % 2**32, (x >> 32) ^ d ^ keys[1], x % 2**32
        keys = [(keys[0] + 0x9E3779B9) % 2**32, (keys[1] + 0xBB67AE85) % 2**32]
    return a, b, c, d
