"""A small LLaDA and its tokenizer from nothing but text: for recipes that start without a checkpoint."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from vrpo.models import LLaDAForMaskedDiffusion, create_model, load_config, load_tokenizer

BOS, EOS, MASK = "<|startoftext|>", "<|endoftext|>", "<|mdm_mask|>"
HEADER, HEADER_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
SPECIAL_TOKENS = (BOS, EOS, MASK, HEADER, HEADER_END, EOT)
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
_MAX_PARAMETERS = 10**10

# LLaDA's turns, with the assistant header only where it is asked for.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{{ (message['content'] | trim) + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)


@dataclass(frozen=True)
class NewModel:
    """Sizes of a model trained from random weights; the `new_model` section of a config file.

    vocab_size: tokens of the byte-level BPE, at least 262 (256 bytes and 6 special tokens).
    d_model, n_layers, n_heads, mlp_hidden_size: as in LLaDA's config.json.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    mlp_hidden_size: int

    @classmethod
    def from_mapping(cls, section: Any) -> "NewModel":
        """From the section of a config file: exactly these fields, positive integers; else ValueError."""
        names = [field.name for field in fields(cls)]
        if not isinstance(section, Mapping) or set(section) != set(names):
            raise ValueError(f"new_model needs exactly {', '.join(names)}; got {section}")
        for name in names:
            if type(section[name]) is not int or section[name] < 1:
                raise ValueError(f"new_model: {name} must be a positive integer, got {section[name]!r}")
        sizes = cls(**section)
        sizes.check()
        return sizes

    def check(self) -> None:
        """ValueError unless there is a model of these sizes, and one that a machine can hold."""
        if self.vocab_size < SMALLEST_VOCABULARY:
            raise ValueError(
                f"new_model: vocab_size must be at least {SMALLEST_VOCABULARY}, 256 bytes and the special "
                f"tokens; got {self.vocab_size}"
            )
        if self.d_model % self.n_heads or self.d_model // self.n_heads % 2:
            raise ValueError(
                f"new_model: d_model must be an even multiple of n_heads (rotary positions turn pairs), got "
                f"d_model={self.d_model} and n_heads={self.n_heads}"
            )
        layer = 4 * self.d_model**2 + 3 * self.d_model * self.mlp_hidden_size
        count = 2 * self.vocab_size * self.d_model + self.n_layers * layer
        if count > _MAX_PARAMETERS:
            raise ValueError(f"new_model: these sizes make {count:.2g} parameters, at most 1e10 are allowed")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with LLaDA's special tokens and chat turns, trained on `texts`.

    It can write every string. Small corpora may give fewer tokens than asked for.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size must be at least {SMALLEST_VOCABULARY}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        additional_special_tokens=[HEADER, HEADER_END, EOT],
        chat_template=CHAT_TEMPLATE,
    )


def trained_tokenizer(checkpoint: str, sizes: NewModel) -> PreTrainedTokenizerBase:
    """The tokenizer that a run started with, from one of its checkpoints.

    The weights know its tokens; one trained anew, on data that has changed since, would have others.
    Errors: ValueError unless the checkpoint has the sizes of the section.
    """
    config = load_config(checkpoint)
    found = {
        "d_model": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "mlp_hidden_size": config.intermediate_size,
    }
    for name, value in found.items():
        if value != getattr(sizes, name):
            raise ValueError(
                f"new_model: {name} is {getattr(sizes, name)}, but resume_from_checkpoint goes on with "
                f"{checkpoint!r}, where it is {value}"
            )
    if config.vocab_size > sizes.vocab_size:
        raise ValueError(
            f"new_model: vocab_size is {sizes.vocab_size}, but resume_from_checkpoint goes on with "
            f"{checkpoint!r}, which has {config.vocab_size} tokens"
        )
    return load_tokenizer(checkpoint)


def build_model(
    sizes: NewModel, tokenizer: PreTrainedTokenizerBase, *, max_length: int, seed: int
) -> LLaDAForMaskedDiffusion:
    """A LLaDA for the tokenizer, its random fp32 weights a pure function of `seed`.

    Args: max_length: longest sequence in tokens that the config announces.
    """
    return create_model(
        tokenizer,
        d_model=sizes.d_model,
        n_layers=sizes.n_layers,
        n_heads=sizes.n_heads,
        mlp_hidden_size=sizes.mlp_hidden_size,
        max_sequence_length=max_length,
        seed=seed,
    )
