"""What the sampler refuses, before it computes anything, and what it takes."""

import math

import numpy as np
import pytest
import torch
from packs import MASK_ID, VOCAB, tiny_model
from torch import nn

from vrpo.generation import SamplerConfig, generate


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def decode(model, config, prompts, **options):
    return generate(model, prompts, config, **{"mask_token_id": MASK_ID, "progress": False} | options)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, r"a prompt is empty \(prompt 1\)"),
        ([[1], [1] * 60], {}, "prompt 1 .* need 72 tokens, the model has positions for 64"),
        ([[1], [2]], {"sample_ids": [1]}, "2 prompts need as many sample_ids, got 1"),
        ([[1]], {"sample_ids": [-1]}, "sample_ids must be in"),
        ([[1]], {"sample_ids": [2**32]}, "sample_ids must be in"),
        ([[1]], {"sample_ids": [0.5]}, "sample_ids must be an integer, got 0.5"),
        ([[1]], {"sample_ids": 3}, "sample_ids must be a sequence of integers, got 3"),
        ([[1]], {"seed": -1}, "seed must be in"),
        ([[1]], {"seed": 2**64}, "seed must be in"),
        ([[1]], {"seed": 1.5}, "seed must be an integer, got 1.5"),
        ([[1]], {"seed": None}, "seed must be an integer, got None"),
        ([[1]], {"max_pack_tokens": 0}, "max_pack_tokens must be at least 1"),
        ([[1]], {"max_pack_tokens": "9"}, "max_pack_tokens must be an integer, got '9'"),
        ([[1]], {"mask_token_id": -1}, "mask_token_id must be at least 0"),
        ([[1]], {"mask_token_id": VOCAB}, "mask_token_id has the id 50, the model knows ids below 50"),
        ([[1]], {"mask_token_id": None}, "mask_token_id must be an integer, got None"),
        ([[1], [2, VOCAB]], {}, "prompt 1 has the id 50, the model knows ids below 50"),
        ([[1], [2, -3]], {}, "prompt 1 has a negative id: -3"),
        ([[1], "two"], {}, "prompt 1 must be token ids, got text: 'two'; apply the tokenizer first"),
        ("one", {}, "prompts must be a sequence of token lists, got 'one'"),
        ({"input_ids": [[1]]}, {}, "prompts must be a sequence of token lists"),
        (None, {}, "prompts must be a sequence of token lists, got None"),
        (5, {}, "prompts must be a sequence of token lists, got 5"),
        ([1, 2], {}, "prompt 0 must be a flat sequence of token ids, got 1"),
        ([[1], None], {}, "prompt 1 must be a sequence of token ids, got NoneType"),
        ([[1], {"input_ids": [2]}], {}, "prompt 1 must be a sequence of token ids, got dict"),
        ([[[1, 2]]], {}, "prompt 0 must be a flat sequence"),
        ([[1, [2]]], {}, "prompt 0 must be a sequence of token ids"),
        ([[1.0, 2.0]], {}, "prompt 0 must be integers"),
        ([[True]], {}, "prompt 0 must be integers"),
        ([["1"]], {}, "prompt 0 must be a sequence of token ids"),
        ([[None]], {}, "prompt 0 must be a sequence of token ids"),
        ([[2**70]], {}, "prompt 0 must be a sequence of token ids"),
        ([np.array([1.5])], {}, "prompt 0 must be integers"),
        (torch.tensor(3), {}, "prompts must be a sequence"),
        (torch.tensor([3]), {}, "prompt 0 must be a flat sequence"),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow")
def test_generate__refuses_bad_input(model, prompts, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        decode(model, SamplerConfig(12), prompts, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"suppress_ids": (3, VOCAB)}, "suppress_ids has the id 50, the model knows ids below 50"),
        ({"defer_ids": (99,)}, "defer_ids has the id 99"),
        ({"stop_ids": (2**40,)}, "stop_ids has the id"),
        ({"stop_ids": (1, MASK_ID)}, "stop_ids have the mask token 48"),
        ({"suppress_ids": range(VOCAB)}, "leave no token to produce"),
        ({"suppress_ids": [i for i in range(VOCAB) if i != MASK_ID]}, "leave no token to produce"),
    ],
)
def test_generate__refuses_ids_that_do_not_fit_the_model(model, fields, message):
    with pytest.raises(ValueError, match=message):
        decode(model, SamplerConfig(4, **fields), [[1]])


@pytest.mark.parametrize(
    "prompts",
    [
        ((1, 2, 3), range(4, 6)),
        [torch.tensor([1, 2, 3]), torch.tensor([4, 5], dtype=torch.int32)],
        [np.array([1, 2, 3]), np.array([4, 5], dtype=np.uint16)],
        (iter([[1, 2, 3], [4, 5]])),
    ],
    ids=["tuple", "tensors", "arrays", "iterator"],
)
def test_generate__takes_ids_in_any_container(model, prompts):
    expected = decode(model, SamplerConfig(4), [[1, 2, 3], [4, 5]])
    assert torch.equal(decode(model, SamplerConfig(4), prompts), expected)


def test_generate__takes_the_rows_of_a_matrix(model):
    rows = [[1, 2, 3], [4, 5, 6]]
    expected = decode(model, SamplerConfig(4), rows)
    for matrix in (torch.tensor(rows), np.array(rows)):
        assert torch.equal(decode(model, SamplerConfig(4), matrix), expected)


def test_generate__all_tokens_but_one_may_be_suppressed(model):
    config = SamplerConfig(4, suppress_ids=[i for i in range(VOCAB) if i != 7], temperature=1.0)
    assert decode(model, config, [[1]]).tolist() == [[7] * 4]


class Wrapper(nn.Module):
    """Like DistributedDataParallel: no config of its own."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **kwargs):
        return self.module(**kwargs)


def peft_wrapped(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny_model(), peft.LoraConfig(target_modules=["q_proj"]))


@pytest.mark.parametrize("wrap", [Wrapper, peft_wrapped], ids=["module", "peft"])
def test_generate__a_wrapped_model_has_the_limits_of_its_model(model, wrap):
    wrapped = wrap(model)
    with pytest.raises(ValueError, match="need 72 tokens, the model has positions for 64"):
        decode(wrapped, SamplerConfig(12), [[1] * 60])
    with pytest.raises(ValueError, match="prompt 0 has the id 50"):
        decode(wrapped, SamplerConfig(12), [[VOCAB]])
    assert decode(wrapped, SamplerConfig(4), [[1, 2]]).shape == (1, 4)


@pytest.mark.parametrize("thing", ["model", None, nn.Linear(2, 2)], ids=["text", "none", "no-config"])
def test_generate__refuses_what_is_no_model(thing):
    with pytest.raises(ValueError, match=r"^model "):
        decode(thing, SamplerConfig(4), [[1]])


def test_generate__refuses_what_is_no_config(model):
    with pytest.raises(ValueError, match="config must be a SamplerConfig, got dict"):
        decode(model, {"max_new_tokens": 4}, [[1]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_generate__a_broken_model_is_told_before_there_is_output(bad, temperature):
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[0] = bad
    model.train()
    with pytest.raises(FloatingPointError, match="position 0 of the response to prompt 1 are NaN"):
        decode(model, SamplerConfig(4, temperature=temperature), [[1, 2, 3], [4]])
    assert model.training


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"max_new_tokens": True}, "max_new_tokens must be an integer, got True"),
        ({"max_new_tokens": 12.0}, "max_new_tokens must be an integer, got 12.0"),
        ({"max_new_tokens": None}, "max_new_tokens must be an integer, got None"),
        ({"block_length": 5}, "block_length must divide max_new_tokens = 12, got 5"),
        ({"block_length": 24}, "block_length must divide max_new_tokens = 12, got 24"),
        ({"block_length": 0}, "block_length must be at least 1, got 0"),
        ({"block_length": "4"}, "block_length must be an integer, got '4'"),
        ({"block_length": 4, "steps": 2}, "steps must be between 3"),
        ({"steps": 13}, "steps must be between 1"),
        ({"steps": 2.5}, "steps must be an integer, got 2.5"),
        ({"steps": True}, "steps must be an integer, got True"),
        ({"steps": np.bool_(True)}, "steps must be an integer"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"temperature": math.nan}, "temperature must be 0 or more and finite, got nan"),
        ({"temperature": math.inf}, "temperature must be 0 or more and finite, got inf"),
        ({"temperature": 10**400}, "temperature must be 0 or more and finite"),
        ({"temperature": "1"}, "temperature must be a number, got '1'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"temperature": 1j}, "temperature must be a number, got 1j"),
        ({"cfg_scale": -1.0}, "cfg_scale must be 0 or more"),
        ({"cfg_scale": -math.inf}, "cfg_scale must be 0 or more and finite, got -inf"),
        ({"cfg_scale": math.nan}, "cfg_scale must be 0 or more and finite, got nan"),
        ({"cfg_scale": [1.0]}, r"cfg_scale must be a number, got \[1.0\]"),
        ({"remasking": "best"}, "remasking must be one of"),
        ({"remasking": None}, "remasking must be one of"),
        ({"remasking": np.array(["random"])}, "remasking must be one of"),
        ({"stop_ids": 2}, "stop_ids must be a flat sequence of token ids, got 2"),
        ({"stop_ids": "2"}, "stop_ids must be token ids, got text: '2'"),
        ({"stop_ids": None}, "stop_ids must be a sequence of token ids, got NoneType"),
        ({"defer_ids": (1, -2)}, "defer_ids has a negative id: -2"),
        ({"suppress_ids": (1.5,)}, "suppress_ids must be integers"),
        ({"suppress_ids": (None,)}, "suppress_ids must be a sequence of token ids"),
    ],
)
def test_sampler_config__refuses_bad_fields(fields, message):
    with pytest.raises(ValueError, match=message):
        SamplerConfig(**{"max_new_tokens": 12} | fields)


def test_sampler_config__takes_numbers_of_other_libraries():
    config = SamplerConfig(
        np.int64(12),
        torch.tensor(4),
        steps=np.int32(6),
        temperature=np.float32(0.5),
        stop_ids=torch.tensor([3]),
    )
    assert config == SamplerConfig(12, 4, 6, temperature=0.5, stop_ids=(3,))
    assert hash(config) == hash(SamplerConfig(12, 4, 6, temperature=0.5, stop_ids=[3]))


@pytest.mark.parametrize(
    ("temperature", "cfg_scale"), [(1e-30, 0.0), (1e30, 0.0), (0.0, 1e30), (1e-300, 1e30)]
)
def test_generate__extreme_settings_work(model, temperature, cfg_scale):
    out = decode(model.float(), SamplerConfig(8, temperature=temperature, cfg_scale=cfg_scale), [[1, 2], [3]])
    model.double()
    assert ((out >= 0) & (out < VOCAB) & (out != MASK_ID)).all()
    if temperature == 1e-30:
        assert torch.equal(out, decode(model.float(), SamplerConfig(8), [[1, 2], [3]]))
        model.double()
