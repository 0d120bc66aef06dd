"""LLaDA's configuration: what is accepted means what it says, everything else is one true sentence."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import BertConfig, GPT2Config, LlamaConfig

from vrpo.models import LLaDAConfig, LLaDAForMaskedDiffusion, load_config

DATA = Path(__file__).parents[3] / "shared" / "data"
PUBLISHED = {
    "dream-v0-instruct-7b": "Dream is a diffusion language model that this version does not support yet",
    "sdar-1dot7b-chat": "SDAR is a diffusion language model that this version does not support yet",
    "llada2.0-mini": "LLaDA2 is a diffusion language model that this version does not support yet",
}
BASE = {
    "activation_type": "silu",
    "architectures": ["LLaDAModelLM"],
    "alibi_bias_max": 8.0,
    "block_group_size": 1,
    "d_model": 32,
    "embedding_size": 50,
    "eos_token_id": 40,
    "flash_attention": True,
    "init_fn": "mitchell",
    "init_std": 0.02,
    "mask_token_id": 48,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "n_heads": 4,
    "n_kv_heads": 2,
    "n_layers": 2,
    "pad_token_id": 40,
    "precision": "amp_bf16",
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "vocab_size": 50,
    "weight_tying": False,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def write(folder: Path, config) -> str:
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(folder)


def assert_one_line(error: BaseException) -> None:
    assert str(error) and len(str(error).splitlines()) == 1, str(error)


# Other models.


@pytest.mark.skipif(not DATA.exists(), reason="the published configurations are not here")
@pytest.mark.parametrize("name", PUBLISHED)
def test_load_config__published_diffusion_models_are_not_called_causal(name):
    with pytest.raises(ValueError, match=PUBLISHED[name]) as error:
        load_config(str(DATA / name))
    assert "causal" not in str(error.value)
    assert_one_line(error.value)


@pytest.mark.parametrize("config", [LlamaConfig(), GPT2Config()], ids=lambda config: config.model_type)
def test_load_config__causal_models_are_called_causal(config, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="A causal language model cannot fill in masked tokens"):
        load_config(str(tmp_path))


@pytest.mark.parametrize(
    "config",
    [
        BertConfig().to_dict(),
        {"model_type": "qwen3", "architectures": ["A2DQwen3LMHeadModel"]},
        {"model_type": "llama", "mask_token_id": 5},
        {"model_type": "qwen2", "auto_map": {"AutoModel": "modeling.Diffusion"}},
        {"model_type": "never_heard_of"},
        {"model_type": ["llama"]},
        {"d_model": 32},
    ],
    ids=str,
)
def test_load_config__of_other_models_nothing_is_claimed(config, tmp_path):
    with pytest.raises(ValueError, match="does not know the architecture") as error:
        load_config(write(tmp_path, config))
    assert "causal" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    ["", " ", "null", "[]", "3", '"llada"', "{", "[" * 100_000, "\ufeff{}", '{"model_type": "llada"'],
    ids=repr,
)
def test_load_config__a_broken_file_is_named(text, tmp_path):
    with pytest.raises(ValueError, match=r"config\.json") as error:
        load_config(write(tmp_path, text))
    assert_one_line(error.value)


def test_load_config__bytes_that_are_no_text_are_named(tmp_path):
    (tmp_path / "config.json").write_bytes(json.dumps(BASE).encode("utf-16"))
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load_config(str(tmp_path))


def test_load_config__a_folder_without_one_is_one_line(tmp_path):
    with pytest.raises(OSError) as error:
        load_config(str(tmp_path))
    assert_one_line(error.value)


# Other architectures under the same model_type.


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
        {"rope_scaling": YARN},
        {"rope_scaling": "yarn"},
        {"rope_scaling": {"rope_type": []}},
        {"rope_parameters": YARN},
        {"rope_parameters": {"rope_theta": 1e4, "factor": 2.0}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},  # beside rope_theta 5e5
        {"partial_rotary_factor": 0.5},
        {"rotary_dim": 4},
        {"rope_scaling_factor": 4.0},
        {"rope_base": 1e6},
        {"yarn_factor": 4.0},
        {"original_max_position_embeddings": 4096},
        {"num_experts": 64, "num_experts_per_tok": 8},
        {"expert_intermediate_size": 1024},
        {"moe_layer_freq": [0, 1]},
        {"n_routed_experts": 64},
        {"use_qk_norm": True},
        {"qk_layernorm": True},
        {"sliding_window": 4096},
        {"layer_types": ["full_attention", "sliding_attention"]},
        {"layer_types": ["mamba", "full_attention"]},
        {"block_size": 4},
        {"attn_logit_softcapping": 30.0},
        {"clip_qkv": 8.0},
        {"residual_multiplier": 0.22},
        {"norm_after": True},
        {"norm_eps": 1e-6},
        {"hidden_act": "gelu"},
        {"attention_bias": True},
        {"mlp_bias": True},
        {"multi_query_attention": True},
        {"mm_vision_tower": "siglip"},
        {"architectures": ["LLaDAMoEModelLM"]},
        {"architectures": "LLaDAModelLM"},
        {"model_type": "llama"},
        {"is_causal": True},
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
    ],
    ids=str,
)
def test_config__another_architecture_is_refused_before_any_weight(change, tmp_path):
    with pytest.raises(ValueError) as error:
        load_config(write(tmp_path, BASE | change))
    assert_one_line(error.value)
    with pytest.raises(ValueError):
        LLaDAConfig(**BASE | change)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": None},
        {"rope_scaling": {}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        {"partial_rotary_factor": 1.0},
        {"num_experts": 0, "use_qk_norm": False, "sliding_window": None},
        {"layer_types": ["full_attention", "full_attention"]},
        {"architectures": None},
        {"unknown_key": "kept"},
        {"return_dict": False},
        {"property_of_interest": 3},
        {"mlp_hidden_size": None},
        {"n_kv_heads": None},
        {"eos_token_id": [40, 41]},
        {"eos_token_id": None, "pad_token_id": None},
    ],
    ids=str,
)
def test_config__what_changes_nothing_is_accepted(change):
    config = LLaDAConfig(**BASE | change)
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 500000.0}
    assert config.hidden_size == 32 and config.head_dim == 8
    assert config.return_dict


def test_config__keys_of_no_consequence_are_written_back():
    written = LLaDAConfig(**BASE, unknown_key="kept").to_diff_dict()
    assert BASE.items() <= written.items() and written["unknown_key"] == "kept"


# Values.


WRONG = ["64", -1, 0, True, False, None, [32], {}, 32.5, math.nan, math.inf, 2**40]
SIZES = [
    "d_model",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "mlp_hidden_size",
    "max_sequence_length",
    "embedding_size",
]


@pytest.mark.parametrize("key", SIZES)
@pytest.mark.parametrize("value", WRONG, ids=repr)
def test_config__a_size_of_a_wrong_kind_is_named(key, value):
    if value is None or (key == "embedding_size" and value in (0, False, {})):
        return  # absent: the default, or vocab_size
    with pytest.raises(ValueError, match=key) as error:
        LLaDAConfig(**BASE | {key: value})
    assert_one_line(error.value)


@pytest.mark.parametrize("key", ["rope_theta", "rms_norm_eps", "init_std"])
@pytest.mark.parametrize("value", ["1", -1.0, 0, True, [1.0], {}, math.nan, math.inf], ids=repr)
def test_config__a_number_of_a_wrong_kind_is_named(key, value):
    with pytest.raises(ValueError, match=key) as error:
        LLaDAConfig(**BASE | {key: value})
    assert_one_line(error.value)


@pytest.mark.parametrize("key", ["mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("value", ["1", -1, 1.5, True, {}, math.nan], ids=repr)
def test_config__an_id_of_a_wrong_kind_is_named(key, value):
    with pytest.raises(ValueError, match=key):
        LLaDAConfig(**BASE | {key: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_heads": 5, "n_kv_heads": 5}, "not a multiple"),
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads must divide"),
        ({"n_heads": 32, "n_kv_heads": 32}, "must be even for RoPE"),
        ({"mlp_ratio": 1e308, "mlp_hidden_size": None}, "mlp_ratio must be"),
        ({"head_dim": 16}, "head_dim must be d_model / n_heads"),
        ({"embedding_size": 40}, "embedding_size 40 is less than vocab_size 50"),
        ({"hidden_size": 64}, "gives d_model = 32 and hidden_size = 64"),
        ({"torch_dtype": "bf8"}, "torch_dtype must be a floating-point dtype"),
        ({"torch_dtype": "int8"}, "torch_dtype must be a floating-point dtype"),
        ({"pad_token_id": 2**20}, "pad_token_id must be below"),
        ({"weight_tying": "no"}, "weight_tying must be true or false"),
        ({"alibi": "no"}, "alibi must be False"),
    ],
    ids=str,
)
def test_config__contradictions_are_told(change, message):
    with pytest.raises(ValueError, match=message) as error:
        LLaDAConfig(**BASE | change)
    assert_one_line(error.value)


OTHER_KEYS = [
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "intermediate_size",
    "max_position_embeddings",
    "initializer_range",
    "tie_word_embeddings",
    "dtype",
    "rope_scaling",
    "rope_parameters",
    "partial_rotary_factor",
    "num_experts",
    "sliding_window",
    "layer_types",
    "hidden_act",
    "attention_bias",
    "pretraining_tp",
    "bos_token_id",
    "id2label",
    "num_labels",
    "problem_type",
    "output_attentions",
    "is_encoder_decoder",
    "return_dict",
    "chunk_size_feed_forward",
    "use_cache",
    "transformers_version",
    "attention_dropout",
    "is_causal",
    "per_layer_config",
    "multi_query_attention",
]
KEYS = sorted({*BASE, *OTHER_KEYS})
WORDS = ["silu", "default", "yarn", "float32", "llama", "64", "true", 0.0, 1.0, 32, 8, 4, 2]
INNER_KEYS = ["rope_type", "type", "rope_theta", "factor", "full_attention", "0", "x"]
ATOMS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.integers(0, 64),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(WORDS),
)
JSON = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(INNER_KEYS), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(KEYS), JSON, min_size=1, max_size=3),
    dropped=st.sets(st.sampled_from(sorted(BASE)), max_size=2),
)
def test_config__is_a_model_or_a_value_error_of_one_line(changes, dropped):
    try:
        config = LLaDAConfig(**{key: value for key, value in BASE.items() if key not in dropped} | changes)
    except ValueError as error:
        assert_one_line(error)
        return
    assert config.rope_parameters["rope_type"] == "default" and config.hidden_act == "silu"
    again = LLaDAConfig(**json.loads(json.dumps(config.to_diff_dict(), default=str)))
    assert again.to_diff_dict().keys() == config.to_diff_dict().keys()
    if config.num_hidden_layers <= 32:
        with torch.device("meta"):
            model = LLaDAForMaskedDiffusion(config)
        assert model.lm_head.weight.shape == (config.vocab_size, config.hidden_size)
