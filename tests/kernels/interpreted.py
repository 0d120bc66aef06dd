"""Values of the Triton kernels in Triton's CPU interpreter; `test_triton_interpreter.py` runs it in a child.

float32 and float16 only: the interpreter multiplies bfloat16 wrongly and truncates where it should round.
Sizes are tiny (2-3 ms per program), and so are the tiles, so that every loop over tiles, chunks and slices
turns.
"""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from interpreter_support import KEEP, MARKS, RECOMPUTE, make_inputs, make_op, small_tiles
from operator_calls import operator_calls
from shards import sharded_ratios

from vrpo_kernels import checks, testing
from vrpo_kernels.cross_entropy import cross_entropy
from vrpo_kernels.cross_entropy import kernel as cross_entropy_kernel
from vrpo_kernels.cross_entropy import reference as cross_entropy_reference
from vrpo_kernels.linear_cross_entropy import (
    kernel,
    kernel_rows,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
)
from vrpo_kernels.linear_cross_entropy.tiles import tiles_for
from vrpo_kernels.mask_select import kernel as mask_select_kernel
from vrpo_kernels.mask_select import reference as mask_select_reference
from vrpo_kernels.pack_masked import kernel as pack_masked_kernel
from vrpo_kernels.pack_masked import pack_masked, token_weight_sums
from vrpo_kernels.pack_masked import reference as pack_masked_reference
from vrpo_kernels.rotary import kernel as rotary_kernel
from vrpo_kernels.rotary import reference as rotary_reference
from vrpo_kernels.triton_math import exp

pytestmark = MARKS


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """`small_tiles`, blocks of 64 positions and of 16 tokens."""
    monkeypatch.setattr(kernel, "_tiles", small_tiles)
    monkeypatch.setattr(mask_select_kernel, "_BLOCK", 64)
    monkeypatch.setattr(mask_select_kernel, "_SHORT_BLOCK", 16)
    monkeypatch.setattr(pack_masked_kernel, "_BLOCK", 16)
    monkeypatch.setattr(pack_masked_kernel, "_BLOCK_R", 2)
    monkeypatch.setattr(cross_entropy_kernel, "_block", lambda num_classes: 64)
    monkeypatch.setattr(rotary_kernel, "_BLOCK", 16)


SIZES = [
    pytest.param("cublas", 17, 201, 24, torch.float32, id="cublas-N17-V201-D24-fp32"),
    pytest.param("cublas", 17, 201, 24, torch.float16, id="cublas-N17-V201-D24-fp16"),
    # With one row a column is one number: 64 of them, so that no lucky one decides what plain fp32 achieves.
    pytest.param("cublas", 1, 64, 64, torch.float32, id="cublas-N1-V64-D64-fp32"),
    pytest.param("cublas", 130, 70, 8, torch.float32, id="cublas-N130-V70-D8-fp32"),
    pytest.param("fused", 17, 201, 24, torch.float16, id="fused-descriptors-N17-V201-D24-fp16"),
    pytest.param("fused", 33, 130, 21, torch.float16, id="fused-pointers-N33-V130-D21-fp16"),
    pytest.param("fused", 150, 130, 24, torch.float16, id="fused-descriptors-N150-V130-D24-fp16"),
]


@pytest.mark.parametrize(("gemm", "N", "V", "D", "dtype"), SIZES)
@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
def test_linear_cross_entropy__within_the_policy(gemm, N, V, D, dtype, kept_tile_bytes):
    inputs = make_inputs(N, V, D, dtype)
    with testing.poisoned_empty():
        testing.assert_linear_cross_entropy(make_op(gemm, kept_tile_bytes), *inputs)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__frozen_head_within_the_policy(gemm):
    inputs = make_inputs(17, 201, 24, torch.float16)
    testing.assert_linear_cross_entropy(make_op(gemm), *inputs, head_frozen=True)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__same_bits_in_every_mode(gemm):
    hidden, weight, targets, _ = make_inputs(17, 201, 24, torch.float16, scale=3.0)
    plain = make_op(gemm)(hidden, weight, targets)
    for need_hidden, need_weight in ((True, False), (False, True), (True, True)):
        leaves = hidden.clone().requires_grad_(need_hidden), weight.clone().requires_grad_(need_weight)
        for kept_tile_bytes in (KEEP, RECOMPUTE):
            nll = make_op(gemm, kept_tile_bytes)(*leaves, targets)
            testing.assert_bitwise_equal(nll.detach(), plain, "nll")


@pytest.mark.parametrize(
    ("gemm", "dtype"), [("cublas", torch.float32), ("cublas", torch.float16), ("fused", torch.float16)]
)
def test_linear_cross_entropy__corrects_what_was_written_under_a_lower_maximum(gemm, dtype):
    # Logits of row n climb by 12 nats per tile for odd n and fall for even n.
    hidden, weight, targets, upstream = make_inputs(6, 256, 8, dtype, scale=0.1)
    weight[:, 0] = (torch.arange(256) // 64) * 12.0
    hidden[:, 0] = torch.tensor([-1.0, 1.0]).repeat(3)
    testing.assert_linear_cross_entropy(make_op(gemm), hidden, weight, targets, upstream)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__extreme_logits_stay_within_the_policy(gemm):
    hidden, weight, targets, upstream = make_inputs(9, 130, 8, torch.float16)
    weight[:, 0] = torch.randint(-1, 2, (130,), generator=torch.Generator().manual_seed(0)) * 100.0
    hidden[:, 0] = 100.0
    testing.assert_linear_cross_entropy(make_op(gemm), hidden, weight, targets, upstream)


def test_linear_cross_entropy__one_class_costs_nothing():
    hidden, weight, targets, upstream = make_inputs(3, 1, 8, torch.float32)
    hidden.requires_grad_()
    weight.requires_grad_()
    nll = make_op()(hidden, weight, targets)
    nll.backward(upstream)
    for value in (nll, hidden.grad, weight.grad):
        assert torch.equal(value, torch.zeros_like(value))


def test_linear_cross_entropy__no_rows():
    hidden, weight, targets, _ = make_inputs(0, 10, 8, torch.float32)
    weight.requires_grad_()
    nll = make_op()(hidden, weight, targets)
    nll.sum().backward()
    assert nll.shape == (0,)
    assert torch.equal(weight.grad, torch.zeros_like(weight))


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_forward__corrections_are_powers_of_two_and_round_nothing_again(gemm):
    # Logits climb by 12 nats per tile and by 3 per block of 32 classes: all is corrected, most of it twice.
    hidden, weight, targets, _ = make_inputs(8, 256, 8, torch.float16, scale=0.1)
    weight[:, 0] = (torch.arange(256) // 64) * 4.0 + (torch.arange(256) // 32 % 2) * 1.0
    hidden[:, 0] = 3.0
    wanted = {"want_dhidden": False, "keep_tiles": True}
    _, statistics, _, kept, *_ = kernel.forward(hidden, weight, targets, gemm=gemm, **wanted)
    references = statistics[1].double() / math.log(2)
    assert (references - references.round()).abs().max() < 1e-5
    # fp16 keeps E / s; the target's column holds -1.
    logits = hidden.double() @ weight.double().T
    logits.scatter_(1, targets[:, None], float("-inf"))
    expected = torch.softmax(logits, dim=1)
    found = kept[:, :256].double().scatter(1, targets[:, None], 0.0)
    large = expected > 2.0**-13  # below, fp16 has fewer bits
    relative = ((found - expected).abs() / expected)[large]
    assert relative.max() <= 2 * 2.0**-11  # E and E / s are rounded once each


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__a_target_out_of_range_makes_nan_of_its_row_only(gemm, monkeypatch):
    # On a device nothing can be raised without waiting for it; what lies beyond the head is never touched.
    monkeypatch.setattr(checks, "values_are_checked", lambda device: False)
    hidden, weight, targets, upstream = make_inputs(17, 201, 24, torch.float16)
    expected = make_op(gemm)(hidden, weight, targets)
    bad = torch.tensor([3, 7, 16])
    targets[bad] = torch.tensor([201, 2**40, -1])
    for kept_tile_bytes in (KEEP, RECOMPUTE):
        leaf = hidden.clone().requires_grad_()
        head = weight.clone().requires_grad_()
        nll = make_op(gemm, kept_tile_bytes)(leaf, head, targets)
        nll.backward(upstream)
        assert nll[bad].isnan().all()
        assert leaf.grad[bad].isnan().all()
        assert head.grad.isnan().all()  # every class has a share of those rows
        others = torch.ones(17, dtype=torch.bool)
        others[bad] = False
        testing.assert_bitwise_equal(nll[others].detach(), expected[others], "nll")
        assert leaf.grad[others].isfinite().all()


@pytest.mark.parametrize("bad", [201, 2**40, -1])
def test_cross_entropy__a_target_out_of_range_makes_nan_of_its_row_only(bad):
    # The op itself raises for tensors on the CPU; on a device only the kernels see the values.
    logits, targets = torch.randn(5, 201), torch.tensor([0, 5, bad, 200, 7])
    nll, statistics = cross_entropy_kernel.forward(logits, targets, None)
    dlogits = torch.empty_like(logits)
    cross_entropy_kernel.backward(torch.ones(5), logits, targets, None, statistics, dlogits)
    others = torch.tensor([0, 1, 3, 4])
    assert nll[2].isnan() and nll[others].isfinite().all()
    assert dlogits[2].isnan().all() and dlogits[others].isfinite().all()


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy_replay__gradients_without_kept_tiles(gemm):
    hidden, weight, targets, upstream = make_inputs(17, 201, 24, torch.float16)
    settings = {"backend": "triton", "gemm": gemm}
    nll, statistics = linear_cross_entropy_statistics(hidden, weight, targets, **settings)

    def op(hidden, weight, targets):
        value, drift = linear_cross_entropy_replay(hidden, weight, targets, nll, statistics, **settings)
        assert drift.item() == 0.0
        return value

    testing.assert_linear_cross_entropy(op, hidden, weight, targets, upstream)


@pytest.mark.parametrize("head", ["plain", "whole"])
def test_operators__pass_opcheck(head):
    hidden, weight, targets, upstream = make_inputs(2, 9, 8, torch.float16)
    bias = weight[:, 0].contiguous() if head == "whole" else None
    for operator, arguments in operator_calls(hidden, weight, bias, targets, upstream, "cublas"):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_backend__shards_of_the_head_add_up(gemm):
    inputs = make_inputs(9, 170, 24, torch.float16, scale=2.0)
    testing.assert_ratios(sharded_ratios(gemm, (70, len(inputs[1])), *inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in_place"])
def test_cross_entropy__within_the_policy(dtype, in_place):
    generator = torch.Generator().manual_seed(1)
    # Of a handful of rows one decides, and there the formula may be right to a seventh of a rounding.
    logits = torch.randn(40, 201, generator=generator).mul_(8).to(dtype)
    rows = torch.randperm(40, generator=generator)[:31]
    targets = torch.randint(201, (31,), generator=generator)
    upstream = testing.wide_range_upstream(31, generator)
    source = logits.clone().requires_grad_()
    computed = source * 1  # in place needs logits that are no leaf
    nll = cross_entropy(computed, targets, rows, in_place=in_place, backend="triton")
    nll.backward(upstream)

    def differentiate(values, upstream):
        return cross_entropy_reference.gradient(upstream, values[rows], targets)

    truth = cross_entropy_reference.cross_entropy(logits[rows].double(), targets)
    baseline = cross_entropy_reference.cross_entropy(logits[rows].float(), targets)
    gradient = differentiate(logits.double(), upstream.double())
    rounded = differentiate(logits.float(), upstream).to(dtype)
    testing.assert_ratios(
        {
            "nll": testing.fp32_error_ratio(nll.detach(), truth, baseline),
            "dlogits": testing.matrix_error_ratio(source.grad[rows], gradient, rounded),
        }
    )
    others = torch.ones(40, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(source.grad[others], torch.zeros_like(source.grad[others]))


SEGMENTS = {
    "length_S": torch.tensor([1, 5, 64, 65, 200, 130]),
    "first_S": torch.tensor([0, 3, 70, 2**32, 150, 0]),
}


@pytest.mark.parametrize("seed", [12345, 2**64 - 1])
@pytest.mark.parametrize(
    ("by_rank", "count_S"),
    [
        pytest.param(True, [1, 4, 64, 0, 120, 13], id="by_rank"),
        pytest.param(False, [2**32, 0, 2**31, 2**32 - 1, 2**30, 7], id="by_word"),
    ],
)
def test_mask_select__bit_identical_to_the_reference(seed, by_rank, count_S):
    counter_S3 = torch.randint(0, 2**32, (6, 3), generator=torch.Generator().manual_seed(seed % 2**32))
    draw = (SEGMENTS["length_S"], counter_S3, SEGMENTS["first_S"], torch.tensor(count_S), seed, by_rank)
    found, expected = mask_select_kernel.mask_select(*draw), mask_select_reference.mask_select(*draw)
    testing.assert_bitwise_equal(found[0], expected[0], "position_N")
    testing.assert_bitwise_equal(found[1], expected[1], "offsets_S1")


def test_mask_select__equal_words_are_ordered_by_position(monkeypatch):
    # With this seed and counter, positions 394 and 785 draw the same word, of ranks 1305 and 1306.
    monkeypatch.setattr(mask_select_kernel, "_BLOCK", 1024)
    length_S, counter_S3 = torch.tensor([2000, 2000]), torch.tensor([[162, 0, 0], [162, 0, 0]])
    draw = (length_S, counter_S3, torch.tensor([0, 1306]), torch.tensor([1306, 694]), 7, True)
    position_N, offsets_S1 = mask_select_kernel.mask_select(*draw)
    expected = mask_select_reference.mask_select(*draw)
    testing.assert_bitwise_equal(position_N, expected[0], "position_N")
    assert 394 in position_N[: offsets_S1[1]] and 785 in position_N[offsets_S1[1] :]


def _masked_batch(num_samples, prompt_lengths, response_lengths):
    """(tokens_U, prompt_length_R, response_length_R, position_N, offsets_S1); tokens hold the mask id 3."""
    generator = torch.Generator().manual_seed(num_samples)
    prompt, response = torch.tensor(prompt_lengths).long(), torch.tensor(response_lengths).long()
    tokens_U = torch.randint(5, (int((prompt + response).sum()),), generator=generator)
    positions = []
    for length in response.repeat_interleave(num_samples).tolist():
        share = torch.rand(1, generator=generator)  # from hardly any to nearly all
        positions.append((torch.rand(length, generator=generator) < share).nonzero()[:, 0])
    offsets_S1 = torch.tensor([0, *map(len, positions)]).cumsum(0)
    return tokens_U, prompt, response, torch.cat([*positions, offsets_S1[:0]]), offsets_S1


PACKS = [
    pytest.param(1, [3, 0, 20, 2, 7], [1, 17, 70, 0, 16], id="K1-five_responses"),
    pytest.param(3, [5, 0, 4, 33], [64, 0, 15, 9], id="K3-four_responses"),
    pytest.param(5, [0], [40], id="K5-one_response"),
    pytest.param(2, [], [], id="K2-no_responses"),
]


@pytest.mark.parametrize(("num_samples", "prompt_lengths", "response_lengths"), PACKS)
def test_pack_masked__bit_identical_to_the_reference(num_samples, prompt_lengths, response_lengths):
    batch = _masked_batch(num_samples, prompt_lengths, response_lengths)
    expected = pack_masked_reference.pack_masked(*batch, num_samples, 3)
    with testing.poisoned_empty():
        pack = pack_masked(*batch, num_samples=num_samples, mask_token_id=3, backend="triton")
    for found, wanted, name in zip(pack, expected, pack._fields, strict=True):
        testing.assert_bitwise_equal(found, wanted, name)


@pytest.mark.parametrize(("num_samples", "prompt_lengths", "response_lengths"), PACKS)
def test_token_weight_sums__bit_identical_to_the_reference(num_samples, prompt_lengths, response_lengths):
    _, _, response, position_N, offsets_S1 = _masked_batch(num_samples, prompt_lengths, response_lengths)
    weight_N = testing.wide_range_upstream(len(position_N), torch.Generator().manual_seed(2))
    draw = (weight_N, position_N, offsets_S1, response)
    num_tokens = int(response.sum())
    expected = pack_masked_reference.token_weight_sums(*draw, num_samples, num_tokens)
    with testing.poisoned_empty():
        found = token_weight_sums(*draw, num_samples=num_samples, num_tokens=num_tokens, backend="triton")
    for got, wanted, name in zip(found, expected, ("sum_M", "sum_N"), strict=True):
        testing.assert_bitwise_equal(got, wanted, name)


def test_token_weight_sums__adds_in_sample_order_in_fp64():
    # In order the 1 is lost to 2**60 and the last weight is kept; from the end, or in pairs, it is lost.
    weight_N = torch.tensor([2.0**60, 1.0, -(2.0**60), 1.0 + 2.0**-20]).repeat_interleave(2)
    position_N, offsets_S1 = torch.tensor([0, 1]).repeat(4), torch.arange(0, 9, 2)
    draw = (weight_N, position_N, offsets_S1, torch.tensor([2]))
    sum_M, sum_N = token_weight_sums(*draw, num_samples=4, num_tokens=2, backend="triton")
    testing.assert_bitwise_equal(sum_M, torch.full((2,), 1.0 + 2.0**-20), "sum_M")
    testing.assert_bitwise_equal(sum_N, sum_M.repeat(4), "sum_N")
    for other in pack_masked_reference.token_weight_sums(*draw, 4, 2):
        testing.assert_bitwise_equal(other, torch.full_like(other, 1.0 + 2.0**-20), "reference")


@triton.jit
def _exp_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, exp(tl.load(x_ptr + offs), True))


def test_exp__is_within_one_and_a_half_roundings():
    x = torch.linspace(-87, 88, 65536)
    out = torch.empty_like(x)
    _exp_kernel[(16,)](x, out, BLOCK=4096)
    truth = x.double().exp()
    assert ((out - truth).abs() / truth).max() <= 1.5 * 2.0**-24
    edges = torch.tensor([float("-inf"), -1e30, -150.0, 0.0, float("inf"), float("nan")] + [0.0] * 4090)
    _exp_kernel[(1,)](edges, out, BLOCK=4096)
    assert out[:4].tolist() == [0.0, 0.0, 0.0, 1.0]
    assert out[4].isinf() and out[5].isnan()


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("batch", "heads", "key_heads", "length", "size"),
    [(1, 1, 1, 1, 2), (2, 3, 1, 5, 6), (1, 9, 2, 3, 16), (2, 2, 4, 2, 20)],
)
def test_rotary__bit_identical_to_the_reference(batch, heads, key_heads, length, size, dtype, inverse):
    """Several blocks of heads, halves that are no power of two, strides, angles shared by the batch."""
    generator = torch.Generator().manual_seed(size)
    query, key = (
        torch.randn(batch, length, count, size, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, key_heads)
    )
    angle = torch.randn(1, length, size, generator=generator)
    cos, sin = (part[..., : size // 2].expand(batch, -1, -1) for part in (angle.cos(), angle.sin()))
    with testing.poisoned_empty():
        found = rotary_kernel.rotary(query, key.contiguous(), cos, sin, inverse)
    for turned, plain, name in zip(found, (query, key), ("query", "key"), strict=True):
        expected = rotary_reference.rotary(plain, cos, -sin if inverse else sin)
        testing.assert_bitwise_equal(turned.contiguous(), expected, name)
        assert turned.transpose(1, 2).is_contiguous()


def test_scale_rows__kept_tiles_are_divided_by_the_very_number_that_stands_at_the_target():
    # Tiles hold -s rounded to their dtype; dividing by s itself would leave the target's share off from -1.
    value = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).half()
    sums = 1.0 + torch.arange(1, 41) * 2.0**-11 * 0.97  # up to half a step of fp16 away from it
    statistics = torch.stack([torch.zeros(40), torch.full((40,), 3.0), sums])
    dnll = torch.linspace(-1, 1, 40)
    out = torch.empty_like(value)
    kernel_rows.scale_rows(value, dnll, statistics, out, per_sum=True)
    q = torch.sigmoid(3.0 + sums.double().log())
    scaled = (
        value.double() * (dnll.double() * q / by)[:, None] for by in (sums.half().double(), sums.double())
    )
    rounded, exact = ((out != wanted.half()).double().mean() for wanted in scaled)
    assert rounded < 0.02 < 0.1 < exact


def test_statistics__fp32_sums_are_within_two_roundings():
    # An error of a row's sum is one of all its gradient. Added in fp32, lane by lane, these are off by four.
    generator = torch.Generator().manual_seed(1000)
    logits = torch.randn(60, 1000, generator=generator).mul_(8)
    targets = torch.randint(1000, (60,), generator=generator)
    others = logits.double().scatter(1, targets[:, None], float("-inf"))
    truth = (others - others.amax(dim=1, keepdim=True)).exp().sum(dim=1)
    _, statistics = cross_entropy_kernel.forward(logits, targets, None)
    assert ((statistics[1] - truth).abs() / truth).max() <= 2 * 2.0**-24
    # The same logits from a head: hidden rows that pick one column of it each, so that nothing is rounded.
    tiles = replace(tiles_for((9, 0), 4), fold_cols=1024)
    wanted = {"gemm": "cublas", "want_dhidden": False, "keep_tiles": False, "tiles": tiles}
    _, statistics, *_ = kernel.forward(torch.eye(60), logits.T.contiguous(), targets, **wanted)
    assert ((statistics[2] - truth).abs() / truth).max() <= 2 * 2.0**-24
