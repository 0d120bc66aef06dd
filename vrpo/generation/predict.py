"""Logits of masked positions -> a token for each, and what decides which of them are kept."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo.generation.config import SamplerConfig
from vrpo_kernels import philox4x32

# Philox purposes (top bits of counter word 1); 0 and 1 belong to the mask draw.
_TOKEN_PURPOSE = 2
_ORDER_PURPOSE = 3
# Logits worked on at a time; all at once, 16384 rows of LLaDA's head would take 15 GiB in fp64. On a CPU
# 2 MiB in fp64 stay in the cache (256 rows take .29 s, and .6 s in one piece); a GPU wants few launches.
_CHUNK_ELEMENTS_CPU = 2**18
_CHUNK_ELEMENTS = 2**24


@dataclass(frozen=True)
class Place:
    """Where N rows of logits stand: the integers that key their random numbers.

    position_N: int64, within the response. sample_N: int64, the sample id of the response.
    step: of the response, counted over all blocks.
    """

    position_N: Tensor
    sample_N: Tensor
    step: int

    def uniform(self, seed: int, purpose: int) -> Tensor:
        """(N,) fp64 in [0, 1) with 53 random bits, a pure function of the integers given."""
        device = self.position_N.device
        high, low, _, _ = philox4x32(
            seed,
            self.position_N,
            torch.tensor(purpose << 28, device=device),
            self.sample_N,
            torch.tensor(self.step, device=device),
        )
        return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


def predict(
    logits_CV: Tensor,
    place: Place,
    config: SamplerConfig,
    *,
    mask_token_id: int,
    seed: int,
    name_row: Callable[[int], str] = "row {}".format,
) -> tuple[Tensor, Tensor]:
    """A token for each of N masked positions, and the key of the order in which they are kept.

        key = log(p / (1 - p)),  p = softmax(logits without defer_ids)[token]

    The log-odds order positions as the confidences p do, and keep apart those that all round to 1. With
    random remasking the key is a random number.

    Args:
        logits_CV: of the N positions, in any dtype; with guidance C = 2 N, the unconditional ones last.
        name_row: says where row n stands, for the error.
    Returns: token_N int64; key_N fp64, a larger one is kept earlier.
    Numerics: guidance in the logits' dtype but at least fp32, draws and keys in fp64. Rows are worked on in
        chunks, so that memory beyond `logits_CV` is bounded.
    Errors: FloatingPointError naming the first row that holds NaN or +inf, or lets no token be chosen.
    """
    num_rows, device = len(place.position_N), logits_CV.device
    banned = torch.tensor([mask_token_id, *config.suppress_ids], device=device)
    deferred = torch.tensor(config.defer_ids, dtype=torch.int64, device=device)
    drawn = config.temperature > 0
    uniform_N = place.uniform(seed, _TOKEN_PURPOSE) if drawn else logits_CV.new_zeros(num_rows)
    tokens, keys = [], []
    size = max(1, (_CHUNK_ELEMENTS_CPU if device.type == "cpu" else _CHUNK_ELEMENTS) // logits_CV.shape[1])
    for start in range(0, num_rows, size):
        rows = slice(start, min(start + size, num_rows))
        logits_NV = _guided(logits_CV, rows, num_rows, config.cfg_scale)
        banned_N = logits_NV[:, banned].amax(dim=1)
        best_N, token_N = logits_NV.index_fill_(1, banned, -torch.inf).max(dim=1)
        # A maximum is NaN where anything is.
        _raise_unless((banned_N < torch.inf) & (best_N < torch.inf), "are NaN or infinite", name_row, start)
        _raise_unless(best_N > -torch.inf, "are -inf for every token allowed", name_row, start)
        if drawn:
            token_N = draw_categorical(logits_NV, config.temperature, uniform_N[rows])
        tokens.append(token_N)
        if config.remasking == "low_confidence":
            keys.append(_log_odds(logits_NV, token_N, deferred))
    token_N = torch.cat(tokens)
    if config.remasking == "random":
        return token_N, place.uniform(seed, _ORDER_PURPOSE)
    return token_N, torch.cat(keys)


def _guided(logits_CV: Tensor, rows: slice, num_rows: int, cfg_scale: float) -> Tensor:
    """A copy of these rows, at least fp32, with guidance applied."""
    wide = torch.promote_types(logits_CV.dtype, torch.float32)
    conditional_NV = logits_CV[rows].to(wide, copy=True)
    if not cfg_scale:
        return conditional_NV
    without_NV = logits_CV[num_rows:][rows].to(wide)
    # A token that the model itself excludes stays excluded; -inf - -inf would be NaN.
    excluded_NV = conditional_NV.isneginf() & without_NV.isneginf()
    guided_NV = without_NV + (cfg_scale + 1) * (conditional_NV - without_NV)
    return guided_NV.masked_fill_(excluded_NV, -torch.inf)


def _raise_unless(fine_N: Tensor, what: str, name_row: Callable[[int], str], start: int) -> None:
    if not fine_N.all():
        first = start + int(fine_N.logical_not().nonzero()[0])
        raise FloatingPointError(
            f"the model's logits at {name_row(first)} {what}: its weights are broken or its dtype overflows"
        )


def _log_odds(logits_NV: Tensor, token_N: Tensor, deferred: Tensor) -> Tensor:
    """log(p / (1 - p)) of the tokens in a softmax without the deferred ones; -inf for a deferred token.

    1 - p is summed from the other tokens: as a difference it would lose the digits that order sure
    tokens.
    """
    token_N1 = token_N[:, None]
    others_NV = logits_NV.double()
    others_NV.sub_(others_NV.gather(1, token_N1))
    others_NV.scatter_(1, token_N1, -torch.inf).index_fill_(1, deferred, -torch.inf)
    return (-others_NV.logsumexp(dim=1)).masked_fill(torch.isin(token_N, deferred), -torch.inf)


def draw_categorical(logits_V: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """Tokens from softmax(logits / temperature) by inverting the distribution function.

        token = min { v : sum_{w <= v} p_w > u },   p = softmax(logits / temperature)

    Gives the same distribution as the Gumbel trick with one random number per position instead of V.

    Args:
        logits_V: (..., V); -inf means never.
        temperature: > 0; as it goes to 0 the draw goes to the largest logit.
        uniform: (...) fp64 in [0, 1).
    Returns: (...) int64.
    Numerics: fp64; a token of probability 0 is never drawn.
    """
    wide_V = logits_V.double()
    # The largest is 0 before the division, which may then overflow to -inf but not to +inf.
    cumulative_V = ((wide_V - wide_V.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1).cumsum(dim=-1)
    total = cumulative_V[..., -1]
    # Rounding may not lift the threshold to the total: no token lies beyond it.
    below_total = torch.nextafter(total, torch.zeros_like(total))
    threshold = torch.minimum(uniform * total, below_total)
    return torch.searchsorted(cumulative_V, threshold[..., None], right=True)[..., 0]
