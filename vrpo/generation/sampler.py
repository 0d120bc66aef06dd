"""Sampling from a masked-diffusion model: semi-autoregressive blocks, low-confidence remasking.

All prompts of a call go through the model as one pack, without padding, and only the masked
positions of the current block meet the head. Which positions are masked is a boolean, never a
comparison with the mask id; random numbers are Philox words of (seed, sample id, position, step).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vrpo_kernels import philox4x32

# Philox purposes (top bits of counter word 1); 0 and 1 belong to the mask draw.
_TOKEN_PURPOSE = 2
_ORDER_PURPOSE = 3
_REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class SamplerConfig:
    """How to decode.

    Fields:
        max_new_tokens: G, length of every response, tokens.
        block_length: tokens per block, divides G; blocks are finished from left to right. None: G,
            one block (pure diffusion).
        steps: model calls in all, from the number of blocks up to G; None: G, one token per call.
            Split evenly over the blocks, remainder first.
        temperature: 0 takes the most likely token, else tokens are drawn from softmax(logits / T).
        remasking: "low_confidence" keeps the most confident predictions of a step, "random" random
            ones.
        cfg_scale: s of classifier-free guidance, logits = un + (s + 1) (cond - un) with `un` from a
            masked prompt; 0 switches it off (and saves half the work).
        suppress_ids: tokens that are never produced (LLaDA's logits_eos_inf: EOS).
        defer_ids: tokens whose confidence counts as 0, so they are kept last (LLaDA's
            confidence_eos_eot_inf: EOS and EoT).
        stop_ids: tokens that end a response. A response whose finished blocks hold one is not
            continued; its rest is filled with the first of stop_ids. What precedes is unaffected.
    Source: LLaDA, arXiv 2502.09992, Algorithms 4 and 5, appendix B.4; settings of its Table 6.
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"
    cfg_scale: float = 0.0
    suppress_ids: tuple[int, ...] = ()
    defer_ids: tuple[int, ...] = ()
    stop_ids: tuple[int, ...] = ()

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        block = self.max_new_tokens if self.block_length is None else self.block_length
        if block < 1 or self.max_new_tokens % block:
            raise ValueError(f"block_length must divide max_new_tokens = {self.max_new_tokens}, got {block}")
        num_blocks = self.max_new_tokens // block
        steps = self.max_new_tokens if self.steps is None else self.steps
        if not num_blocks <= steps <= self.max_new_tokens:
            raise ValueError(
                f"steps must be between {num_blocks} (one per block) and {self.max_new_tokens} (one "
                f"per token), got {steps}"
            )
        if self.temperature < 0:
            raise ValueError(f"temperature must be 0 or more, got {self.temperature}")
        if self.cfg_scale < 0:
            raise ValueError(f"cfg_scale must be 0 or more, got {self.cfg_scale}")
        if self.remasking not in _REMASKING:
            raise ValueError(f"remasking must be one of {_REMASKING}, got {self.remasking!r}")
        object.__setattr__(self, "block_length", block)
        object.__setattr__(self, "steps", steps)


def split_evenly(total: int, parts: int) -> list[int]:
    """`total` as `parts` integers that differ by at most one, the larger ones first."""
    base, remainder = divmod(total, parts)
    return [base + 1] * remainder + [base] * (parts - remainder)


def trim_response(tokens_G: Sequence[int] | Tensor, terminal_ids: Sequence[int]) -> list[int]:
    """The tokens before the first terminal one (EoT or EOS); all of them if there is none."""
    tokens = tokens_G.tolist() if isinstance(tokens_G, Tensor) else list(tokens_G)
    ends = [i for i, token in enumerate(tokens) if token in terminal_ids]
    return tokens[: ends[0]] if ends else tokens


def generate(
    model: Callable,
    prompts: Sequence[Sequence[int]],
    config: SamplerConfig,
    *,
    mask_token_id: int,
    seed: int = 0,
    sample_ids: Sequence[int] | None = None,
    max_pack_tokens: int = 16384,
    progress: bool = True,
) -> Tensor:
    """One response of G tokens for each prompt.

    Args:
        model: `LLaDAForMaskedDiffusion` or a wrapper of it (PEFT, DDP).
        prompts: B token lists, any lengths >= 1. Repeat a prompt to get several samples of it.
        config: how to decode.
        mask_token_id: see `vrpo.models.special_tokens`; never produced.
        seed: 64-bit key of the random numbers (temperature > 0 or random remasking).
        sample_ids: B integers in [0, 2**32); with equal ids, equal prompts get equal responses.
            None: 0 .. B - 1.
        max_pack_tokens: tokens (prompts + responses, twice with guidance) in one model call.
        progress: show a progress bar if the call lasts more than two seconds.
    Returns:
        (B, G) int64 on the CPU, in the order of `prompts`; see `trim_response`.
    Numerics: confidences in fp32, drawing in fp64. A response is a pure function of (model, prompt,
        seed, sample id) up to the rounding of matrix products, whose sizes depend on the pack.
    Errors: ValueError for an empty prompt, too long a sequence, wrong ids or counts.
    """
    sample_ids = list(range(len(prompts))) if sample_ids is None else list(sample_ids)
    if len(sample_ids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many sample_ids, got {len(sample_ids)}")
    if any(not 0 <= sample < 2**32 for sample in sample_ids):
        raise ValueError("sample_ids must be in [0, 2**32)")
    if any(len(prompt) == 0 for prompt in prompts):
        raise ValueError("a prompt is empty: every prompt needs at least one token")
    longest = max((len(prompt) for prompt in prompts), default=0) + config.max_new_tokens
    limit = getattr(getattr(model, "config", None), "max_position_embeddings", longest)
    if prompts and longest > limit:
        raise ValueError(f"prompt and response need {longest} tokens, the model has positions for {limit}")
    # Equal lengths side by side let the CPU attention treat them in one call.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    response_BG = torch.full((len(prompts), config.max_new_tokens), mask_token_id)
    was_training = model.training
    model.eval()
    bar = tqdm(
        total=len(prompts) * config.steps,
        desc="generate",
        unit="step",
        delay=2,
        disable=not progress,
    )
    try:
        with torch.no_grad(), bar:
            for chunk in _chunks(order, prompts, config, max_pack_tokens):
                response_BG[chunk] = _generate_pack(
                    model,
                    [torch.as_tensor(prompts[i], dtype=torch.int64) for i in chunk],
                    torch.tensor([sample_ids[i] for i in chunk]),
                    config,
                    mask_token_id,
                    seed,
                    bar,
                )
    finally:
        model.train(was_training)
    return response_BG


def _chunks(order, prompts, config: SamplerConfig, max_pack_tokens: int) -> list[list[int]]:
    """Prompt indices in runs whose sequences fit the token budget (at least one each)."""
    copies = 2 if config.cfg_scale else 1
    chunks, used = [], 0
    for i in order:
        size = copies * (len(prompts[i]) + config.max_new_tokens)
        if not chunks or used + size > max_pack_tokens:
            chunks.append([])
            used = 0
        chunks[-1].append(i)
        used += size
    return chunks


def _generate_pack(model, prompts, sample_B, config, mask_token_id, seed, bar) -> Tensor:
    """Responses (b, G) of prompts that fit into one model call."""
    device = next(model.parameters()).device
    size = config.block_length
    num_blocks = config.max_new_tokens // size
    response_BG = torch.full((len(prompts), config.max_new_tokens), mask_token_id)
    live = list(range(len(prompts)))
    step = 0
    for block, num_steps in enumerate(split_evenly(config.steps, num_blocks)):
        pack = _Pack([prompts[i] for i in live], response_BG[live], mask_token_id, config.cfg_scale, device)
        masked_BJ = torch.ones(len(live), size, dtype=torch.bool, device=device)
        for num_reveal in split_evenly(size, num_steps):
            position_BM = masked_BJ.nonzero()[:, 1].view(len(live), -1) + block * size
            token_BM, confidence_BM = _predict(
                pack.logits(model, position_BM),
                position_BM,
                sample_B[live].to(device),
                step,
                config,
                mask_token_id,
                seed,
            )
            # A stable sort: among equal confidences the earlier position is kept.
            best_BM = confidence_BM.sort(dim=1, descending=True, stable=True).indices
            best_Bn = best_BM[:, :num_reveal]
            kept_Bn = position_BM.gather(1, best_Bn)
            pack.write(kept_Bn, token_BM.gather(1, best_Bn))
            masked_BJ.scatter_(1, kept_Bn - block * size, False)
            step += 1
            bar.update(len(live))
        response_BG[live] = pack.responses().cpu()
        finished = _contains(response_BG[live, block * size : (block + 1) * size], config.stop_ids)
        if finished.any():
            left = (num_blocks - block - 1) * size
            for i in [i for i, done in zip(live, finished.tolist(), strict=True) if done]:
                response_BG[i, config.max_new_tokens - left :] = config.stop_ids[0]
                bar.update(config.steps - step)
            live = [i for i, done in zip(live, finished.tolist(), strict=True) if not done]
        if not live:
            break
    return response_BG


def _contains(tokens_BJ: Tensor, ids: Sequence[int]) -> Tensor:
    """(B,) bool: which rows hold one of the ids."""
    return torch.isin(tokens_BJ, torch.tensor(ids, dtype=torch.int64)).any(dim=1)


class _Pack:
    """The sequences being denoised, as one pack; with guidance a second copy with masked prompts."""

    def __init__(self, prompts, response_BG, mask_token_id, cfg_scale, device):
        self.cfg_scale = cfg_scale
        self.num_responses, self.num_new = response_BG.shape
        bodies = [torch.cat(pair) for pair in zip(prompts, response_BG, strict=True)]
        if cfg_scale:
            bodies += [
                torch.cat((torch.full_like(prompt, mask_token_id), response_G))
                for prompt, response_G in zip(prompts, response_BG, strict=True)
            ]
        lengths = torch.tensor([len(body) for body in bodies])
        ends = lengths.cumsum(0)
        self.tokens_T = torch.cat(bodies).to(device)
        self.position_T = torch.cat([torch.arange(n) for n in lengths.tolist()]).to(device)
        self.cu_S1 = torch.cat((ends.new_zeros(1), ends)).to(torch.int32).to(device)
        self.max_seqlen = int(lengths.max())
        self.start_S = (ends - self.num_new).to(device)  # where each response begins

    def _rows(self, position_BM: Tensor) -> Tensor:
        """Index into T of response positions, for every copy."""
        copies = len(self.start_S) // self.num_responses
        return self.start_S[:, None] + position_BM.repeat(copies, 1)

    def logits(self, model, position_BM: Tensor) -> Tensor:
        """(B, M, V) of the given response positions, guidance applied."""
        logits_NV = model(
            input_ids=self.tokens_T[None],
            position_ids=self.position_T[None],
            cu_seq_lens_q=self.cu_S1,
            cu_seq_lens_k=self.cu_S1,
            max_length_q=self.max_seqlen,
            max_length_k=self.max_seqlen,
            rows=self._rows(position_BM).flatten(),
        ).logits.float()
        logits_SMV = logits_NV.unflatten(0, (len(self.start_S), -1))
        if not self.cfg_scale:
            return logits_SMV
        conditional, unconditional = logits_SMV.chunk(2)
        return unconditional + (self.cfg_scale + 1) * (conditional - unconditional)

    def write(self, position_Bn: Tensor, token_Bn: Tensor) -> None:
        """Put revealed tokens into every copy."""
        rows_Sn = self._rows(position_Bn)
        self.tokens_T[rows_Sn] = token_Bn.repeat(len(rows_Sn) // len(token_Bn), 1)

    def responses(self) -> Tensor:
        """(B, G) current responses."""
        start_B = self.start_S[: self.num_responses, None]
        return self.tokens_T[start_B + torch.arange(self.num_new, device=self.tokens_T.device)]


def _predict(logits_BMV, position_BM, sample_B, step, config: SamplerConfig, mask_token_id, seed):
    """A token and its confidence for each masked position of the block: (B, M) int64, (B, M)."""
    banned = torch.tensor([mask_token_id, *config.suppress_ids], device=logits_BMV.device)
    logits_BMV = logits_BMV.index_fill(2, banned, -torch.inf)
    if config.temperature == 0:
        token_BM = logits_BMV.argmax(dim=2)
    else:
        uniform_BM = _uniform(seed, _TOKEN_PURPOSE, position_BM, sample_B, step)
        token_BM = draw_categorical(logits_BMV, config.temperature, uniform_BM)
    if config.remasking == "random":
        confidence_BM = _uniform(seed, _ORDER_PURPOSE, position_BM, sample_B, step)
    else:
        chosen_BM = logits_BMV.gather(2, token_BM[..., None])[..., 0]
        confidence_BM = (chosen_BM - logits_BMV.logsumexp(dim=2)).exp()
    deferred = torch.tensor(config.defer_ids, dtype=torch.int64, device=token_BM.device)
    return token_BM, confidence_BM.masked_fill(torch.isin(token_BM, deferred), -1.0)


def _uniform(seed: int, purpose: int, position_BM: Tensor, sample_B: Tensor, step: int) -> Tensor:
    """(B, M) fp64 in [0, 1) with 53 random bits, a pure function of the integers given."""
    device = position_BM.device
    high, low, _, _ = philox4x32(
        seed,
        position_BM,
        torch.tensor(purpose << 28, device=device),
        sample_B[:, None],
        torch.tensor(step, device=device),
    )
    return ((high >> 5) * 2**26 + (low >> 6)).double() * 2.0**-53


def draw_categorical(logits_BMV: Tensor, temperature: float, uniform_BM: Tensor) -> Tensor:
    """Tokens from softmax(logits / temperature) by inverting the distribution function.

        token = min { v : sum_{w <= v} p_w > u },   p = softmax(logits / temperature)

    Gives the same distribution as the Gumbel trick with one random number per position instead of V.

    Args:
        logits_BMV: (B, M, V); -inf means never.
        temperature: > 0.
        uniform_BM: (B, M) fp64 in [0, 1).
    Returns: (B, M) int64.
    Numerics: fp64; a token of probability 0 is never drawn.
    """
    cumulative_BMV = (logits_BMV.double() / temperature).softmax(dim=2).cumsum(dim=2)
    total_BM = cumulative_BMV[..., -1]
    # Rounding may not lift the threshold to the total: no token lies beyond it.
    below_total_BM = torch.nextafter(total_BM, torch.zeros_like(total_BM))
    threshold_BM = torch.minimum(uniform_BM * total_BM, below_total_BM)
    return torch.searchsorted(cumulative_BMV, threshold_BM[..., None], right=True)[..., 0]
