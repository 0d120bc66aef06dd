"""How to decode: the sampler's settings."""

from collections.abc import Sequence
from dataclasses import dataclass

from vrpo.generation import checks

_REMASKING = ("low_confidence", "random")


@dataclass(frozen=True)
class SamplerConfig:
    """How to decode.

    Fields:
        max_new_tokens: G, length of every response, tokens.
        block_length: tokens per block, divides G; blocks are finished from left to right. None: G,
            one block (pure diffusion).
        steps: model calls in all, from the number of blocks up to G; None: G, one token per call.
            Split evenly over the blocks, remainder first; so are a block's tokens over its steps.
        temperature: 0 takes the most likely token (among equals the smallest id), else tokens are
            drawn from softmax(logits / T).
        remasking: "low_confidence" keeps the most confident predictions of a step, "random" random
            ones. Among equal confidences the earlier position is kept.
        cfg_scale: s of classifier-free guidance, logits = un + (s + 1) (cond - un) with `un` from a
            masked prompt; 0 switches it off (and saves half the work).
        suppress_ids: tokens that are never produced (LLaDA's logits_eos_inf: EOS).
        defer_ids: tokens that count for nothing in confidences (LLaDA's confidence_eos_eot_inf: EOS
            and EoT). They are predicted like any token; then confidences come from logits in which
            they are -inf: a prediction that is one of them has confidence 0, so it is kept last, and
            the confidence of any other is renormalised without them. LLaDA's code does so at
            temperature 0; with noise it forgets EOS and leaves out EoT alone, which we do not follow.
            Random remasking has no confidences, and these ids no effect on it.
        stop_ids: tokens that end a response. A response whose finished blocks hold one is not
            continued; its rest is filled with the first of stop_ids. What precedes is unaffected.
    Errors: ValueError naming the field and what it needs; numbers must be finite.
    Source: LLaDA, arXiv 2502.09992, Algorithms 4 and 5, appendix B.4; settings of its Table 6.
    """

    max_new_tokens: int = 128
    block_length: int | None = None
    steps: int | None = None
    temperature: float = 0.0
    remasking: str = "low_confidence"
    cfg_scale: float = 0.0
    suppress_ids: Sequence[int] = ()
    defer_ids: Sequence[int] = ()
    stop_ids: Sequence[int] = ()

    def __post_init__(self):
        length = checks.integer("max_new_tokens", self.max_new_tokens, 1)
        block = length if self.block_length is None else checks.integer("block_length", self.block_length, 1)
        if length % block:
            raise ValueError(f"block_length must divide max_new_tokens = {length}, got {block}")
        steps = length if self.steps is None else checks.integer("steps", self.steps, 1)
        if not length // block <= steps <= length:
            raise ValueError(
                f"steps must be between {length // block} (one per block) and {length} (one per token), "
                f"got {steps}"
            )
        if not isinstance(self.remasking, str) or self.remasking not in _REMASKING:
            raise ValueError(f"remasking must be one of {_REMASKING}, got {self.remasking!r}")
        checked = {
            "max_new_tokens": length,
            "block_length": block,
            "steps": steps,
            "temperature": checks.number("temperature", self.temperature),
            "cfg_scale": checks.number("cfg_scale", self.cfg_scale),
        }
        for name in ("suppress_ids", "defer_ids", "stop_ids"):
            checked[name] = tuple(checks.token_ids(name, getattr(self, name)).tolist())
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    @property
    def num_blocks(self) -> int:
        return self.max_new_tokens // self.block_length

    @property
    def draws_matter(self) -> bool:
        """Whether the seed can change a response: tokens are drawn, or the order of unequal steps."""
        return self.temperature > 0 or (self.remasking == "random" and self.steps > self.num_blocks)
