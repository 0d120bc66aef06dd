"""Rotary embedding, norm and attention: rounded where LLaDA rounds, in every dtype a model can take."""

import copy

import plain_llada
import pytest
import torch
from packs import random_segments, tiny_model
from torch import nn
from transformers import AttentionInterface

from vrpo.models import LLaDAConfig
from vrpo.models.attention import _attention_function
from vrpo.models.layers import RMSNorm, RotaryEmbedding, Rotation, rotate
from vrpo_kernels.testing import assert_bitwise_equal

# (batch, heads, key heads, length, head size)
SHAPES = [
    (1, 1, 1, 1, 2),
    (1, 4, 2, 7, 8),
    (2, 3, 1, 33, 6),
    (3, 4, 4, 64, 16),
    (1, 2, 2, 200, 64),
    (2, 2, 1, 128, 128),
    (1, 1, 1, 4096, 128),
]
HALF = [torch.bfloat16, torch.float16]


def rotary(size: int, theta: float) -> RotaryEmbedding:
    return RotaryEmbedding(
        LLaDAConfig(d_model=size, n_heads=1, n_layers=1, embedding_size=8, rope_theta=theta)
    )


def random_heads(shape, dtype, seed=0):
    batch, heads, key_heads, length, size = shape
    generator = torch.Generator().manual_seed(seed)
    # As projections give them: (B, L, heads, d), seen as (B, heads, L, d).
    return tuple(
        torch.randn(batch, length, count, size, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, key_heads)
    )


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_rotate__equals_the_plain_rotation_bit_for_bit(dtype, shape, theta):
    query, key = random_heads(shape, dtype)
    positions = torch.arange(shape[3]).expand(shape[0], -1)
    rotation = rotary(shape[4], theta)(query, positions)
    for ours, heads in zip(rotate(query, key, rotation), (query, key), strict=True):
        plain = torch.stack([torch.stack([plain_llada.rotate(h, theta) for h in item]) for item in heads])
        assert_bitwise_equal(ours.contiguous(), plain)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_rotate__rounds_once(dtype):
    """Rotating in the narrow dtype, as transformers' Llama does, is a different number: the test can fail."""
    query, key = random_heads((1, 2, 2, 64, 16), dtype)
    rotation = rotary(16, 10000.0)(query, torch.arange(64)[None])
    right = rotate(query, key, rotation)[0]
    narrow = rotate(query, key, Rotation(rotation.cos_BLd.to(dtype), rotation.sin_BLd.to(dtype)))[0]
    exact = rotate(query.double(), key.double(), rotation)[0]
    assert_bitwise_equal(right, exact.to(dtype))  # float32 is wide enough here: rounded once, correctly
    assert (right != narrow).float().mean() > 0.1


@pytest.mark.parametrize("convert", ["to", "half", "meta"])
def test_rotary_embedding__frequencies_survive_every_conversion(convert):
    module = rotary(16, 10000.0)
    expected = module.frequency_d2.clone()
    if convert == "to":
        module = copy.deepcopy(module).to(torch.bfloat16)
    elif convert == "half":
        module = nn.Sequential(module).half()[0]
    else:
        with torch.device("meta"):
            module = rotary(16, 10000.0)
    assert_bitwise_equal(module.frequency_d2, expected)
    rotation = module(torch.zeros(1, dtype=torch.float16), torch.arange(5)[None])
    assert rotation.cos_BLd.dtype == rotation.sin_BLd.dtype == torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_model__a_converted_model_equals_one_built_narrow(dtype, tmp_path):
    model = tiny_model(dtype=torch.float32)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=dtype, attn_implementation="vrpo")
    ids = random_segments([40])[0][None]
    assert_bitwise_equal(model.to(dtype)(input_ids=ids).logits, loaded(input_ids=ids).logits)


@pytest.fixture
def seen_by_attention():
    """Registers the attention "recording"; the list gets the (query, key, value) of each layer."""
    seen = []

    def attend(module, query, key, value, attention_mask, **options):
        seen.append((query, key, value))
        return _attention_function("auto")(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("recording", attend)
    return seen


@pytest.mark.parametrize("with_lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("mode", ["bf16", "fp16", "autocast", "autocast-bf16-weights"])
def test_model__attention_sees_projections_rotated_and_rounded_once(seen_by_attention, mode, with_lora):
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}.get(
        mode, torch.bfloat16
    )
    model = tiny_model("recording", dtype=dtype)
    if with_lora:
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    projected = []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj")):
            module.register_forward_hook(lambda module, args, output: projected.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode.startswith("autocast")):
        model(input_ids=random_segments([40])[0][None])
    assert len(projected) == 2 * len(seen_by_attention) == 4
    for layer, (query, key, value) in enumerate(seen_by_attention):
        for name, turned, flat in (("q", query, projected[2 * layer]), ("k", key, projected[2 * layer + 1])):
            heads = flat[0].unflatten(1, (-1, 8)).transpose(0, 1)
            plain = torch.stack([plain_llada.rotate(head, 10000.0) for head in heads])
            assert_bitwise_equal(turned[0].contiguous(), plain, f"{name} of layer {layer}")
        assert query.dtype == key.dtype == value.dtype != torch.float32


def test_rms_norm__has_shapes_without_values():
    """As a cost model or a planner asks for them; autocast knows no such device."""
    with torch.device("meta"):
        normed = RMSNorm(8, 1e-5)(torch.empty(3, 8))
    assert normed.is_meta and normed.shape == (3, 8)


@pytest.mark.parametrize("dtype", [*HALF, torch.float32, torch.float64], ids=str)
def test_rms_norm__statistics_are_float32_or_wider(dtype):
    x = 3 * torch.randn(5, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    norm = RMSNorm(24, 1e-5).to(dtype)
    norm.weight.data.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    wide = x.double()
    exact = wide / (wide.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    roundoff = torch.finfo(dtype).eps
    torch.testing.assert_close(norm(x), norm.weight * exact.to(dtype), rtol=2 * roundoff, atol=0)
    assert norm(x).dtype == dtype


@pytest.mark.parametrize("name", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
def test_attention__transformers_functions_attend_both_ways_in_every_dtype(name, dtype):
    ids = random_segments([9])[0][None]
    ours = tiny_model(dtype=dtype)(input_ids=ids).logits
    theirs = tiny_model(name, dtype=dtype)(input_ids=ids).logits
    scale = 8 * torch.finfo(dtype).eps * ours.abs().max().item()
    torch.testing.assert_close(ours, theirs, atol=scale, rtol=0)


@pytest.mark.parametrize("mode", ["bf16", "fp16", "autocast"])
def test_model__gradient_checkpointing_changes_no_bit(mode):
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "autocast": torch.float32}
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(dtype=dtypes[mode]).train()
        if checkpointing:
            newest = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
            newest()
            assert model.model.layers[0].gradient_checkpointing
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            nll = model(
                input_ids=random_segments([30])[0][None],
                rows=torch.tensor([3, 8]),
                targets=torch.tensor([1, 2]),
            ).nll
        nll.sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_bitwise_equal(gradients[1][name], gradient, name)
