"""Names of modules and weights: the original checkpoint's beside those of the modules here.

Everything on disk (weights, adapters and their configs) carries LLaDA's original names, everything in memory
those of transformers' Llama layers. This file is the one table between them; it knows no tensors.
"""

import re
from dataclasses import dataclass

# Original name -> name here, of what the model has once.
_TOP = {
    "model.transformer.wte": "model.embed_tokens",
    "model.transformer.ln_f": "model.norm",
    "model.transformer.ff_out": "lm_head",
}
_BLOCKS = ("model.transformer.blocks", "model.layers")
# The same inside a block. The whole model has an ff_out too: there it is the head.
_IN_BLOCK = {
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
}
_NORMS = ("model.transformer.ln_f", "attn_norm", "ff_norm")

# The same for transformers: patterns that it can also reverse, to write checkpoints. They end before
# "weight", because adapters have other names there. Each starts at the model, so no name is renamed twice.
CHECKPOINT_RENAMINGS = (
    *((f"{original}.", f"{here}.") for original, here in _TOP.items()),
    *(
        (rf"{_BLOCKS[0]}.(\d+).{original}.", rf"{_BLOCKS[1]}.\1.{here}.")
        for original, here in _IN_BLOCK.items()
    ),
)


def _patterns(reverse: bool) -> dict[str, str]:
    turn = (lambda a, b: (b, a)) if reverse else (lambda a, b: (a, b))
    blocks_from, blocks_to = turn(*_BLOCKS)
    patterns = {}
    for pair in _TOP.items():
        source, target = turn(*pair)
        patterns[rf"^{re.escape(source)}(?=\.|$)"] = target
    for pair in _IN_BLOCK.items():
        source, target = turn(*pair)
        patterns[rf"^{re.escape(blocks_from)}\.(\d+)\.{re.escape(source)}(?=\.|$)"] = (
            rf"{blocks_to}.\1.{target}"
        )
    return patterns


TO_HERE = _patterns(reverse=False)
"""Regular expression of an original name -> replacement; at most one fits. As PEFT's `key_mapping`."""

_TO_ORIGINAL = _patterns(reverse=True)


def _rename(name: str, patterns: dict[str, str]) -> str:
    for pattern, replacement in patterns.items():
        renamed, count = re.subn(pattern, replacement, name)
        if count:
            return renamed
    return name


def to_here(name: str) -> str:
    """An original name, of a module or of anything below it, as it is called here; others unchanged."""
    return _rename(name, TO_HERE)


def to_original(name: str) -> str:
    """The reverse of `to_here`."""
    return _rename(name, _TO_ORIGINAL)


def is_original(name: str) -> bool:
    """Whether `to_here` knows the name."""
    return to_here(name) != name


@dataclass(frozen=True)
class Layer:
    """One module with a weight. original, here: its names. kind: "linear", "norm", "embedding" or "head"."""

    original: str
    here: str
    kind: str


HEAD = Layer("model.transformer.ff_out", "lm_head", "head")
EMBEDDING = Layer("model.transformer.wte", "model.embed_tokens", "embedding")


def layers(num_blocks: int) -> list[Layer]:
    """Every module with a weight of a model of `num_blocks` blocks."""
    found = [EMBEDDING, HEAD, Layer("model.transformer.ln_f", "model.norm", "norm")]
    for block in range(num_blocks):
        for original, here in _IN_BLOCK.items():
            kind = "norm" if original in _NORMS else "linear"
            found.append(Layer(f"{_BLOCKS[0]}.{block}.{original}", f"{_BLOCKS[1]}.{block}.{here}", kind))
    return found
