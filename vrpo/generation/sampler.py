"""Sampling from a masked-diffusion model: semi-autoregressive blocks, low-confidence remasking.

All prompts of a call go through the model as one pack, without padding, and only the masked
positions of the current block meet the head. Which positions are masked is a boolean, never a
comparison with the mask id; random numbers are Philox words of (seed, sample id, position, step).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from vrpo.generation import checks
from vrpo.generation.config import SamplerConfig
from vrpo.generation.pack import Pack
from vrpo.generation.predict import Place, predict
from vrpo.models import max_positions

MAX_SEED = 2**64 - 1  # the key of Philox
_MAX_SAMPLE_ID = 2**32 - 1  # one word of its counter


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
    model: nn.Module,
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
        prompts: B lists, arrays or tensors of token ids, any lengths >= 1. Repeat a prompt to get
            several samples of it.
        config: how to decode.
        mask_token_id: see `vrpo.models.special_tokens`; never produced.
        seed: 64-bit key of the random numbers (temperature > 0 or random remasking).
        sample_ids: B integers in [0, 2**32); with equal ids, equal prompts get equal responses.
            None: 0 .. B - 1.
        max_pack_tokens: tokens (prompts + responses, twice with guidance) in one model call; a
            single sequence may be longer.
        progress: show a progress bar if the call lasts more than two seconds.
    Returns:
        (B, G) int64 on the CPU, in the order of `prompts`; see `trim_response`.
    Numerics: see `predict`. A response is a pure function of (model, prompt, seed, sample id) up to
        the rounding of matrix products, whose sizes depend on the pack.
    Errors: ValueError for an empty prompt, ids that the model does not have, a sequence beyond its
        positions, wrong counts or types; FloatingPointError if a logit is NaN or +inf, naming the
        prompt and position. Nothing is returned then.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a torch module, got {type(model).__name__}")
    if not isinstance(config, SamplerConfig):
        raise ValueError(f"config must be a SamplerConfig, got {type(config).__name__}")
    prompts = checks.prompt_ids(prompts)
    sample_ids = range(len(prompts)) if sample_ids is None else sample_ids
    sample_ids = checks.integers("sample_ids", sample_ids, 0, _MAX_SAMPLE_ID)
    if len(sample_ids) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts need as many sample_ids, got {len(sample_ids)}")
    max_pack_tokens = checks.integer("max_pack_tokens", max_pack_tokens, 1)
    mask_token_id = checks.integer("mask_token_id", mask_token_id, 0)
    seed = checks.integer("seed", seed, 0, MAX_SEED)
    _check_against_model(model, prompts, config, mask_token_id)

    response_BG = torch.full((len(prompts), config.max_new_tokens), mask_token_id)
    bar = tqdm(total=len(prompts) * config.steps, desc="generate", unit="step", delay=2, disable=not progress)
    decoder = _Decoder(model, config, mask_token_id, seed, bar)
    # Equal lengths side by side let the CPU attention treat them in one call.
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    with torch.no_grad(), bar, _evaluating(model):
        for chunk in _chunks(order, prompts, config, max_pack_tokens):
            sample_B = torch.tensor([sample_ids[i] for i in chunk])
            response_BG[chunk] = decoder.responses([prompts[i] for i in chunk], sample_B, chunk)
    return response_BG


def _check_against_model(model: nn.Module, prompts: list[Tensor], config: SamplerConfig, mask_token_id: int):
    """ValueError for what this model cannot decode; a wrapper's model is asked, not the wrapper."""
    if mask_token_id in config.stop_ids:
        raise ValueError(f"stop_ids have the mask token {mask_token_id}, which no response may contain")
    limits = next(
        (m.config for m in model.modules() if hasattr(getattr(m, "config", None), "vocab_size")), None
    )
    if limits is None:
        raise ValueError("model has no config with a vocab_size: it must be, or wrap, a model of vrpo.models")
    named = [(name, getattr(config, name)) for name in ("suppress_ids", "defer_ids", "stop_ids")]
    named += [(f"prompt {index}", prompt) for index, prompt in enumerate(prompts)]
    checks.check_vocabulary([("mask_token_id", [mask_token_id]), *named], limits.vocab_size)
    if len({mask_token_id, *config.suppress_ids}) == limits.vocab_size:
        raise ValueError("suppress_ids and the mask token leave no token to produce")
    limit = max_positions(limits)
    for index, prompt in enumerate(prompts):
        needed = len(prompt) + config.max_new_tokens
        if needed > limit:
            raise ValueError(
                f"prompt {index} and its response need {needed} tokens, the model has positions for {limit}"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards every module has the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


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


@dataclass(frozen=True)
class _Decoder:
    """What stays the same from pack to pack."""

    model: nn.Module
    config: SamplerConfig
    mask_token_id: int
    seed: int
    bar: tqdm

    def responses(self, prompts: list[Tensor], sample_B: Tensor, index_B: list[int]) -> Tensor:
        """Responses (B, G) of prompts that fit into one model call; index_B: their numbers, for errors."""
        config = self.config
        size = config.block_length
        response_BG = torch.full((len(prompts), config.max_new_tokens), self.mask_token_id)
        live = list(range(len(prompts)))
        step = 0
        for block, num_steps in enumerate(split_evenly(config.steps, config.num_blocks)):
            pack = Pack(
                [prompts[i] for i in live],
                response_BG[live],
                self.mask_token_id,
                guided=config.cfg_scale > 0,
                device=next(self.model.parameters()).device,
            )
            self._fill_block(pack, block, step, num_steps, sample_B[live], [index_B[i] for i in live])
            step += num_steps
            response_BG[live] = pack.responses().cpu()
            block_BJ = response_BG[live, block * size : (block + 1) * size]
            stopped_B = torch.isin(block_BJ, torch.tensor(config.stop_ids, dtype=torch.int64)).any(dim=1)
            for i in torch.tensor(live)[stopped_B].tolist():
                response_BG[i, (block + 1) * size :] = config.stop_ids[0]
                self.bar.update(config.steps - step)
            live = torch.tensor(live)[~stopped_B].tolist()
            if not live:
                break
        return response_BG

    def _fill_block(self, pack: Pack, block: int, step: int, num_steps: int, sample_B, index_B) -> None:
        """Decode one block of every response in the pack."""
        size, device = self.config.block_length, pack.tokens_T.device
        sample_B = sample_B.to(device)
        masked_BJ = torch.ones(len(sample_B), size, dtype=torch.bool, device=device)
        for number, num_reveal in enumerate(split_evenly(size, num_steps)):
            position_BM = masked_BJ.nonzero()[:, 1].view(len(sample_B), -1) + block * size
            per_row = position_BM.shape[1]
            place = Place(position_BM.flatten(), sample_B.repeat_interleave(per_row), step + number)

            def name_row(n: int, place=place, per_row=per_row) -> str:
                return (
                    f"position {int(place.position_N[n])} of the response to prompt {index_B[n // per_row]}"
                )

            token_N, key_N = predict(
                pack.logits(self.model, position_BM),
                place,
                self.config,
                mask_token_id=self.mask_token_id,
                seed=self.seed,
                name_row=name_row,
            )
            # A stable sort: among equal keys the earlier position is kept.
            best_BM = key_N.view_as(position_BM).sort(dim=1, descending=True, stable=True).indices
            best_Bn = best_BM[:, :num_reveal]
            kept_Bn = position_BM.gather(1, best_Bn)
            pack.write(kept_Bn, token_N.view_as(position_BM).gather(1, best_Bn))
            masked_BJ.scatter_(1, kept_Bn - block * size, False)
            self.bar.update(len(sample_B))
