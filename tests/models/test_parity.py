"""Our LLaDA against the plain one of tests/plain_llada.py, under the tolerance policy of the kernels."""

import pytest
import torch
from packs import MASK_ID, VOCAB, pack, random_segments, tiny_model
from plain_llada import PlainLLaDA

from vrpo_kernels.testing import assert_ratios, fp32_error_ratio, matrix_error_ratio, wide_range_upstream

EOS = 40
SIZES = {
    "plain": {"n_kv_heads": 4},
    "gqa": {"n_kv_heads": 2},
    "mqa": {"n_kv_heads": 1},
    "tied": {"weight_tying": True},
    "long_theta": {"rope_theta": 500000.0, "rms_norm_eps": 1e-6},
}
LENGTHS = [6, 6, 1, 23, 40]
sizes = pytest.mark.parametrize("size", SIZES)


def build(size, dtype):
    return tiny_model(dtype=dtype, eos_token_id=EOS, pad_token_id=EOS, **SIZES[size])


def texts(lengths=LENGTHS):
    """Sequences with EOS and mask tokens in them."""
    segments = random_segments(lengths)
    segments[-1][[2, 3, 11]] = EOS
    segments[-1][[5, 9]] = MASK_ID
    return segments


def logits_ratio(ours, model, segments):
    truth = torch.cat([PlainLLaDA.like(model)(ids) for ids in segments]).detach()
    baseline = torch.cat([PlainLLaDA.like(model, ours.dtype)(ids) for ids in segments]).detach()
    compare = fp32_error_ratio if ours.dtype == torch.float32 else matrix_error_ratio
    return compare(ours.detach(), truth, baseline)


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits__of_a_pack_equal_the_plain_model(size, dtype):
    model, segments = build(size, dtype), texts()
    inputs = pack(segments)
    ours = model(**inputs, rows=torch.arange(inputs["input_ids"].shape[1])).logits
    assert_ratios({"logits": logits_ratio(ours, model, segments)})


@sizes
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits__of_a_padded_batch_equal_the_plain_model(size, side):
    model, segments = build(size, torch.float32), texts()
    longest = max(LENGTHS)
    ids = torch.full((len(segments), longest), EOS)
    valid = torch.zeros_like(ids)
    for row, segment in enumerate(segments):
        columns = slice(0, len(segment)) if side == "right" else slice(longest - len(segment), longest)
        ids[row, columns], valid[row, columns] = segment, 1
    position = (valid.cumsum(1) - 1).clamp(min=0)
    logits = model(input_ids=ids, attention_mask=valid, position_ids=position).logits
    assert_ratios({"logits": logits_ratio(logits[valid.bool()], model, segments)})


def gradients(size, dtype):
    """Of a signed, uneven sum of the NLLs of most rows of a pack, by our names: ours, and plain(dtype)."""
    model, segments = build(size, dtype), texts()
    inputs = pack(segments)
    num_tokens = inputs["input_ids"].shape[1]
    generator = torch.Generator().manual_seed(2)
    rows = torch.randperm(num_tokens, generator=generator)[:60].sort().values
    targets = torch.randint(0, VOCAB, (60,), generator=generator)
    upstream = wide_range_upstream(60, generator, decades=1.0)
    model(**inputs, rows=rows, targets=targets).nll.backward(upstream)

    def plain(dtype):
        copy = PlainLLaDA.like(model, dtype)
        logits = torch.cat([copy(ids) for ids in segments])
        log_p = logits.to(torch.promote_types(dtype, torch.float32)).log_softmax(dim=1)
        (-log_p[rows, targets] * upstream).sum().backward()
        return {name: copy.gradient_of(name) for name, _ in model.named_parameters()}

    return {name: p.grad for name, p in model.named_parameters()}, plain


@sizes
def test_gradient__equals_the_plain_model_in_every_row(size):
    ours, plain = gradients(size, torch.float64)
    expected = plain(torch.float64)
    for name, gradient in ours.items():
        scale = expected[name].abs().max().item()
        assert scale > 0, name
        assert (gradient - expected[name]).abs().max().item() <= 1e-11 * scale, name
    rows = ours["model.embed_tokens.weight"].norm(dim=1)
    assert rows[EOS] > 1e-3 * rows.max() and rows[MASK_ID] > 1e-3 * rows.max()
    assert rows.shape == (VOCAB,)


@sizes
def test_gradient__of_bfloat16_weights_is_within_the_policy(size):
    ours, plain = gradients(size, torch.bfloat16)
    truth, baseline = plain(torch.float64), plain(torch.bfloat16)
    matrices = [name for name, gradient in ours.items() if gradient.dim() == 2]
    assert_ratios({name: matrix_error_ratio(ours[name], truth[name], baseline[name]) for name in matrices})
