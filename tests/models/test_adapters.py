"""Adapters between LLaDA's class and ours, both ways, and every way of opening their folders."""

import json
import shutil

import pytest
import torch
from original_llada import OriginalLLaDA
from packs import tiny_model
from peft import (
    AutoPeftModelForCausalLM,
    FourierFTConfig,
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    RandLoraConfig,
    TrainableTokensConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from vrpo.models import create_model, load_model
from vrpo.models.adapters import (
    add_adapter,
    equals_its_base,
    load_adapter,
    load_adapter_weights,
    rename_saved_adapters,
)
from vrpo.models.base import is_saved, keep_base
from vrpo.models.checkpoint import load_policy
from vrpo.models.names import CHECKPOINT_RENAMINGS, is_original, layers, to_here, to_original

IDS = torch.arange(2, 26).view(2, 12)
ALL = ["q_proj", "k_proj", "v_proj", "attn_out", "ff_proj", "up_proj", "ff_out"]


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    return folder


def stir(model, seed=0):
    """Random values into everything that is trainable, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def logits(model):
    with torch.no_grad():
        output = model(input_ids=IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_close(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=3e-5 * b.abs().max().item())


def saved_by_us(base, folder, config, **how):
    model = stir(add_adapter(load_model(str(base)), config, seed=1))
    model.save_pretrained(folder, **how)
    rename_saved_adapters(model, folder)
    return model


def saved_by_the_original(base, folder, config):
    model = stir(get_peft_model(OriginalLLaDA(base), config))
    model.save_pretrained(folder)
    return model


# Names.


def test_names__every_layer_translates_and_back():
    for layer in layers(12):
        assert to_here(layer.original) == layer.here and to_original(layer.here) == layer.original
        assert to_here(layer.here) == layer.here  # twice does nothing
        name = f"{layer.original}.lora_A.weight"
        assert to_original(to_here(name)) == name and is_original(name) and not is_original(to_here(name))
    assert len(CHECKPOINT_RENAMINGS) == 12


def test_names__similar_names_are_left_alone():
    for name in ("model.transformer.wte2", "lm_head_2.weight", "model.layers.x.mlp.up_proj", "ff_out"):
        assert to_here(name) == name and to_original(name) == name


# Interchange.

CONFIGS = {
    "attention": dict(target_modules=["q_proj", "k_proj", "v_proj"]),
    "every linear": dict(target_modules=ALL, exclude_modules=["model.transformer.ff_out"]),
    "feed-forward": dict(target_modules=["ff_proj", "up_proj", "attn_out"], use_rslora=True),
    "regex": dict(target_modules=r".*blocks\.1\.(q_proj|ff_out)"),
    "two blocks": dict(
        target_modules=["q_proj", "ff_proj"], layers_to_transform=[1], layers_pattern="blocks"
    ),
    "ranks": dict(
        target_modules=["q_proj", "attn_out", "ff_proj"],
        rank_pattern={"attn_out": 2, r"blocks\.0\.ff_proj": 3},
        alpha_pattern={"ff_proj": 32, r"1\.q_proj": 5},
    ),
    "dora": dict(target_modules=["q_proj", "ff_proj"], use_dora=True),
    "bias": dict(target_modules=["q_proj", "attn_out"], bias="lora_only"),
    "head whole": dict(target_modules=["q_proj"], modules_to_save=["model.transformer.ff_out"]),
    "embedding whole": dict(target_modules=["attn_out"], modules_to_save=["wte", "ln_f"]),
    "embedding": dict(target_modules=["wte", "v_proj"]),
    "tokens": dict(target_modules=["v_proj"], trainable_token_indices=[3, 5]),
    "tokens by name": dict(target_modules=["v_proj"], trainable_token_indices={"wte": [3, 5]}),
}


def lora(options):
    return LoraConfig(r=4, lora_alpha=16, **options)


@pytest.mark.parametrize("name", CONFIGS)
def test_load_adapter__one_of_the_original_class_does_the_same_here(base, tmp_path, name):
    there = saved_by_the_original(base, tmp_path, lora(CONFIGS[name]))
    model = load_model(str(base))
    assert_close(logits(model), logits(OriginalLLaDA(base)))
    assert (logits(model) - logits(there)).abs().max() > 0.1  # the adapter matters
    assert_close(logits(load_adapter(model, tmp_path)), logits(there))
    assert_close(logits(load_policy(str(tmp_path))), logits(there))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_rename_saved_adapters__ours_does_the_same_in_the_original_class(base, tmp_path, name):
    here = saved_by_us(base, tmp_path, lora(CONFIGS[name]))
    names = set(load_file(tmp_path / "adapter_model.safetensors"))
    assert all(is_original(n.removeprefix("base_model.model.")) for n in names)
    there = PeftModel.from_pretrained(OriginalLLaDA(base), tmp_path)  # a missing weight would warn
    assert_close(logits(there), logits(here))
    assert not (there.load_adapter(tmp_path, "default").unexpected_keys)
    assert_close(logits(load_adapter(load_model(str(base)), tmp_path)), logits(here))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
def test_saved_adapter__opens_through_peft_and_transformers_too(base, tmp_path, name):
    here = saved_by_us(base, tmp_path, lora(CONFIGS[name]))
    assert_close(logits(PeftModel.from_pretrained(load_model(str(base)), tmp_path)), logits(here))
    assert_close(logits(AutoPeftModelForCausalLM.from_pretrained(tmp_path)), logits(here))


def test_saved_adapter__opens_through_auto_model(base, tmp_path):
    here = saved_by_us(base, tmp_path, lora(CONFIGS["every linear"] | {"modules_to_save": ["lm_head"]}))
    assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(here))


@pytest.mark.filterwarnings("ignore:.*RandLora:UserWarning")
def test_saved_adapter__with_matrices_that_layers_share_opens(base, tmp_path):
    here = saved_by_us(base, tmp_path, RandLoraConfig(r=2, target_modules=["q_proj"]))
    assert_close(logits(load_policy(str(tmp_path))), logits(here))


def test_load_adapter__equals_adding_b_times_a(base, tmp_path):
    # No PEFT on the other side: W + alpha / r * B A by hand.
    saved_by_the_original(base, tmp_path, lora(dict(target_modules=ALL)))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    plain = OriginalLLaDA(base)
    with torch.no_grad():
        for name in [n for n in tensors if "lora_A" in n]:
            layer = plain.get_submodule(name.removeprefix("base_model.model.").removesuffix(".lora_A.weight"))
            layer.weight += 4 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
    assert "base_model.model.model.transformer.ff_out.lora_A.weight" in tensors  # the head has one too
    assert_close(logits(load_policy(str(tmp_path))), logits(plain))


@pytest.mark.parametrize(
    "form", ["default in the name", "no prefix", "pickled", "module names", "old magnitude"]
)
def test_load_adapter__reads_what_other_versions_write(base, tmp_path, form):
    here = saved_by_us(
        base, tmp_path, LoraConfig(r=4, use_dora=True, target_modules=ALL[:-1], modules_to_save=["lm_head"])
    )
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    if form == "default in the name":
        tensors = {
            n.replace("lora_A.", "lora_A.default.").replace(
                "ff_out.weight", "ff_out.modules_to_save.default.weight"
            ): t
            for n, t in tensors.items()
        }
    elif form == "no prefix":
        tensors = {n.removeprefix("base_model.model."): t for n, t in tensors.items()}
    elif form == "module names":  # and config, as older versions of this package saved
        here.save_pretrained(tmp_path)
        tensors = load_file(file)
        assert not any("transformer" in n for n in tensors)
    elif form == "old magnitude":
        tensors = {n.replace("magnitude_vector", "magnitude_vector.weight"): t for n, t in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})
    if form == "pickled":
        file.unlink()
        torch.save(tensors, tmp_path / "adapter_model.bin")
    assert_close(logits(load_policy(str(tmp_path))), logits(here))


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter .default.*LoRA tensor")
def test_load_adapter__bias_of_lora_loads_but_cannot_be_merged(base, tmp_path):
    config = lora(dict(target_modules=["q_proj", "attn_out"], lora_bias=True))
    there = saved_by_the_original(base, tmp_path, config)
    assert_close(logits(load_adapter(load_model(str(base)), tmp_path)), logits(there))
    assert "lora_bias=True cannot be merged" in error_of(load_policy, str(tmp_path))
    assert "lora_bias=True cannot be merged" in error_of(
        lambda: add_adapter(load_model(str(base)), config, seed=0)
    )


def test_load_adapter__names_that_only_llama_has_select_nothing_in_llada(base, tmp_path):
    # Recipes copied from Llama list layers that LLaDA has not; the file then has no weights for them.
    there = saved_by_the_original(
        base, tmp_path, lora(dict(target_modules=["q_proj", "o_proj", "gate_proj"]))
    )
    assert_close(logits(load_adapter(load_model(str(base)), tmp_path)), logits(there))


def test_load_adapter__leaves_the_random_state(base, tmp_path):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    model, before = load_model(str(base)), torch.get_rng_state()
    load_adapter(model, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


# What does not fit is an error.


def change(folder, edit):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def error_of(call, *args):
    with pytest.raises(ValueError) as caught:
        call(*args)
    return " ".join(str(caught.value).split())


PREFIX = "base_model.model.model.transformer.blocks.0"


def test_load_adapter__a_key_that_fits_nothing_is_named(base, tmp_path):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    change(tmp_path, lambda t: t.update({f"{PREFIX}.ff_proj.lora_A.weight": torch.ones(4, 32)}))
    message = error_of(load_policy, str(tmp_path))
    assert f"{PREFIX}.ff_proj.lora_A.weight" in message and str(tmp_path) in message
    # PEFT's own way ignores such keys; the model's hook does not.
    assert "mlp.gate_proj.lora_A" in error_of(PeftModel.from_pretrained, load_model(str(base)), tmp_path)


def test_load_adapter__a_layer_without_weights_is_named(base, tmp_path):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    change(tmp_path, lambda t: t.pop(f"{PREFIX}.q_proj.lora_B.weight"))
    message = error_of(load_policy, str(tmp_path))
    assert "missing: model.transformer.blocks.0.q_proj.lora_B" in message.replace("base_model.model.", "")


def test_load_adapter__a_wrong_shape_is_named(base, tmp_path):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    change(tmp_path, lambda t: t.update({f"{PREFIX}.q_proj.lora_A.weight": torch.ones(3, 32)}))
    assert f"{PREFIX}.q_proj.lora_A.weight (3, 32) instead of (4, 32)" in error_of(load_policy, str(tmp_path))


def test_peft_model__an_adapter_with_names_peft_cannot_find_is_refused(base, tmp_path):
    # Written by the original class, so its config has no name of ours: PEFT puts nothing on gate_proj.
    saved_by_the_original(base, tmp_path, lora(CONFIGS["feed-forward"]))
    message = error_of(PeftModel.from_pretrained, load_model(str(base)), tmp_path)
    assert "load_adapter reads adapters that name layers as LLaDA does" in message


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("adapter_config.json", b"{"),
        ("adapter_config.json", b"null"),
        ("adapter_config.json", b'{"peft_type": "LORE"}'),
        ("adapter_config.json", b'{"peft_type": ["LORA"]}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": 3}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "r": "four", "target_modules": ["q_proj"]}'),
        ("adapter_config.json", b'{"peft_type": "LORA", "base_model_name_or_path": "/no/such/base"}'),
        ("adapter_config.json", b'{"peft_type": "LORA"}'),
        ("adapter_config.json", "{}".encode("utf-16")),
        ("adapter_config.json", b"[" * 100_000),
        ("adapter_model.safetensors", b""),
        ("adapter_model.safetensors", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      "),
        ("adapter_model.safetensors", None),
    ],
)
def test_load_policy__a_broken_file_is_named(base, tmp_path, name, content):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    file = tmp_path / name
    file.write_bytes(file.read_bytes()[:100] if content is None else content)
    message = error_of(load_policy, str(tmp_path))
    assert str(tmp_path) in message and len(message) < 600


def test_load_policy__missing_weights_are_named(base, tmp_path):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "no adapter_model.safetensors" in error_of(load_policy, str(tmp_path))


def test_load_policy__peft_missing_is_told(base, tmp_path, monkeypatch):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    monkeypatch.setattr("vrpo.models.adapter_config.is_peft_available", lambda: False)
    assert "pip install 'vrpo[peft]'" in error_of(load_policy, str(tmp_path))


def test_load_policy__adapters_in_subfolders_are_named(base, tmp_path):
    saved_by_us(base, tmp_path / "second", lora(CONFIGS["attention"]))
    assert "subfolders only (second)" in error_of(load_policy, str(tmp_path))


def test_load_policy__a_base_that_moved_with_the_adapter_is_found(base, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(base, first / "base_model")
    here = saved_by_us(first / "base_model", first, lora(CONFIGS["attention"]))
    first.rename(tmp_path / "second")
    assert_close(logits(load_policy(str(tmp_path / "second"))), logits(here))


def test_load_policy__prompts_cannot_be_merged(base, tmp_path):
    saved_by_us(base, tmp_path, lora(CONFIGS["attention"]))
    config = {"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "base_model_name_or_path": str(base)}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert "PROMPT_TUNING are not supported" in error_of(load_policy, str(tmp_path))


# Merging.


def test_load_policy__merged_saves_a_checkpoint_without_adapter(base, tmp_path):
    here = saved_by_us(base, tmp_path / "adapter", lora(CONFIGS["every linear"]))
    load_policy(str(tmp_path / "adapter")).save_pretrained(tmp_path / "merged")
    assert_close(logits(load_model(str(tmp_path / "merged"))), logits(here))
    assert_close(logits(OriginalLLaDA(tmp_path / "merged")), logits(here))


# New adapters.


def test_add_adapter__is_a_function_of_its_seed_and_leaves_the_random_state(base):
    def drawn(seed, noise):
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        model = add_adapter(load_model(str(base)), lora(CONFIGS["attention"]), seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        return torch.cat([p.flatten() for n, p in model.named_parameters() if "lora_A" in n])

    assert torch.equal(drawn(3, noise=1), drawn(3, noise=2))
    assert not torch.equal(drawn(3, noise=1), drawn(4, noise=1))


@pytest.mark.parametrize(
    ("given", "layer"),
    [
        (["attn_out"], "o_proj"),
        (["o_proj"], "o_proj"),
        (["ff_proj"], "gate_proj"),
        (["gate_proj", "ff_proj"], "gate_proj"),
        (r".*blocks\..*attn_out", "o_proj"),
        (["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"], "down_proj"),
    ],
)
def test_add_adapter__takes_both_kinds_of_names(base, given, layer):
    config = lora(dict(target_modules=given))
    model = add_adapter(load_model(str(base)), config, seed=0)
    adapted = {n.split(".lora_")[0].rpartition(".")[2] for n, _ in model.named_parameters() if "lora_" in n}
    assert adapted == {layer}
    assert set(config.target_modules) == set(given)  # the caller's config is not changed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (dict(target_modules=["q_proj", "qq_proj"]), "'qq_proj' fits no layer; there are model.embed_tokens"),
        (dict(target_modules="qq.*"), "'qq.*' fits no layer"),
        (dict(target_modules=["q_proj"], modules_to_save=["heed"]), "'heed' fits no layer"),
        (dict(target_modules=["q_proj"], rank_pattern={"z_proj": 2}), "'z_proj' fits no layer"),
        (dict(target_modules=["q_proj"], trainable_token_indices={"emb": [1]}), "'emb' fits no layer"),
        (dict(target_modules=["lm_head"]), "selects the head"),
        (dict(target_modules=["q_proj", "ff_out"]), "name down_proj for the ff_out of the blocks"),
        (dict(target_modules=["q_proj"], layers_to_transform=[7]), "leave no layer"),
        (dict(target_modules=["q_proj"], init_lora_weights="pissa"), "changes the base model"),
        (dict(target_modules=["q_proj"], layer_replication=[[0, 2]]), "layer_replication is not supported"),
    ],
)
def test_add_adapter__what_cannot_be_trained_is_refused(base, options, told):
    assert told in error_of(lambda: add_adapter(load_model(str(base)), lora(options), seed=0))


@pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning")
@pytest.mark.parametrize("options", [{"target_modules": ["wte"]}, {"trainable_token_indices": [5, 6]}])
def test_add_adapter__on_an_embedding_that_is_the_head_is_refused(base, tokenizer, tmp_path, options):
    sizes = dict(d_model=16, n_layers=2, n_heads=2)
    tied = create_model(tokenizer, weight_tying=True, **sizes)
    config = lora({"target_modules": ["q_proj"], **options})
    assert "cannot be merged" in error_of(lambda: add_adapter(tied, config, seed=0))
    add_adapter(create_model(tokenizer, **sizes), config, seed=0)
    # One that PEFT made without us.
    tied.save_pretrained(tmp_path / "tied")
    here = {"target_modules": ["embed_tokens"]} if "target_modules" in options else options
    model = get_peft_model(tied, lora({"target_modules": ["q_proj"], **here}))
    model.peft_config["default"].base_model_name_or_path = str(tmp_path / "tied")
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert "cannot be merged" in error_of(lambda: load_policy(str(tmp_path / "adapter")))


def test_add_adapter__prompt_tuning_is_refused(base):
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    assert "not supported" in error_of(lambda: add_adapter(load_model(str(base)), config, seed=0))


KINDS = {
    "lora": LoraConfig(r=2, target_modules="all-linear"),
    "dora": LoraConfig(r=2, target_modules="all-linear", use_dora=True),
    "embedding": LoraConfig(r=2, target_modules=["embed_tokens"]),
    "modules": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[7, 9]),
    "only tokens": TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=[7, 9]),
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "lokr": LoKrConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "oft": OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj", "ff_proj"]),
    "vera": VeraConfig(r=2, target_modules=["q_proj", "o_proj"]),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    "fourier": FourierFTConfig(n_frequency=20, target_modules=["q_proj", "o_proj"], init_weights=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # norms, in PEFT's own tuner
def test_equals_its_base__tells_new_from_trained_whatever_the_kind(base, tmp_path, kind):
    model = add_adapter(load_model(str(base)), KINDS[kind], seed=0)
    assert equals_its_base(model)
    stir(model)
    assert not equals_its_base(model)
    model.save_pretrained(tmp_path)
    rename_saved_adapters(model, tmp_path)
    assert_close(logits(load_adapter(load_model(str(base)), tmp_path)), logits(model))
    assert_close(logits(load_policy(str(tmp_path))), logits(model))


@pytest.mark.parametrize("kind", ["modules", "tokens", "only tokens", "embedding"])
def test_equals_its_base__one_changed_row_of_one_token_is_seen(base, kind):
    model = add_adapter(load_model(str(base)), KINDS[kind], seed=0)
    for name, parameter in model.named_parameters():
        if kind == "modules" and "embed_tokens.modules_to_save" in name:
            parameter.data[7] += 1e-3  # a token that the probe of the whole model does not hold
        elif "trainable_tokens_delta" in name:
            parameter.data[0] += 1e-3
        elif "lora_embedding_A" in name:
            parameter.data[:, 7] += 1e-3
    assert not equals_its_base(model)


def test_equals_its_base__compiled_layers_are_asked_uncompiled(base):
    """What a compiler fuses it rounds in another way, with the adapter and without it."""
    calls = []

    def rounding_anew(graph, _):
        def run(*inputs):
            calls.append(graph)
            return [x * (1 + 1e-6 * len(calls)) if torch.is_tensor(x) else x for x in graph(*inputs)]

        return run

    model = add_adapter(load_model(str(base)), KINDS["lora"], seed=0)
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=rounding_anew)
    assert equals_its_base(model) and not calls
    assert not torch.equal(logits(model), logits(model)), "the layers are still compiled"
    stir(model)
    assert not equals_its_base(model)


# The base of an adapter.


@pytest.mark.parametrize("tied", [False, True])
def test_keep_base__knows_a_base_that_is_on_disk(tmp_path, tied):
    model = tiny_model(dtype=torch.float32, weight_tying=tied)
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    wrapped = add_adapter(load_model(str(tmp_path / "base")), lora(CONFIGS["attention"]), seed=0)
    assert is_saved(wrapped, str(tmp_path / "base"))
    assert keep_base(wrapped, None, tmp_path) == tmp_path / "base"
    stir(wrapped)
    assert is_saved(wrapped, str(tmp_path / "base"))  # it is the base that is asked
    wrapped.get_base_model().model.layers[1].mlp.up_proj.weight.data[0, 0] += 1e-3
    assert not is_saved(wrapped, str(tmp_path / "base"))
    folder = keep_base(wrapped, None, tmp_path)
    assert folder == tmp_path / "base_model" and is_saved(wrapped, str(folder))
    with wrapped.disable_adapter():
        assert torch.equal(logits(load_model(str(folder))), logits(wrapped))


def test_is_saved__compares_in_the_dtype_of_the_base(base):
    wrapped = add_adapter(load_model(str(base), dtype="bfloat16"), lora(CONFIGS["attention"]), seed=0)
    assert is_saved(wrapped, str(base))


def test_keep_base__writes_a_new_model_and_a_resized_one(base, tmp_path):
    new = add_adapter(tiny_model(dtype=torch.float32), lora(CONFIGS["attention"]), seed=0)
    assert keep_base(new, None, tmp_path / "new") == tmp_path / "new" / "base_model"
    resized = load_model(str(base))
    resized.resize_token_embeddings(57, mean_resizing=False)
    wrapped = add_adapter(resized, lora(CONFIGS["attention"]), seed=0)
    folder = keep_base(wrapped, None, tmp_path / "resized")
    assert load_model(str(folder)).config.vocab_size == 57


def test_load_adapter__resizes_to_an_embedding_that_peft_saved(base, tmp_path):
    # What older versions wrote after tokens were added: the adapter with both embeddings, and a smaller base.
    resized = load_model(str(base))
    resized.resize_token_embeddings(57, mean_resizing=False)
    nn.init.normal_(resized.lm_head.weight)
    model = stir(add_adapter(resized, lora(CONFIGS["attention"]), seed=0))
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert logits(model).shape[-1] == 57
    assert torch.equal(logits(load_adapter(load_model(str(base)), tmp_path)), logits(model))
    assert load_policy(str(tmp_path)).config.vocab_size == 57


def test_load_adapter_weights__fills_the_adapter_it_is_told(base, tmp_path):
    model = stir(add_adapter(load_model(str(base)), lora(CONFIGS["every linear"]), seed=0))
    model.save_pretrained(tmp_path)
    rename_saved_adapters(model, tmp_path)
    fresh = add_adapter(load_model(str(base)), lora(CONFIGS["every linear"]), seed=9)
    load_adapter_weights(fresh, tmp_path)
    assert torch.equal(logits(fresh), logits(model))
