"""Loading: every broken file, and every weight that is no number, is one line that names it."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packs import tiny_model
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, TrainingArguments

from vrpo.models import load_model, load_tokenizer
from vrpo.models.files import check_weight_files, why_unsupported
from vrpo.training.checks import check_model

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


@pytest.fixture
def sharded(tmp_path) -> Path:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert (tmp_path / "sharded" / INDEX).is_file()
    return tmp_path / "sharded"


def refusal(folder, *names, error_type=(ValueError, OSError)) -> str:
    """What load_model says, which must be one line with all these names in it."""
    with pytest.raises(error_type) as error:
        load_model(str(folder))
    message = str(error.value)
    assert len(message.splitlines()) == 1
    for name in names:
        assert name in message, message
    return message


def edit(path: Path, change) -> None:
    path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    "change",
    [
        lambda b: b"",
        lambda b: b[:4],
        lambda b: b[:100],
        lambda b: b[:-1],
        lambda b: b + b"0",
        lambda b: b"x" * 500,
    ],
    ids=["empty", "no-header", "half-header", "one-byte-short", "one-byte-long", "other"],
)
def test_load_model__cut_or_corrupt_weights_are_named(folder, change):
    edit(folder / WEIGHTS, change)
    refusal(folder, str(folder / WEIGHTS), error_type=ValueError)


def test_load_model__a_shard_that_is_cut_or_absent_is_named(sharded):
    assert load_model(str(sharded)) is not None
    shard = sorted(sharded.glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    edit(shard, lambda b: b[:-7])
    refusal(sharded, str(shard), error_type=ValueError)
    shard.unlink()
    refusal(sharded, INDEX, shard.name, error_type=OSError)
    shard.mkdir()
    refusal(sharded, shard.name)
    shard.rmdir()
    shard.write_bytes(content)
    tensors = load_file(shard)
    lost = min(tensors)
    del tensors[lost]
    save_file(tensors, shard, {"format": "pt"})
    refusal(sharded, str(shard), lost, error_type=ValueError)


@pytest.mark.parametrize(
    "index",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../x"}}',
        "{",
    ],
)
def test_load_model__a_broken_index_is_named(sharded, index):
    (sharded / INDEX).write_text(index)
    refusal(sharded, INDEX)


def test_load_model__a_folder_without_weights_says_so(folder):
    (folder / WEIGHTS).unlink()
    refusal(folder, str(folder), "no weights", error_type=OSError)


class Payload:
    """Unpickling it writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_load_model__pickled_weights_are_refused_and_never_unpickled(folder, tmp_path, name):
    (folder / WEIGHTS).unlink()
    with (folder / name).open("wb") as file:
        pickle.dump(Payload(tmp_path / "ran"), file)
    refusal(folder, name, "not read", error_type=ValueError)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_load_model__weights_that_are_no_numbers_are_named(folder, value, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(folder / WEIGHTS).items()}
    bad = ["model.transformer.blocks.1.q_proj.weight", "model.transformer.ln_f.weight"]
    for name in bad:
        tensors[name].view(-1)[-1] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    refusal(folder, str(folder), "NaN or infinite", *bad, error_type=ValueError)


def test_load_model__weights_too_large_for_the_dtype_asked_for_are_named(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["model.transformer.wte.weight"][3, 3] = 1e6
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    assert load_model(str(folder)).dtype == torch.float32
    with pytest.raises(ValueError, match=r"infinite weights: model\.transformer\.wte\.weight"):
        load_model(str(folder), dtype="float16")


def test_load_model__misshapen_weights_are_one_line(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"mlp_hidden_size": 40}))
    refusal(folder, "mismatched_keys", "gate_proj", error_type=ValueError)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_check_weight_files__any_damage_to_the_header_is_found_or_harmless(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    path = folder / WEIGHTS
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 3)}, path)
    content = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content = content[:position]
    else:
        content[position] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        check_weight_files(folder)
    except (ValueError, OSError) as error:
        assert str(path) in str(error) and len(str(error).splitlines()) == 1


# Tokenizers.


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", "{", '{"model": 3}'], ids=repr)
def test_load_tokenizer__broken_files_are_one_line(tokenizer, tmp_path, content):
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises((ValueError, OSError)) as error:
        load_tokenizer(str(tmp_path))
    assert len(str(error.value).splitlines()) == 1 and str(tmp_path) in str(error.value)


def test_load_tokenizer__code_of_its_own_is_refused_without_advice_that_does_not_exist(tmp_path):
    config = {"auto_map": {"AutoTokenizer": ["tokenization_dream.DreamTokenizer", None]}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "Dream"}))
    with pytest.raises(ValueError, match="code of its own, which is never run") as error:
        load_tokenizer(str(tmp_path))
    assert "trust_remote_code" not in str(error.value)


# What a foreign model is told in Python.


def test_check_model__says_causal_of_causal_models_only():
    causal = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=10))
    with pytest.raises(ValueError, match=r"got GPT2LMHeadModel\. A causal language model cannot"):
        check_model(causal, TrainingArguments(use_cpu=True))
    with pytest.raises(ValueError, match=r"got Linear\. This version does not know"):
        check_model(torch.nn.Linear(2, 2), TrainingArguments(use_cpu=True))
    assert "load_model" in why_unsupported(
        {"model_type": "llada", "auto_map": {"AutoModel": "x.LLaDAModelLM"}}
    )


# A fresh process.


SCRIPT = """
import sys, torch, vrpo.models
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
print(type(AutoConfig.from_pretrained(sys.argv[1])).__name__)
for auto_class in (AutoModel, AutoModelForCausalLM):
    model = auto_class.from_pretrained(sys.argv[1])
    print(type(model).__name__, model(input_ids=torch.arange(5)[None]).logits.double().sum().item())
"""


def test_import__one_line_lets_transformers_load_what_we_saved(folder):
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    config, *models = done.stdout.split()
    assert config == "LLaDAConfig" and models[::2] == ["LLaDAForMaskedDiffusion"] * 2
    expected = load_model(str(folder))(input_ids=torch.arange(5)[None]).logits.double().sum().item()
    assert [float(total) for total in models[1::2]] == pytest.approx([expected] * 2, rel=1e-6)


def test_load_model__a_head_of_its_own_contradicts_weight_tying(folder):
    settings_of = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings_of | {"weight_tying": True}))
    refusal(folder, str(folder), "weight_tying is true")
    tensors = load_file(folder / WEIGHTS)
    tensors["model.transformer.ff_out.weight"] = tensors["model.transformer.wte.weight"].clone()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    model = load_model(str(folder))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_load_tokenizer__a_folder_without_one_is_named(tiny_model, tokenizer, tmp_path):
    tiny_model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds no tokenizer: save it beside the model"):
        load_tokenizer(str(tmp_path))
    tokenizer.save_pretrained(tmp_path)
    assert len(load_tokenizer(str(tmp_path))) == len(tokenizer)
