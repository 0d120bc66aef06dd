"""Models the trainer understands, loaded without remote code.

Importing this package registers our own classes and attention functions with transformers
(AutoConfig, AutoModelForCausalLM, checkpoint renaming, AttentionInterface), the way transformers
documents for custom models: afterwards `AutoConfig`, `AutoModel` and `AutoModelForCausalLM` read LLaDA
checkpoints. transformers looks for no entry points of packages, so a script that uses these without anything
else of vrpo needs the one line `import vrpo.models`. Nothing of transformers is patched.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping

from vrpo.models.attention import ATTENTION_NAMES, choose_attention, register_attention
from vrpo.models.llada import (
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    MaskedDiffusionOutput,
    checkpoint_renamings,
)
from vrpo.models.loading import (
    SpecialTokens,
    create_model,
    load_config,
    load_model,
    load_tokenizer,
    max_positions,
    parse_dtype,
    special_tokens,
)

register_attention()
register_checkpoint_conversion_mapping("llada", checkpoint_renamings(), overwrite=True)
AutoConfig.register("llada", LLaDAConfig, exist_ok=True)
for auto_class in (AutoModel, AutoModelForCausalLM):  # both, as the original's auto_map
    auto_class.register(LLaDAConfig, LLaDAForMaskedDiffusion, exist_ok=True)

__all__ = [
    "ATTENTION_NAMES",
    "LLaDAConfig",
    "LLaDAForMaskedDiffusion",
    "MaskedDiffusionOutput",
    "SpecialTokens",
    "choose_attention",
    "create_model",
    "load_config",
    "load_model",
    "load_tokenizer",
    "max_positions",
    "parse_dtype",
    "special_tokens",
]
