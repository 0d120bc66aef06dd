"""Packed attention: right values, no leak between segments, and a choice that explains itself."""

from itertools import pairwise

import pytest
import torch
from backends import needs_extension
from packs import pack, random_segments, tiny_model

import vrpo.models.attention as attention
from vrpo.models import choose_attention
from vrpo.models.attention import Segments, attend_packed

LENGTHS = [3, 3, 7, 1, 1, 1, 12, 3]


def to_segments(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return Segments(cu, max(lengths))


def random_qkv(lengths, heads=4, key_heads=2, size=8, dtype=torch.float64, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), h, size) for h in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=dtype).to(device) for shape in shapes]


def naive_attention(query, key, value, lengths, scale):
    """One segment and one head at a time, written out."""
    group = query.shape[1] // key.shape[1]
    out = torch.empty_like(query)
    bounds = torch.tensor([0, *lengths]).cumsum(0).tolist()
    for start, end in pairwise(bounds):
        for head in range(query.shape[1]):
            q, k, v = (query[start:end, head], key[start:end, head // group], value[start:end, head // group])
            out[start:end, head] = (scale * q @ k.T).softmax(dim=1) @ v
    return out


def test_attend_packed__equals_the_formula_segment_by_segment():
    query, key, value = random_qkv(LENGTHS)
    ours = attend_packed(query, key, value, to_segments(LENGTHS), scale=0.3)
    torch.testing.assert_close(ours, naive_attention(query, key, value, LENGTHS, 0.3))


def test_attend_packed__gradients_equal_the_formula():
    query, key, value = (tensor.requires_grad_() for tensor in random_qkv(LENGTHS))
    upstream = torch.randn(query.shape, generator=torch.Generator().manual_seed(1), dtype=query.dtype)
    ours = attend_packed(query, key, value, to_segments(LENGTHS), scale=0.3)
    naive = naive_attention(query, key, value, LENGTHS, 0.3)
    for a, b in zip(
        torch.autograd.grad(ours, (query, key, value), upstream),
        torch.autograd.grad(naive, (query, key, value), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_attend_packed__other_segments_are_bitwise_unmoved():
    query, key, value = random_qkv(LENGTHS)
    before = attend_packed(query, key, value, to_segments(LENGTHS), scale=0.3)
    query[6:13], key[6:13], value[6:13] = 5.0, -4.0, 3.0  # the segment of length 7
    after = attend_packed(query, key, value, to_segments(LENGTHS), scale=0.3)
    assert torch.equal(before[:6], after[:6]) and torch.equal(before[13:], after[13:])
    assert not torch.equal(before[6:13], after[6:13])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_attend_packed__same_bits_with_and_without_gradients(dtype):
    tensors = random_qkv(LENGTHS, dtype=dtype)
    with torch.no_grad():
        without = attend_packed(*tensors, to_segments(LENGTHS), scale=0.3)
    tracked = [tensor.clone().requires_grad_() for tensor in tensors]
    assert torch.equal(without, attend_packed(*tracked, to_segments(LENGTHS), scale=0.3))


def test_attend_packed__autocast_decides_the_compute_dtype():
    tensors = random_qkv(LENGTHS, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attend_packed(*tensors, to_segments(LENGTHS), scale=0.3)
    assert out.dtype == torch.bfloat16


def test_segments__consecutive_equal_lengths_form_one_run():
    assert to_segments(LENGTHS).runs == [(0, 2, 3), (6, 1, 7), (13, 3, 1), (16, 1, 12), (28, 1, 3)]


def test_segments__refuse_boundaries_that_do_not_increase():
    with pytest.raises(ValueError, match="segment at token 4 has 0 tokens"):
        _ = Segments(torch.tensor([0, 4, 4, 6], dtype=torch.int32), 4).runs


def test_segments__refuse_int64_boundaries():
    with pytest.raises(ValueError, match="int32"):
        Segments(torch.tensor([0, 4]), 4)


@needs_extension
def test_choose_attention__cpu_takes_segments_and_says_why():
    name, reason = choose_attention("cpu", torch.float32)
    assert name == "segments"
    assert "needs a CUDA device, got cpu" in reason


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_choose_attention__cpu_takes_sdpa_in_other_dtypes_and_says_why(dtype):
    name, reason = choose_attention("cpu", dtype)
    assert name == "sdpa"
    assert f"it computes float32, not {dtype}" in reason


@needs_extension
def test_attend_packed__segments_equal_sdpa():
    tensors = [tensor.requires_grad_() for tensor in random_qkv(LENGTHS, dtype=torch.float32)]
    ours, sdpa = (
        attend_packed(*tensors, to_segments(LENGTHS), scale=0.3, requested=name)
        for name in ("segments", "sdpa")
    )
    assert not torch.equal(ours, sdpa)  # else both took the same way
    torch.testing.assert_close(ours, sdpa)
    torch.testing.assert_close(
        torch.autograd.grad(ours, tensors, 2 * ours.detach()),
        torch.autograd.grad(sdpa, tensors, 2 * ours.detach()),
    )


@pytest.mark.parametrize(
    ("has_flash", "dtype", "expected"),
    [
        (True, torch.bfloat16, "flash_attn"),
        (False, torch.bfloat16, "torch_varlen"),
        (True, torch.float32, "sdpa"),
    ],
)
def test_choose_attention__prefers_varlen_kernels_on_cuda(monkeypatch, has_flash, dtype, expected):
    monkeypatch.setattr(
        attention, "_is_importable", lambda module: has_flash if module == "flash_attn" else True
    )
    assert choose_attention("cuda", dtype)[0] == expected


def test_choose_attention__impossible_request_lists_all_reasons(monkeypatch):
    monkeypatch.setattr(attention, "_is_importable", lambda module: False)
    with pytest.raises(ValueError, match=r"CUDA device.*bfloat16 or float16.*not installed"):
        choose_attention("cpu", torch.float32, "flash_attn")


def test_choose_attention__unknown_name_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"'auto', 'flash_attn', 'torch_varlen', 'segments', 'sdpa'.*'eager'"
    ):
        choose_attention("cpu", torch.float32, "eager")


def varlen_oldest(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    """The signature of torch 2.10: no scale, no flag for grouped heads."""
    assert not is_causal
    lengths = cu_seq_q.diff().tolist()
    return naive_attention(query, key, value, lengths, query.shape[-1] ** -0.5)


def varlen_newest(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False
):
    """The signature of torch 2.13: grouped heads only when announced."""
    assert window_size == (-1, -1)
    assert enable_gqa == (query.shape[1] != key.shape[1])
    return naive_attention(query, key, value, cu_seq_q.diff().tolist(), scale)


@pytest.mark.parametrize("varlen", [varlen_oldest, varlen_newest], ids=["torch-2.10", "torch-2.13"])
def test_torch_varlen__both_signatures_give_full_attention(monkeypatch, varlen):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    attention._torch_varlen_function.cache_clear()
    query, key, value = random_qkv(LENGTHS)
    scale = query.shape[-1] ** -0.5
    ours = attention._attend_torch_varlen(query, key, value, to_segments(LENGTHS), scale)
    attention._torch_varlen_function.cache_clear()
    torch.testing.assert_close(ours, naive_attention(query, key, value, LENGTHS, scale))


def test_torch_varlen__without_a_scale_argument_another_scale_is_refused(monkeypatch):
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_oldest)
    attention._torch_varlen_function.cache_clear()
    with pytest.raises(ValueError, match=r"got scale=0\.1"):
        attention._attend_torch_varlen(*random_qkv(LENGTHS), to_segments(LENGTHS), 0.1)
    attention._torch_varlen_function.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_torch_varlen__equals_sdpa_on_cuda():
    lengths = [64, 64, 17, 200]
    tensors = random_qkv(lengths, size=64, dtype=torch.bfloat16, device="cuda")
    segments = Segments(torch.tensor([0, *lengths], device="cuda").cumsum(0).int(), 200)
    ours = attend_packed(*tensors, segments, scale=0.125, requested="torch_varlen")
    sdpa = attend_packed(*tensors, segments, scale=0.125, requested="sdpa")
    torch.testing.assert_close(ours, sdpa, atol=2e-2, rtol=2e-2)


# The model's own packs.


def pack_logits(model, segments):
    """Logits of each segment of a pack."""
    inputs = pack(segments)
    rows = torch.arange(inputs["input_ids"].shape[1])
    return model(**inputs, rows=rows).logits.split([len(segment) for segment in segments])


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_model__packed_equals_one_by_one(model):
    segments = random_segments(LENGTHS)
    for packed, segment in zip(pack_logits(model, segments), segments, strict=True):
        torch.testing.assert_close(packed, model(input_ids=segment[None]).logits[0])


def test_model__adding_a_segment_changes_no_other(model):
    segments = random_segments(LENGTHS)
    longer = pack_logits(model, [*segments[:4], random_segments([9], seed=1)[0], *segments[4:]])
    for with_it, without in zip(longer[:4] + longer[5:], pack_logits(model, segments), strict=True):
        torch.testing.assert_close(with_it, without)


def test_model__segment_order_is_irrelevant(model):
    segments = random_segments(LENGTHS)
    backwards = pack_logits(model, segments[::-1])[::-1]
    for a, b in zip(backwards, pack_logits(model, segments), strict=True):
        torch.testing.assert_close(a, b)


def test_model__changing_a_segment_leaves_the_others_bitwise_equal(model):
    segments = random_segments(LENGTHS)
    before = pack_logits(model, segments)
    segments[2] = (segments[2] + 1) % 40
    after = pack_logits(model, segments)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved == [i == 2 for i in range(len(segments))]


@pytest.mark.parametrize("side", ["left", "right"])
def test_model__padding_is_never_attended_to(model, side):
    short, long = random_segments([4, 9])
    padding = torch.full((5,), 7)
    row = torch.cat((padding, short) if side == "left" else (short, padding))
    ids = torch.stack((row, long))
    valid = torch.ones_like(ids)
    valid[0, :5] = 0
    if side == "right":
        valid[0] = valid[0].flip(0)
    position = (valid.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=valid, position_ids=position).logits
    torch.testing.assert_close(logits[0][valid[0].bool()], model(input_ids=short[None]).logits[0])
    torch.testing.assert_close(logits[1], model(input_ids=long[None]).logits[0])


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_model__transformers_attention_agrees_on_padded_input(model, name):
    ids = random_segments([9])[0][None]
    valid = torch.tensor([[1] * 6 + [0] * 3])
    theirs = tiny_model(name)(input_ids=ids, attention_mask=valid).logits
    ours = model(input_ids=ids, attention_mask=valid).logits
    # transformers' eager softmax is fp32 whatever the model's dtype.
    torch.testing.assert_close(ours[:, :6], theirs[:, :6], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_model__refuses_a_pack_on_attention_that_would_leak(name):
    with pytest.raises(ValueError, match=f"'{name}' would let the segments of a pack see each other"):
        tiny_model(name)(**pack(random_segments([3, 4])))


def test_model__refuses_a_pack_with_an_attention_mask(model):
    inputs = pack(random_segments([3, 4]))
    with pytest.raises(ValueError, match="takes no attention_mask"):
        model(**inputs, attention_mask=torch.ones_like(inputs["input_ids"]))


@pytest.mark.parametrize("key", ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"])
def test_model__refuses_incomplete_boundaries(model, key):
    inputs = pack(random_segments([3, 4]))
    del inputs[key]
    with pytest.raises(ValueError, match="a pack needs"):
        model(**inputs)
