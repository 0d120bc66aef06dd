"""LLaDA's configuration: original key names in and out, and a refusal of everything the layers do not do."""

import math
import re
from typing import Any

import torch
from transformers import LlamaConfig

# Original configuration key -> transformers' key.
_CONFIG_NAMES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "mlp_hidden_size": "intermediate_size",
    "max_sequence_length": "max_position_embeddings",
    "init_std": "initializer_range",
    "embedding_size": "vocab_size",
    "weight_tying": "tie_word_embeddings",
}

# What every LLaDA checkpoint says about itself, and the only values these layers implement.
_ARCHITECTURE = {
    "activation_type": "silu",
    "alibi": False,
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "embedding_dropout": 0.0,
    "include_bias": False,
    "include_qkv_bias": False,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "residual_dropout": 0.0,
    "rope": True,
    "rope_full_precision": True,
    "scale_logits": False,
}
# The same in transformers' words, which original files do not carry.
_LLAMA_ARCHITECTURE = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "is_causal": False}
_CLASSES = ("LLaDAModelLM", "LLaDAForMaskedDiffusion")

# Key of another architecture (regular expression) -> what it would be. Checked unless the value is one of
# _OFF; the keys that LLaDA has itself are no business of these patterns.
_ELSEWHERE = {
    r"expert|(^|_)moe(_|$)|router|routed": "a mixture of experts",
    r"qk_?(layer)?norm|[qk]_norm": "a norm of queries and keys",
    r"sliding|attention_window|window_size|local_attention|layer_types|attn_types": "windowed attention",
    r"(^|_)(rope|mrope|rotary|yarn|ntk)(_|$)|longrope|original_max_position": "other rotary embeddings",
    r"soft_?cap|clip_qkv|logits?_scal|multiplier|scale_(emb|depth|attn)": "rescaled activations",
    r"block_(size|length)|is_block|block_diffusion": "attention in blocks",
    r"(post|pre|sandwich|after|before)_?norm|norm_(after|before|position|placement)": "norms in other places",
    r"(^|norm_)eps(ilon)?$": "another epsilon than rms_norm_eps",
    r"lora_rank|mamba|ssm_|linear_attn|recurrent|conv_kernel": "other attention",
    r"(^|_)(vision|image|audio|video|mm)_|cross_attention|timestep|adaln": "inputs other than tokens",
    r"per_layer_config": "layers that differ",
    r"^(quantization|compression)_config$": "quantised weights",
}
_OFF = (None, False, 0, 1, 0.0, 1.0, "", "default", [], {})
_KNOWN = {
    *_CONFIG_NAMES,
    *_CONFIG_NAMES.values(),
    *_ARCHITECTURE,
    *_LLAMA_ARCHITECTURE,
    "experts_implementation",  # transformers passes it to every config
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
}

_SIZES = ("d_model", "n_layers", "n_heads", "n_kv_heads", "mlp_hidden_size", "max_sequence_length")
_LARGEST = 2**27  # of a size: beyond any model, and no product of two overflows
_MOST_LAYERS = 10_000
_IDS = ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id")


def _is_off(value: Any) -> bool:
    if isinstance(value, list) and all(kind == "full_attention" for kind in value):
        return True  # layer_types of a model without windows
    return any(type(value) is type(off) and value == off for off in _OFF)


def _refuse_other_architectures(given: dict[str, Any]) -> None:
    """ValueError if a key says that this is not the LLaDA these layers are."""
    for key, value in (_ARCHITECTURE | _LLAMA_ARCHITECTURE).items():
        found = given.get(key, value)
        if isinstance(found, bool) is not isinstance(value, bool) or found != value:
            if key == "is_causal":
                raise ValueError(
                    f"is_causal must be False: a masked-diffusion model attends both ways; got {found!r}"
                )
            raise ValueError(f"LLaDA config {key} must be {value!r}, got {found!r}")
    if given.get("multi_query_attention"):
        raise ValueError("LLaDA config multi_query_attention is not supported; use n_kv_heads=1")
    if given.get("model_type", "llada") != "llada":
        raise ValueError(f"LLaDA config model_type must be 'llada', got {given['model_type']!r}")
    classes = given.get("architectures") or []
    if not isinstance(classes, list) or any(name not in _CLASSES for name in classes):
        raise ValueError(
            f"LLaDA config architectures must name {_CLASSES[0]}, got {classes!r}: another architecture, "
            "which this version does not support"
        )
    for key, value in given.items():
        if key in _KNOWN or key.startswith("_") or _is_off(value):
            continue
        for pattern, meaning in _ELSEWHERE.items():
            if re.search(pattern, key):
                raise ValueError(
                    f"LLaDA config {key} = {value!r} asks for {meaning}, which this version does not support"
                )


def _plain_rope(given: dict[str, Any]) -> dict[str, Any]:
    """rope_parameters of plain RoPE from every spelling of it; ValueError for any other."""
    thetas = {}
    if given.get("rope_theta") is not None:
        thetas["rope_theta"] = given.pop("rope_theta")
    for name in ("rope_parameters", "rope_scaling"):
        rope = given.pop(name, None)
        if rope is None or rope == {}:
            continue
        if not isinstance(rope, dict):
            raise ValueError(f"LLaDA config {name} must be a dictionary or null, got {rope!r}")
        kinds = [rope.get(key, "default") for key in ("rope_type", "type")]
        extra = rope.keys() - {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
        if kinds != ["default"] * 2 or extra or rope.get("partial_rotary_factor", 1) not in (None, 1):
            raise ValueError(f"LLaDA has plain RoPE only, got {name} = {rope!r}")
        if rope.get("rope_theta") is not None:
            thetas[name] = rope["rope_theta"]
    given.pop("rope_theta", None)
    given.pop("partial_rotary_factor", None)  # 1 or null, or it would have been refused
    for name, theta in thetas.items():
        _check_number(f"{name}'s theta" if name != "rope_theta" else name, theta, above=0)
    if len(set(thetas.values())) > 1:
        raise ValueError(f"LLaDA config gives RoPE several bases: {thetas}")
    theta = next(iter(thetas.values()), 10000.0)
    return {"rope_type": "default", "rope_theta": theta}


def _check_number(name: str, value: Any, above: float, at_most: float = math.inf) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not (above < value <= at_most and value < math.inf):
        limit = f" and at most {at_most:g}" if at_most < math.inf else ""
        raise ValueError(f"LLaDA config {name} must be a finite number above {above:g}{limit}, got {value!r}")


def _check_count(name: str, value: Any, at_least: int = 1, at_most: int = _LARGEST) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not at_least <= value <= at_most:
        raise ValueError(
            f"LLaDA config {name} must be an integer from {at_least} to {at_most}, got {value!r}"
        )


def _take_original_names(given: dict[str, Any]) -> None:
    """Renames in place; ValueError if the two spellings of a key disagree."""
    # The embedding may have more rows than the vocabulary has tokens: LLaDA pads it.
    rows, tokens = given.pop("embedding_size", None), given.get("vocab_size")
    if rows:
        _check_count("embedding_size", rows)
        if tokens is not None:
            _check_count("vocab_size", tokens)
            if tokens > rows:
                raise ValueError(f"LLaDA config embedding_size {rows} is less than vocab_size {tokens}")
        given["vocab_size"] = rows
    for original, here in _CONFIG_NAMES.items():
        value = given.pop(original, None)
        if value is None:
            continue
        if here in given and given[here] != value:
            raise ValueError(f"LLaDA config gives {original} = {value!r} and {here} = {given[here]!r}")
        given[here] = value


def _check_values(given: dict[str, Any]) -> None:
    """ValueError for a size, number, id or word of a type or range that makes no model."""
    originals = {here: original for original, here in _CONFIG_NAMES.items()}
    for original in (*_SIZES, "embedding_size"):
        here = _CONFIG_NAMES[original]
        if given.get(here) is not None:
            at_most = _MOST_LAYERS if original == "n_layers" else _LARGEST
            _check_count(original, given[here], at_most=at_most)
        elif here in given and here != "num_key_value_heads":
            del given[here]  # null: as if absent
    if given.get("initializer_range") is None:
        given.pop("initializer_range", None)
    else:
        _check_number(originals["initializer_range"], given["initializer_range"], above=0, at_most=1)
    if given.get("tie_word_embeddings") is None:
        given.pop("tie_word_embeddings", None)
    elif not isinstance(given["tie_word_embeddings"], bool):
        raise ValueError(
            f"LLaDA config weight_tying must be true or false, got {given['tie_word_embeddings']!r}"
        )
    _check_number("rms_norm_eps", given["rms_norm_eps"], above=0, at_most=1)
    for name in _IDS:
        value = given[name]
        for one in value if name == "eos_token_id" and isinstance(value, list) and value else [value]:
            if one is not None:
                _check_count(name, one, at_least=0)
    rows, pad = given.get("vocab_size"), given["pad_token_id"]
    if rows is not None and pad is not None and pad >= rows:
        raise ValueError(f"LLaDA config pad_token_id must be below the embedding's {rows} rows, got {pad}")
    for name in ("dtype", "torch_dtype"):
        dtype = given.get(name)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype, dtype)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(
                f"LLaDA config {name} must be a floating-point dtype of torch, got {given[name]!r}"
            )


class LLaDAConfig(LlamaConfig):
    """Configuration of a LLaDA model; takes and writes the original checkpoint's key names.

    Args (original name, transformers' name in brackets is accepted too):
        d_model (hidden_size), n_layers (num_hidden_layers), n_heads (num_attention_heads),
        n_kv_heads (num_key_value_heads; None: n_heads), mlp_hidden_size (intermediate_size; None:
        mlp_ratio * d_model), max_sequence_length (max_position_embeddings),
        embedding_size (vocab_size): rows of the embedding, at least the tokenizer's size,
        weight_tying (tie_word_embeddings): the head is the embedding,
        rope_theta: base of the rotary embedding, default 10000,
        rms_norm_eps: default 1e-5,
        mask_token_id: id of the token that stands for "masked"; None if the tokenizer knows it,
        eos_token_id, pad_token_id, bos_token_id: None unless given (LlamaConfig would invent 1 and
        2). Any other key of the original config.json is kept and written back.
    Errors: ValueError of one line for a causal model, another architecture or an option these layers do
        not implement (`_ARCHITECTURE`, `_ELSEWHERE`; RoPE other than plain), values of wrong types or
        ranges, sizes that do not divide, and keys that contradict each other.
    Source: configuration_llada.py and config.json of GSAI-ML/LLaDA-8B-Instruct.
    """

    model_type = "llada"
    attribute_map = {  # noqa: RUF012 -- transformers' form
        **LlamaConfig.attribute_map,
        **{original: here for original, here in _CONFIG_NAMES.items() if original in (*_SIZES, "init_std")},
    }

    def __init__(self, **kwargs: Any):
        _refuse_other_architectures(kwargs)
        kwargs = _ARCHITECTURE | {"is_causal": False, "mlp_ratio": 4} | kwargs
        rope_parameters = _plain_rope(kwargs)
        _take_original_names(kwargs)
        for key in _IDS:
            kwargs.setdefault(key, None)
        if kwargs.get("rms_norm_eps") is None:
            kwargs["rms_norm_eps"] = 1e-5
        _check_values(kwargs)
        if "hidden_size" in kwargs and "intermediate_size" not in kwargs:
            _check_number("mlp_ratio", kwargs["mlp_ratio"], above=0, at_most=_LARGEST)
            kwargs["intermediate_size"] = int(kwargs["mlp_ratio"] * kwargs["hidden_size"])
            _check_count("mlp_hidden_size", kwargs["intermediate_size"])
        kwargs["use_cache"] = False  # a key-value cache has no meaning without a causal mask
        kwargs.pop("return_dict", None)  # how the writer liked results: the layers pass them by name
        try:
            super().__init__(**kwargs, rope_parameters=rope_parameters)
        except Exception as error:  # whatever transformers' own validation of its keys raises
            raise ValueError(f"LLaDA config: {' '.join(str(error).split())}") from error
        self._check_heads()

    def _check_heads(self) -> None:
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim must be d_model / n_heads = {self.hidden_size} / "
                f"{self.num_attention_heads}, got {self.head_dim}"
            )
        if self.head_dim % 2:
            raise ValueError(f"LLaDA config d_model / n_heads must be even for RoPE, got {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"LLaDA config n_kv_heads must divide n_heads {self.num_attention_heads}, got "
                f"{self.num_key_value_heads}"
            )

    def to_diff_dict(self) -> dict[str, Any]:
        """What save_pretrained writes: original key names, no auto_map to absent code files."""
        written = super().to_diff_dict()
        for key in (
            "auto_map",
            "is_causal",
            "head_dim",
            "hidden_act",
            "attention_bias",
            "mlp_bias",
            "pretraining_tp",
            "rope_parameters",
            *_CONFIG_NAMES.values(),
        ):
            written.pop(key, None)
        written |= {original: getattr(self, here) for original, here in _CONFIG_NAMES.items()}
        written |= {key: getattr(self, key) for key in _ARCHITECTURE}
        written |= {
            "architectures": [_CLASSES[0]],
            "vocab_size": self.vocab_size,
            "rope_theta": self.rope_parameters["rope_theta"],
            "rms_norm_eps": self.rms_norm_eps,
            "use_cache": False,
        }
        if "dtype" in written:
            written["torch_dtype"] = written.pop("dtype")
        if self.bos_token_id is None:
            written.pop("bos_token_id")  # not an original key
        return dict(sorted(written.items()))
