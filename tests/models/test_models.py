"""LLaDA without remote code: original names in and out, strict loading, and the forward's contract."""

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from packs import MASK_ID, VOCAB, pack, random_segments, tiny_model
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, LlamaConfig

from vrpo.models import (
    LLaDAConfig,
    LLaDAForMaskedDiffusion,
    create_model,
    load_model,
    load_tokenizer,
    max_positions,
    parse_dtype,
    special_tokens,
)
from vrpo.training.trunk import train_top_layers

GSAI_FILES = Path(__file__).parents[3] / "shared" / "data" / "llada-8b-instruct"

# config.json of GSAI-ML/LLaDA-8B-Instruct, with small sizes.
GSAI_CONFIG = {
    "activation_type": "silu",
    "alibi": False,
    "alibi_bias_max": 8.0,
    "architectures": ["LLaDAModelLM"],
    "attention_dropout": 0.0,
    "attention_layer_norm": False,
    "attention_layer_norm_with_affine": True,
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModel": "modeling_llada.LLaDAModelLM",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "bias_for_layer_norm": False,
    "block_group_size": 1,
    "block_type": "llama",
    "d_model": 32,
    "embedding_dropout": 0.0,
    "embedding_size": 50,
    "eos_token_id": 40,
    "flash_attention": True,
    "include_bias": False,
    "include_qkv_bias": False,
    "init_cutoff_factor": None,
    "init_device": "meta",
    "init_fn": "mitchell",
    "init_std": 0.02,
    "input_emb_norm": False,
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "mask_token_id": 48,
    "max_sequence_length": 64,
    "mlp_hidden_size": 48,
    "mlp_ratio": 4,
    "model_type": "llada",
    "multi_query_attention": None,
    "n_heads": 4,
    "n_kv_heads": 4,
    "n_layers": 2,
    "pad_token_id": 40,
    "precision": "amp_bf16",
    "residual_dropout": 0.0,
    "rms_norm_eps": 1e-05,
    "rope": True,
    "rope_full_precision": True,
    "rope_theta": 500000.0,
    "scale_logits": False,
    "torch_dtype": "float32",
    "transformers_version": "4.51.2",
    "use_cache": False,
    "vocab_size": 50,
    "weight_tying": False,
}
NOT_KEPT = {"auto_map", "transformers_version"}


def gsai_tensors() -> dict[str, torch.Tensor]:
    """Random weights under the original names, each name and shape written out."""
    shapes = {
        "model.transformer.wte.weight": (50, 32),
        "model.transformer.ln_f.weight": (32,),
        "model.transformer.ff_out.weight": (50, 32),
    }
    for i in range(2):
        block = f"model.transformer.blocks.{i}."
        shapes |= {f"{block}{name}_norm.weight": (32,) for name in ("attn", "ff")}
        shapes |= {f"{block}{name}.weight": (32, 32) for name in ("q_proj", "k_proj", "v_proj", "attn_out")}
        shapes |= {f"{block}{name}.weight": (48, 32) for name in ("ff_proj", "up_proj")}
        shapes |= {f"{block}ff_out.weight": (32, 48)}
    generator = torch.Generator().manual_seed(0)
    return {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write_checkpoint(folder: Path, tensors=None, **changes) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(GSAI_CONFIG | changes))
    save_file(gsai_tensors() if tensors is None else tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture
def checkpoint(tmp_path):
    return write_checkpoint(tmp_path / "gsai")


def naive_llada(tensors, ids, theta=500000.0, heads=4, eps=1e-5):
    """LLaDA from its paper and its original names, fp64, one sequence: no transformers, no renaming."""
    weight = {name.removeprefix("model.transformer."): t.double() for name, t in tensors.items()}

    def norm(x, name):
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight[f"{name}.weight"]

    def rotate(x):  # (heads, L, d); halves, not neighbours, form the pairs
        half = x.shape[-1] // 2
        angle = torch.arange(x.shape[1])[:, None] * theta ** (-torch.arange(half).double() / half)
        first, second = x[..., :half], x[..., half:]
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
        )

    x = weight["wte.weight"][ids]
    for i in range(2):
        block = f"blocks.{i}."
        normed = norm(x, f"{block}attn_norm")
        q, k, v = (
            (normed @ weight[f"{block}{name}.weight"].T).unflatten(1, (heads, -1)).transpose(0, 1)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = (rotate(q) @ rotate(k).transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + attended.transpose(0, 1).flatten(1) @ weight[f"{block}attn_out.weight"].T
        normed = norm(x, f"{block}ff_norm")
        gate = F.silu(normed @ weight[f"{block}ff_proj.weight"].T)
        x = x + (gate * (normed @ weight[f"{block}up_proj.weight"].T)) @ weight[f"{block}ff_out.weight"].T
    return norm(x, "ln_f") @ weight["ff_out.weight"].T


# Checkpoints.


def test_load_model__original_checkpoint_gives_the_architecture_of_the_paper(checkpoint):
    ids = random_segments([11])[0]
    logits = load_model(str(checkpoint))(input_ids=ids[None]).logits[0]
    torch.testing.assert_close(logits.double(), naive_llada(gsai_tensors(), ids), atol=2e-5, rtol=2e-5)


def test_load_model__round_trip_keeps_names_tensors_and_config(checkpoint, tmp_path):
    load_model(str(checkpoint)).save_pretrained(tmp_path / "saved")
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    original = gsai_tensors()
    assert saved.keys() == original.keys()
    assert all(torch.equal(saved[name], original[name]) for name in original)
    written = json.loads((tmp_path / "saved" / "config.json").read_text())
    kept = {key: value for key, value in GSAI_CONFIG.items() if key not in NOT_KEPT}
    assert {key: value for key, value in written.items() if key not in NOT_KEPT} == kept
    assert "auto_map" not in written


def test_auto_model__loads_the_original_checkpoint_without_remote_code(checkpoint):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="vrpo")
    assert type(model) is LLaDAForMaskedDiffusion
    ids = random_segments([5])[0][None]
    assert torch.equal(model(input_ids=ids).logits, load_model(str(checkpoint))(input_ids=ids).logits)


def test_load_model__tied_head_round_trips(tmp_path):
    tensors = gsai_tensors()
    del tensors["model.transformer.ff_out.weight"]
    model = load_model(str(write_checkpoint(tmp_path / "tied", tensors, weight_tying=True)))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.save_pretrained(tmp_path / "saved")
    assert load_file(tmp_path / "saved" / "model.safetensors").keys() == tensors.keys()


@pytest.mark.skipif(not GSAI_FILES.exists(), reason="the published LLaDA-8B configuration is not here")
def test_published_config__builds_the_8b_model_with_the_published_names():
    config = LLaDAConfig.from_pretrained(GSAI_FILES)
    with torch.device("meta"):
        model = LLaDAForMaskedDiffusion(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == 8_015_581_184
    index = json.loads((GSAI_FILES / "model.safetensors.index.json").read_text())
    from transformers.core_model_loading import revert_weight_conversion

    reverted = revert_weight_conversion(model, model.state_dict())
    assert set(reverted) == set(index["weight_map"])


@pytest.mark.skipif(not GSAI_FILES.exists(), reason="the published LLaDA-8B configuration is not here")
def test_published_config__is_written_back_as_it_was(tmp_path):
    LLaDAConfig.from_pretrained(GSAI_FILES).save_pretrained(tmp_path)
    written, published = (json.loads((f / "config.json").read_text()) for f in (tmp_path, GSAI_FILES))
    for key in NOT_KEPT:
        written.pop(key, None), published.pop(key, None)
    assert written == published


def test_load_model__missing_weight_is_named(tmp_path):
    tensors = gsai_tensors()
    del tensors["model.transformer.blocks.1.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing_keys model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(write_checkpoint(tmp_path / "broken", tensors)))


def test_load_model__unexpected_weight_is_named(tmp_path):
    tensors = gsai_tensors() | {"model.transformer.wpe.weight": torch.zeros(64, 32)}
    with pytest.raises(ValueError, match=r"unexpected_keys model\.transformer\.wpe\.weight"):
        load_model(str(write_checkpoint(tmp_path / "broken", tensors)))


def test_load_model__a_causal_checkpoint_is_refused(tmp_path):
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'llama' checkpoint; VRPO needs a masked-diffusion model"):
        load_model(str(tmp_path))


def test_load_model__a_causal_llada_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is_causal must be False"):
        load_model(str(write_checkpoint(tmp_path / "causal", is_causal=True)))


def test_model__a_causal_config_is_refused():
    with pytest.raises(ValueError, match="got a llama config"):
        LLaDAForMaskedDiffusion(LlamaConfig(hidden_size=32, num_hidden_layers=1))


@pytest.mark.parametrize("dtype", ["bf8", "int8", torch.int64], ids=str)
def test_parse_dtype__unknown_is_refused(dtype):
    with pytest.raises(ValueError, match="dtype must be 'auto' or one of"):
        parse_dtype(dtype)


@pytest.mark.parametrize(("dtype", "expected"), [("bf16", torch.bfloat16), ("auto", torch.float32)])
def test_load_model__gives_the_dtype_asked_for(checkpoint, dtype, expected):
    assert load_model(str(checkpoint), dtype=dtype).dtype == expected


# Configuration.


@pytest.mark.parametrize(
    "option",
    [{"alibi": True}, {"include_bias": True}, {"layer_norm_type": "default"}, {"attention_layer_norm": True}],
    ids=lambda option: next(iter(option)),
)
def test_config__options_the_layers_lack_are_refused(option):
    with pytest.raises(ValueError, match=f"LLaDA config {next(iter(option))} must be"):
        LLaDAConfig(**GSAI_CONFIG | option)


def test_config__original_and_native_names_are_the_same_attribute():
    config = LLaDAConfig(**GSAI_CONFIG)
    assert config.d_model == config.hidden_size == 32
    assert config.n_layers == config.num_hidden_layers == 2
    assert config.rope_parameters["rope_theta"] == 500000.0
    assert config.bos_token_id is None
    config.d_model = 64
    assert config.hidden_size == 64


def test_config__survives_a_copy_through_its_dictionary():
    config = LLaDAConfig(**GSAI_CONFIG)
    assert LLaDAConfig(**config.to_dict()).to_diff_dict() == config.to_diff_dict()


def test_config__head_size_must_fill_the_model():
    with pytest.raises(ValueError, match="head_dim must be d_model / n_heads"):
        LLaDAConfig(**GSAI_CONFIG, head_dim=16)


# Special tokens.


def test_special_tokens__config_knows_the_mask_token_first(tokenizer):
    config = LLaDAConfig(**GSAI_CONFIG | {"embedding_size": len(tokenizer), "vocab_size": len(tokenizer)})
    without = copy.deepcopy(tokenizer)  # as LLaDA's, which names no mask token
    without.mask_token = None
    assert special_tokens(config, without).mask == GSAI_CONFIG["mask_token_id"]
    config.mask_token_id = None
    assert special_tokens(config, tokenizer).mask == tokenizer.mask_token_id


def test_special_tokens__config_and_tokenizer_that_disagree_are_refused(tokenizer):
    config = LLaDAConfig(**GSAI_CONFIG | {"embedding_size": len(tokenizer), "vocab_size": len(tokenizer)})
    assert config.mask_token_id != tokenizer.mask_token_id
    with pytest.raises(
        ValueError, match=f"48 in the config and {tokenizer.mask_token_id} .* in the tokenizer"
    ):
        special_tokens(config, tokenizer)
    config.mask_token_id = tokenizer.mask_token_id
    assert special_tokens(config, tokenizer).mask == tokenizer.mask_token_id


def test_special_tokens__no_mask_token_anywhere_is_refused():
    with pytest.raises(ValueError, match="no mask token"):
        special_tokens(LLaDAConfig(**GSAI_CONFIG | {"mask_token_id": None}))


def test_special_tokens__mask_outside_the_embedding_is_refused():
    with pytest.raises(ValueError, match=r"must be in \[0, 50\), got 50"):
        special_tokens(LLaDAConfig(**GSAI_CONFIG | {"mask_token_id": 50}))


@pytest.mark.parametrize("eos", [50, GSAI_CONFIG["mask_token_id"]])
def test_special_tokens__an_eos_that_cannot_be_one_is_refused(eos):
    with pytest.raises(ValueError, match=rf"EOS id must be in \[0, 50\) and not the .* 48, got {eos}:"):
        special_tokens(LLaDAConfig(**GSAI_CONFIG | {"eos_token_id": eos}))


def test_special_tokens__tokenizer_larger_than_the_embedding_is_refused(tokenizer):
    with pytest.raises(ValueError, match=f"tokenizer has {len(tokenizer)} tokens, the embedding only 50"):
        special_tokens(LLaDAConfig(**GSAI_CONFIG), tokenizer)


def test_create_model__is_a_function_of_the_seed_and_leaves_the_global_generator(tokenizer):
    state = torch.get_rng_state()
    first, again, other = (
        create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, seed=s) for s in (3, 3, 4)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    assert first.config.vocab_size == len(tokenizer)
    assert first.config.mask_token_id == tokenizer.mask_token_id


def test_load_tokenizer__comes_back_from_the_checkpoint_folder(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


# The EOS row. Every LLaDA checkpoint has pad_token_id = eos_token_id, and EOS is an ordinary token of texts.


def eos_gradient(model) -> torch.Tensor:
    """Gradient of the embedding's EOS row when EOS stands around a masked token."""
    eos = GSAI_CONFIG["eos_token_id"]
    ids = torch.tensor([[2, 3, MASK_ID, eos, eos]])
    model(input_ids=ids, rows=torch.tensor([2]), targets=torch.tensor([5])).nll.sum().backward()
    return model.get_input_embeddings().weight.grad[eos]


def is_trained(model) -> bool:
    """Whether the EOS row starts at random, has no padding_idx, and gets a gradient."""
    embedding = model.get_input_embeddings()
    assert embedding.padding_idx is None and model.model.padding_idx is None
    assert embedding.weight.detach().norm(dim=1).min() > 0
    return eos_gradient(model).norm().item() > 1e-3


def test_embedding__eos_row_is_trained_after_construction():
    torch.manual_seed(0)
    assert is_trained(LLaDAForMaskedDiffusion(LLaDAConfig(**GSAI_CONFIG, attn_implementation="vrpo")))


def test_embedding__eos_row_is_trained_after_loading_copying_and_resizing(checkpoint):
    model = load_model(str(checkpoint), dtype="float32")
    assert is_trained(copy.deepcopy(model))
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert is_trained(model)
    assert is_trained(AutoModelForCausalLM.from_pretrained(checkpoint, attn_implementation="vrpo"))


def test_embedding__eos_row_is_trained_in_a_new_model(tokenizer):
    model = create_model(tokenizer, d_model=16, n_layers=1, n_heads=2)
    assert model.config.pad_token_id is not None
    assert model.get_input_embeddings().padding_idx is None
    assert model.get_input_embeddings().weight.norm(dim=1).min() > 0


def test_max_positions__is_the_original_max_sequence_length():
    assert max_positions(LLaDAConfig(**GSAI_CONFIG)) == GSAI_CONFIG["max_sequence_length"]


# Forward.


@pytest.fixture
def scored_pack():
    """A pack of four segments with five masked rows and their targets."""
    inputs = pack(random_segments([6, 6, 3, 9]))
    rows = torch.tensor([0, 4, 7, 12, 20])
    targets = inputs["input_ids"][0, rows]
    inputs["input_ids"][0, rows] = MASK_ID
    return inputs, {"rows": rows, "targets": targets}


def test_forward__a_later_token_changes_an_earlier_output():
    model, ids = tiny_model(), random_segments([10])[0][None]
    before = model(input_ids=ids).logits
    ids[0, 9] = (ids[0, 9] + 1) % 40
    assert ((model(input_ids=ids).logits - before)[0, :9].abs().amax(dim=1) > 1e-3).all()


def test_forward__rows_path_equals_logits_path(scored_pack):
    inputs, scored = scored_pack
    model = tiny_model(dtype=torch.float32)
    logits = model(**inputs).logits[0]
    torch.testing.assert_close(model(**inputs, rows=scored["rows"]).logits, logits[scored["rows"]])
    expected = F.cross_entropy(logits[scored["rows"]], scored["targets"], reduction="none")
    torch.testing.assert_close(model(**inputs, **scored).nll, expected)


def test_forward__rows_come_back_in_the_order_asked_for(scored_pack):
    inputs, scored = scored_pack
    model, order = tiny_model(), torch.tensor([3, 0, 4, 1, 2])
    logits = model(**inputs, rows=scored["rows"]).logits
    torch.testing.assert_close(model(**inputs, rows=scored["rows"][order]).logits, logits[order])


def test_forward__rows_path_gradients_equal_the_logits_path(scored_pack):
    inputs, scored = scored_pack
    model = tiny_model(dtype=torch.float32)
    upstream = torch.tensor([3.0, -0.5, 0.0, 10.0, 1.0])
    logits = model(**inputs).logits[0]
    nll = F.cross_entropy(logits[scored["rows"]], scored["targets"], reduction="none")
    expected = torch.autograd.grad(nll, list(model.parameters()), upstream)
    ours = torch.autograd.grad(model(**inputs, **scored).nll, list(model.parameters()), upstream)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=1e-4)


@pytest.fixture
def padded_batch():
    """Three padded sequences with four masked positions, as rows of the flattened batch."""
    ids = torch.stack([torch.cat([t, t.new_zeros(9 - len(t))]) for t in random_segments([6, 9, 4])])
    rows = torch.tensor([1, 10, 17, 20])
    targets = ids.flatten()[rows]
    ids.flatten()[rows] = MASK_ID
    attend = torch.arange(9) < torch.tensor([[6], [9], [4]])
    return {"input_ids": ids, "attention_mask": attend.long()}, {"rows": rows, "targets": targets}


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("attention", ["vrpo", "sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non-reentrant"])
def test_forward__padded_rows_equal_the_logits_path(padded_batch, attention, checkpointing):
    inputs, scored = padded_batch
    model = tiny_model(attention=attention).train()
    logits = model(**inputs).logits.flatten(0, 1)[scored["rows"]]
    nll = F.cross_entropy(logits, scored["targets"], reduction="none")
    expected = torch.autograd.grad(nll.square().sum(), list(model.parameters()))
    if checkpointing != "none":
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing == "reentrant"})
    model.enable_input_require_grads()
    ours = model(**inputs, **scored).nll
    torch.testing.assert_close(ours, nll)
    ours.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-5 * gradient.abs().max().item(), rtol=0)


@pytest.mark.parametrize("layout", ["pack", "padded"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "LoRA"])
def test_forward__the_last_layer_runs_on_the_rows_alone(scored_pack, padded_batch, layout, adapted):
    """Above its attention; the layers below on every position, and all of them without rows."""
    inputs, scored = scored_pack if layout == "pack" else padded_batch
    model = body = tiny_model()
    if adapted:
        pytest.importorskip("peft")
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    seen = {}
    for index, layer in enumerate(body.model.layers):
        for name in ("self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm", "mlp"):
            layer.get_submodule(name).register_forward_pre_hook(
                lambda _, args, key=(index, name): seen.update({key: args[0].shape[:-1].numel()})
            )
    body.model.norm.register_forward_pre_hook(lambda _, args: seen.update(norm=args[0].shape[:-1].numel()))
    logits = model(**inputs).logits.flatten(0, 1)[scored["rows"]]
    num_tokens, num_rows = inputs["input_ids"].numel(), len(scored["rows"])
    assert set(seen.values()) == {num_tokens}
    torch.testing.assert_close(model(**inputs, rows=scored["rows"]).logits, logits)
    above = {(1, "self_attn.o_proj"), (1, "post_attention_layernorm"), (1, "mlp"), "norm"}
    assert len(seen) == 9
    assert seen == {key: num_rows if key in above else num_tokens for key in seen}


@pytest.mark.parametrize(
    ("order", "trunk_layers"),
    [
        ((0,), 0),
        ((0, 2), 0),
        ((0, 2), 1),
        ((2, 0, 1), 0),
        ((2, 0, 1), 1),
        ((0, 1, 2, 3), 0),
        ((0, 1, 2, 3), 1),
    ],
    ids=str,
)
def test_forward__rows_of_a_model_whose_layers_were_changed(scored_pack, order, trunk_layers):
    """Layers left out, as a pruned model has them, put in another order, or added at the end."""
    inputs, scored = scored_pack
    model = tiny_model(n_layers=3)
    model(**inputs, **scored)
    layers = [*model.model.layers, copy.deepcopy(model.model.layers[1])]
    model.model.layers = torch.nn.ModuleList(layers[index] for index in order)
    model.config.num_hidden_layers = len(order)
    logits = model(**inputs).logits[0, scored["rows"]]
    given = {}
    if trunk_layers:
        trunk = model(**inputs, trunk_layers=trunk_layers).trunk_hidden
        given = {"trunk_layers": trunk_layers, "trunk_hidden": trunk}
    torch.testing.assert_close(model(**inputs, rows=scored["rows"], **given).logits, logits)


@pytest.mark.parametrize("trunk_layers", [0, 1])
def test_forward__rows_of_as_many_layers_as_the_config_says(scored_pack, trunk_layers):
    """transformers runs the lowest config.num_hidden_layers, whatever the model holds."""
    inputs, scored = scored_pack
    model = tiny_model(n_layers=3)
    model.config.num_hidden_layers = 2
    logits = model(**inputs).logits[0, scored["rows"]]
    given = {}
    if trunk_layers:
        given = {"trunk_layers": 1, "trunk_hidden": model(**inputs, trunk_layers=1).trunk_hidden}
    torch.testing.assert_close(model(**inputs, rows=scored["rows"], **given).logits, logits)


def test_forward__without_rows_every_weight_gets_a_gradient_of_zero(scored_pack):
    inputs, _ = scored_pack
    model, none = tiny_model(), torch.zeros(0, dtype=torch.int64)
    nll = model(**inputs, rows=none, targets=none).nll
    assert nll.shape == (0,)
    nll.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_layers__have_the_name_by_which_engines_wrap_them():
    model = tiny_model()
    assert {type(layer).__name__ for layer in model.model.layers} == set(model._no_split_modules)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "autocast"])
def test_forward__same_bits_with_and_without_gradients(scored_pack, mode):
    inputs, scored = scored_pack
    model = tiny_model(dtype=torch.bfloat16 if mode == "bf16" else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
        tracked = model.train()(**inputs, **scored).nll
        with torch.no_grad():
            plain = model.eval()(**inputs, **scored).nll
    assert tracked.requires_grad and tracked.dtype == torch.float32
    assert torch.equal(tracked, plain)


class LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor any operation returned."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return out


def test_forward__scoring_rows_never_forms_logits_of_all_positions():
    vocab, inputs = 2000, pack(random_segments([30] * 4))
    rows = torch.tensor([0, 40, 41, 90])
    model = tiny_model(dtype=torch.float32, embedding_size=vocab, d_model=8, mlp_hidden_size=8)
    with LargestTensor() as full:
        model(**inputs).logits.sum().backward()
    assert full.numel == 120 * vocab
    with LargestTensor() as ours:
        model(**inputs, rows=rows, targets=rows).nll.sum().backward()
    assert ours.numel <= 16 * vocab  # four rows, rounded up to a tile; the head is 8 x V


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
def test_forward__gradient_checkpointing_changes_no_bit(scored_pack):
    inputs, scored = scored_pack
    gradients = []
    for is_checkpointed in (False, True):
        model = tiny_model(dtype=torch.float32).train()
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        nll = model(**inputs, **scored).nll
        gradients.append([nll.detach(), *torch.autograd.grad(nll.sum(), list(model.parameters()))])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"labels": torch.zeros(1, 4)}, "pass rows and targets"),
        ({"use_cache": True}, "use_cache must be False"),
        ({"targets": torch.zeros(1, dtype=torch.int64)}, "targets need rows"),
    ],
    ids=["labels", "use_cache", "targets-without-rows"],
)
def test_forward__refuses_what_would_be_wrong(extra, message):
    with pytest.raises(ValueError, match=message):
        tiny_model()(input_ids=random_segments([4])[0][None], **extra)


def test_generate_method__left_to_right_decoding_is_refused():
    with pytest.raises(TypeError, match=r"use vrpo\.generation\.generate"):
        tiny_model().generate(torch.tensor([[1, 2]]), max_new_tokens=2)


# Adapters.


def with_adapter(model, **options):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options)
    )


def test_lora__switched_off_equals_the_base_model_bitwise(scored_pack):
    pytest.importorskip("peft")
    inputs, scored = scored_pack
    base = tiny_model(dtype=torch.float32)(**inputs, **scored).nll
    adapted = with_adapter(tiny_model(dtype=torch.float32))
    assert not torch.equal(adapted(**inputs, **scored).nll, base)
    with adapted.disable_adapter():
        assert torch.equal(adapted(**inputs, **scored).nll, base)


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
def test_resize_token_embeddings__keeps_the_fused_head(scored_pack, tied):
    inputs, scored = scored_pack
    model = tiny_model(weight_tying=tied)
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    logits = model(**inputs, rows=scored["rows"]).logits
    assert logits.shape[1] == VOCAB + 6
    expected = F.cross_entropy(logits, scored["targets"], reduction="none")
    torch.testing.assert_close(model(**inputs, **scored).nll.double(), expected, rtol=1e-6, atol=1e-6)


def test_lora__a_fully_trained_head_gets_a_gradient(scored_pack):
    pytest.importorskip("peft")
    inputs, scored = scored_pack
    adapted = with_adapter(tiny_model(dtype=torch.float32), modules_to_save=["lm_head"])
    adapted(**inputs, **scored).nll.sum().backward()
    head = adapted.base_model.model.lm_head.modules_to_save["default"]
    assert head.weight.grad.shape == (VOCAB, 32) and head.weight.grad.abs().sum() > 0
    assert adapted.base_model.model.lm_head.original_module.weight.grad is None


def test_lora__on_the_head_is_refused(scored_pack):
    pytest.importorskip("peft")
    from peft import LoraConfig, get_peft_model

    inputs, scored = scored_pack
    adapted = get_peft_model(tiny_model(dtype=torch.float32), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="an adapter on lm_head would be bypassed"):
        adapted(**inputs, **scored)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing__gives_frozen_layers_no_graph_unless_it_needs_one(reentrant):
    model = tiny_model(n_layers=2)
    train_top_layers(model, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # the name changed in transformers 5.23
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    seen = []
    model.model.layers[0].register_forward_hook(lambda *found: seen.append(found[2].requires_grad))
    hidden = model.model(torch.arange(12)[None]).last_hidden_state
    hidden.sum().backward()
    assert seen == [reentrant]
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().max() > 0
