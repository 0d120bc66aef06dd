"""Strict loading of checkpoints, tokenizers and special tokens, and building small new models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)

from vrpo.models.adapter_config import CONFIG_FILE, adapter_folder, base_of, read_config
from vrpo.models.files import (
    check_finite,
    check_weight_files,
    find_file,
    first_few,
    read_object,
    why_unsupported,
)
from vrpo.models.llada import LLaDAConfig, LLaDAForMaskedDiffusion
from vrpo.models.quantized import Quantization

MODEL_CLASSES = {"llada": (LLaDAConfig, LLaDAForMaskedDiffusion)}

_DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
}

# Marks the end of a turn in LLaDA's chat template; the tokenizer has no attribute for it.
_END_OF_TURN = "<|eot_id|>"


def parse_dtype(dtype: str | torch.dtype) -> str | torch.dtype:
    """A word ("bf16", "float32", ...) or torch.dtype as torch.dtype; "auto" stays "auto".

    Errors: ValueError naming the accepted words.
    """
    if dtype == "auto" or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    if isinstance(dtype, str) and dtype.removeprefix("torch.") in _DTYPES:
        return _DTYPES[dtype.removeprefix("torch.")]
    raise ValueError(f"dtype must be 'auto' or one of {sorted(_DTYPES)}, got {dtype!r}")


def load_config(path_or_id: str, **hub_kwargs: Any) -> PretrainedConfig:
    """Configuration of a checkpoint directory or hub id, without ever running remote code.

    Errors: ValueError of one line naming the file if it is not a JSON object, if the checkpoint is not a
        masked-diffusion model that this version supports, or if a value in it makes no such model; OSError if
        there is no config.json.
    """
    file = find_file(path_or_id, "config.json", **hub_kwargs)
    raw = read_object(file)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in MODEL_CLASSES:
        what = "names no model_type" if model_type is None else f"is a {model_type!r} checkpoint"
        raise ValueError(
            f"{path_or_id} {what}; VRPO needs a masked-diffusion model, one of {sorted(MODEL_CLASSES)}. "
            f"{why_unsupported(raw)}"
        )
    try:
        return MODEL_CLASSES[model_type][0].from_pretrained(path_or_id, **hub_kwargs)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error


def load_model(
    path_or_id: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str = "vrpo",
    quantization: Quantization | None = None,
    device: torch.device | str | None = None,
    **hub_kwargs: Any,
) -> LLaDAForMaskedDiffusion:
    """A masked-diffusion model from a checkpoint, in evaluation mode, every weight accounted for.

    Args:
        path_or_id: directory or hub id with config.json and safetensors in the original key format.
        dtype: of the weights; "auto" takes the checkpoint's.
        attn_implementation: "vrpo" picks the best packed attention per call (`choose_attention`);
            "vrpo_sdpa", "vrpo_varlen", "vrpo_fa" force one. Any other refuses packs.
        quantization: 4 or 8 bits for the linear layers of the body; `dtype` is then that of the others.
        device: where a quantized model is to be, which some kinds cannot leave; others start on the CPU.
        hub_kwargs: revision, cache_dir, token, local_files_only, ...
    Errors: ValueError of one line for a checkpoint of another architecture, a wrong dtype, files that are
        cut, corrupt or pickled, weights that are missing, unexpected, misshapen, NaN or infinite, which are
        named; OSError for files that are not there.
    """
    dtype = parse_dtype(dtype)
    config = load_config(path_or_id, **hub_kwargs)
    quantized: dict[str, Any] = {}
    if quantization is not None and quantization.name is not None:
        computes_in = dtype if dtype != "auto" else config.dtype or torch.float32
        quantized = {
            "quantization_config": quantization.config(computes_in),
            "device_map": {"": device or "cpu"},
        }
    if Path(path_or_id).is_dir():
        check_weight_files(Path(path_or_id, hub_kwargs.get("subfolder") or ""))
    try:
        model, report = MODEL_CLASSES[config.model_type][1].from_pretrained(
            path_or_id,
            config=config,
            dtype=dtype,
            attn_implementation=attn_implementation,
            output_loading_info=True,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # named below, in one line
            **quantized,
            **hub_kwargs,
        )
    except OSError as error:
        raise OSError(" ".join(str(error).split())) from error
    problems = [
        f"{kind} {first_few(report[kind])}"
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
        if report.get(kind)
    ]
    if config.tie_word_embeddings and model.lm_head.weight is not model.model.embed_tokens.weight:
        problems.append("weight_tying is true, but the head has weights other than the embedding's")
    if problems:
        raise ValueError(
            f"{path_or_id} does not fit its config (names as in the module): " + "; ".join(problems)
        )
    check_finite(model, path_or_id)
    return model.eval()


def load_tokenizer(path_or_id: str, **hub_kwargs: Any) -> PreTrainedTokenizerBase:
    """The checkpoint's tokenizer, without ever running remote code; an adapter's folder may have its base's.

    Errors: ValueError of one line if it is code of its own or its files make no tokenizer, OSError of one
        line if there are none.
    """
    folder = Path(path_or_id)
    if (folder / CONFIG_FILE).is_file() and not any(folder.glob("*tokenizer*")):
        return _base_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(path_or_id, trust_remote_code=False, **hub_kwargs)
    except Exception as error:  # the tokenizers library raises bare Exceptions for files it cannot read
        adapter = None if folder.is_dir() else adapter_folder(path_or_id, hub_kwargs.get("revision"))
        if adapter is not None:
            return _base_tokenizer(adapter)
        if folder.is_dir() and not any((*folder.glob("*token*"), *folder.glob("vocab*"))):
            raise OSError(
                f"{path_or_id} holds no tokenizer: save it beside the model (tokenizer.save_pretrained)"
            ) from error
        reason = " ".join(str(error).split())
        if isinstance(error, OSError):
            raise OSError(reason) from error
        if "trust_remote_code" in reason:
            reason = "it is code of its own, which is never run"
        raise ValueError(f"the tokenizer of {path_or_id} cannot be loaded: {reason}") from error


def _base_tokenizer(adapter: Path) -> PreTrainedTokenizerBase:
    config = read_config(adapter / CONFIG_FILE)
    return load_tokenizer(base_of(adapter, config), revision=config.revision or "main")


def max_positions(config: PretrainedConfig) -> int:
    """The longest sequence (prompt + response, tokens) the model's positions reach.

    RoPE gives an angle to any position, so a longer sequence runs without an error, at positions no training
    has seen: refuse it before it is scored.
    """
    return config.max_position_embeddings


@dataclass(frozen=True)
class SpecialTokens:
    """Ids with a meaning in decoding and scoring.

    Fields:
        mask: stands for a masked token.
        eos: ends a text (LLaDA: <|endoftext|>); None if there is none.
        eot: ends a turn (LLaDA: <|eot_id|>); None if the tokenizer has none.
    """

    mask: int
    eos: int | None
    eot: int | None

    @property
    def terminal(self) -> tuple[int, ...]:
        """The ids that end a response: EoT and EOS, those that exist, each once."""
        return tuple(dict.fromkeys(i for i in (self.eot, self.eos) if i is not None))


def special_tokens(
    config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase | None = None
) -> SpecialTokens:
    """Special token ids of a model and its tokenizer, checked against the embedding.

    The mask id comes from the config if it has one (LLaDA's tokenizer has no mask token), else from
    the tokenizer; EOS from the tokenizer, else the config; EoT is the token "<|eot_id|>" if it
    exists.
    Errors: ValueError if nobody knows the mask token, config and tokenizer know different ones, the
        tokenizer has more ids than the embedding has rows, or an id lies outside the embedding.
    """
    num_rows = config.vocab_size
    if tokenizer is not None and len(tokenizer) > num_rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the embedding only {num_rows} rows: they do not "
            "belong together, or the embedding must be resized and trained first"
        )
    mask = getattr(config, "mask_token_id", None)
    if mask is None and tokenizer is not None:
        mask = tokenizer.mask_token_id
    if mask is None:
        raise ValueError(
            "no mask token: neither the config (mask_token_id) nor the tokenizer (mask_token) has one"
        )
    known = None if tokenizer is None else tokenizer.mask_token_id
    if known is not None and known != mask:
        raise ValueError(
            f"mask_token_id is {mask} in the config and {known} ({tokenizer.mask_token!r}) in the tokenizer: "
            "they do not belong together, or one of them must be corrected"
        )
    if not 0 <= mask < num_rows:
        raise ValueError(f"mask_token_id must be in [0, {num_rows}), got {mask}")
    eos = None if tokenizer is None else tokenizer.eos_token_id
    if eos is None:
        eos = config.eos_token_id
    if isinstance(eos, (list, tuple)):
        eos = eos[0]
    if eos is not None and (eos == mask or not 0 <= eos < num_rows):
        raise ValueError(
            f"the EOS id must be in [0, {num_rows}) and not the mask token's {mask}, got {eos}: correct "
            "tokenizer.eos_token, or eos_token_id in the config"
        )
    eot = None if tokenizer is None else tokenizer.get_vocab().get(_END_OF_TURN)
    return SpecialTokens(mask=mask, eos=eos, eot=eot)


def create_model(
    tokenizer: PreTrainedTokenizerBase,
    *,
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int | None = None,
    mlp_hidden_size: int | None = None,
    max_sequence_length: int = 1024,
    rope_theta: float = 10000.0,
    weight_tying: bool = False,
    init_std: float = 0.02,
    dtype: str | torch.dtype = torch.float32,
    seed: int = 0,
) -> LLaDAForMaskedDiffusion:
    """A new LLaDA model for a tokenizer, with random weights that are a pure function of `seed`.

    Args:
        tokenizer: must have a mask token; gives the vocabulary size and the EOS and pad ids.
        d_model, n_layers, n_heads, n_kv_heads, mlp_hidden_size: sizes; n_kv_heads None = n_heads,
            mlp_hidden_size None = 4 * d_model.
        max_sequence_length: longest prompt + response, tokens.
        rope_theta: base of the rotary embedding.
        weight_tying: the head is the embedding.
        init_std: standard deviation of every matrix; norms start at 1.
        dtype: of the weights.
        seed: any integer. Global RNG state is left as it was.
    Errors: ValueError if the tokenizer has no mask token or sizes do not divide.
    """
    if tokenizer.mask_token_id is None:
        raise ValueError("the tokenizer has no mask token: set tokenizer.mask_token before building")
    config = LLaDAConfig(
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        mlp_hidden_size=4 * d_model if mlp_hidden_size is None else mlp_hidden_size,
        max_sequence_length=max_sequence_length,
        rope_theta=rope_theta,
        weight_tying=weight_tying,
        init_std=init_std,
        embedding_size=len(tokenizer),
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        attn_implementation="vrpo",
    )
    dtype = parse_dtype(dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights that are replaced below
        model = LLaDAForMaskedDiffusion(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=init_std, generator=generator)
    return model.to(torch.float32 if dtype == "auto" else dtype).eval()
