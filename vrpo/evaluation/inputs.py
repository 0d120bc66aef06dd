"""What `vrpo score` and `vrpo variance` have in common before they measure: checks, then two models."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from vrpo.models import load_tokenizer, max_positions, special_tokens
from vrpo.models.checkpoint import load_policy
from vrpo.models.paths import check_device, check_loading, check_model_path
from vrpo.models.quantized import Quantization, is_quantized


@dataclass(frozen=True)
class Models:
    """Two models that can be compared: one dtype, one vocabulary, one mask token.

    max_positions: tokens of the longest sequence that both reach.
    """

    model: nn.Module
    reference: nn.Module | None
    tokenizer: PreTrainedTokenizerBase
    mask_token_id: int
    max_positions: int
    device: str

    @property
    def vocab_size(self) -> int:
        return self.model.config.vocab_size

    def check_length(self, longest: int) -> None:
        """ValueError if the longest sequence of the data lies beyond the positions of a model."""
        if longest > self.max_positions:
            raise ValueError(
                f"the longest sequence has {longest} tokens, the model's positions end at "
                f"{self.max_positions}: give max_length={self.max_positions} or less"
            )


def check_numbers(args: Any) -> None:
    """ValueError naming the first of the numbers that score and variance share that is out of range."""
    check_positive("beta", args.beta)
    for name, smallest in (("max_length", 2), ("max_tokens_per_pack", 1)):
        value = getattr(args, name)
        if value < smallest:
            raise ValueError(f"{name} must be at least {smallest}, got {value}")
    if not 0 <= args.seed < 2**32:
        raise ValueError(f"seed must be in [0, 2**32), got {args.seed}")
    check_loading(args.dtype, args.attn_implementation)
    check_device(args.device)


def check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def load_models(args: Any, revision: str = "main", quantization: Quantization | None = None) -> Models:
    """The model and, where one is named, the reference, on the device and ready to be compared.

    A reference without a tokenizer of its own is taken to read the model's tokens.
    Errors: ValueError or OSError of one sentence: no such model, another kind of model, or two that cannot be
        compared.
    """
    paths = {"model_name_or_path": (args.model_name_or_path, revision)}
    if args.ref_model_name_or_path is not None:
        paths["ref_model_name_or_path"] = (args.ref_model_name_or_path, "main")
    for argument, (path, at) in paths.items():
        check_model_path(path, argument=argument, revision=at)
    device = check_device(args.device)
    tokenizer = load_tokenizer(args.model_name_or_path, revision=revision)
    loaded = {}
    for argument, (path, at) in paths.items():
        model = load_policy(
            path,
            dtype=args.dtype,
            attn_implementation=args.attn_implementation,
            revision=at,
            quantization=quantization,
            device=device,
        )
        loaded[argument] = model.eval().requires_grad_(False)
    model, reference = loaded["model_name_or_path"], loaded.get("ref_model_name_or_path")
    mask = args.mask_token_id
    if mask is None:
        mask = special_tokens(model.config, tokenizer).mask
    elif not 0 <= mask < model.config.vocab_size:
        raise ValueError(f"mask_token_id must be in [0, {model.config.vocab_size}), got {mask}")
    if reference is not None:
        _check_same_dtype(loaded)
        _check_same_tokens(model.config, reference.config, tokenizer, _tokenizer(args.ref_model_name_or_path))
        _check_same_mask(args, mask, reference.config)
    return Models(
        _on(device, model),
        None if reference is None else _on(device, reference),
        tokenizer,
        mask,
        min(max_positions(one.config) for one in loaded.values()),
        device,
    )


def _on(device: str, model: nn.Module) -> nn.Module:
    return model if is_quantized(model) else model.to(device)


def _tokenizer(path: str) -> PreTrainedTokenizerBase | None:
    try:
        return load_tokenizer(path, revision="main")
    except (OSError, ValueError):
        return None


def _check_same_dtype(models: Mapping[str, nn.Module]) -> None:
    dtypes = {name: sorted({str(p.dtype) for p in model.parameters()}) for name, model in models.items()}
    (_, policy), (_, reference) = dtypes.items()
    if policy != reference:
        raise ValueError(
            f"the model's weights are {', '.join(policy)}, the reference's {', '.join(reference)}: their "
            "rounding would look like a reward; give dtype=float32 or another one for both"
        )


def _check_same_tokens(
    config: PretrainedConfig,
    ref_config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    ref_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    if config.vocab_size != ref_config.vocab_size:
        raise ValueError(
            f"the model has {config.vocab_size} tokens, the reference {ref_config.vocab_size}: ELBOs over "
            "different vocabularies cannot be compared"
        )
    if ref_tokenizer is None:
        return
    ids, ref_ids = tokenizer.get_vocab(), ref_tokenizer.get_vocab()
    other = sorted(token for token in ids.keys() | ref_ids.keys() if ids.get(token) != ref_ids.get(token))
    if other:
        raise ValueError(
            f"model and reference have different tokenizers: {len(other)} tokens differ, {other[0]!r} is "
            f"{ids.get(other[0])} and {ref_ids.get(other[0])}; their ELBOs cannot be compared"
        )


def _check_same_mask(args: Any, mask: int, ref_config: PretrainedConfig) -> None:
    ref_mask = getattr(ref_config, "mask_token_id", None)
    if args.mask_token_id is None and ref_mask is not None and ref_mask != mask:
        raise ValueError(
            f"the model's mask token is {mask}, the reference's {ref_mask}: one of them would be asked with "
            "a token that it does not know; give mask_token_id if one id is right for both"
        )
