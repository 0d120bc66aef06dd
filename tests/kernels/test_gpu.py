"""What only a GPU can show: the policy on tensor cores, 64-bit offsets, memory, no host syncs, CUDA graphs.

Runs without the suite's conftest (`pytest --noconftest`), so that a bare CUDA machine can run it: `make gpu`.
"""

import pytest
import torch
from gpu_support import (
    DTYPES,
    FORMS,
    HALF_FORMS,
    KEEP,
    MARKS,
    RECOMPUTE,
    gradients,
    make_inputs,
    make_op,
    make_replay,
    name_of,
    room_on_the_device,
    use_small_tiles,
)
from operator_calls import operator_calls

from vrpo_kernels import testing
from vrpo_kernels.cross_entropy import cross_entropy
from vrpo_kernels.cross_entropy import reference as cross_entropy_reference
from vrpo_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    plan_linear_cross_entropy,
)
from vrpo_kernels.linear_cross_entropy.tiles import tiles_for
from vrpo_kernels.mask_select import mask_select
from vrpo_kernels.mask_select import reference as mask_select_reference
from vrpo_kernels.pack_masked import PackedTokens, pack_masked, token_weight_sums
from vrpo_kernels.pack_masked import reference as pack_masked_reference

pytestmark = MARKS


@pytest.fixture
def no_host_sync():
    """A function after whose call any operation that waits for the device raises, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize("peak", [0.0, 25.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    ("N", "V", "D"),
    [(2, 3, 8), (17, 513, 48), (130, 4099, 133), (1500, 20000, 256)],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy__within_the_policy(gemm, dtype, N, V, D, peak, kept_tile_bytes):
    inputs = make_inputs(N, V, D, dtype, peak=peak)
    with testing.poisoned_empty():
        testing.assert_linear_cross_entropy(make_op(gemm, kept_tile_bytes), *inputs)


@pytest.mark.parametrize("frozen", ["head_frozen", "hidden_frozen"])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy__one_gradient_within_the_policy(gemm, dtype, frozen):
    inputs = make_inputs(200, 9000, 128, dtype)
    testing.assert_linear_cross_entropy(make_op(gemm), *inputs, **{frozen: True})


@pytest.mark.parametrize("tiles", ["one", "four"])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy__corrects_what_was_written_under_a_lower_maximum(
    gemm, dtype, tiles, monkeypatch
):
    # The logits of every 8192 classes climb (odd rows) or fall (even rows) by 12 nats, in one tile or four.
    if tiles == "four":
        use_small_tiles(monkeypatch)
    hidden, weight, targets, upstream = make_inputs(1024, 32768, 64, dtype, scale=0.1)
    weight[:, 0] = (torch.arange(32768, device="cuda") // 8192) * 12.0
    hidden[:, 0] = torch.tensor([-1.0, 1.0], device="cuda").repeat(512)
    testing.assert_linear_cross_entropy(make_op(gemm), hidden, weight, targets, upstream)


@pytest.mark.parametrize(("gemm", "dtype"), HALF_FORMS, ids=name_of)
def test_linear_cross_entropy__extreme_logits_within_the_policy(gemm, dtype):
    hidden, weight, targets, upstream = make_inputs(64, 3000, 64, dtype)
    weight[:, 0] = (torch.arange(3000, device="cuda") % 3 - 1) * 100.0
    hidden[:, 0] = 100.0
    testing.assert_linear_cross_entropy(make_op(gemm), hidden, weight, targets, upstream)


@pytest.mark.parametrize("tiles", ["default", "small"])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy__same_bits_in_every_mode_and_run(gemm, dtype, tiles, monkeypatch):
    if tiles == "small":
        use_small_tiles(monkeypatch)
    hidden, weight, targets, upstream = make_inputs(2100, 20000, 256, dtype)
    with torch.no_grad():
        plain = make_op(gemm)(hidden, weight, targets)
    for kept_tile_bytes in (KEEP, RECOMPUTE):
        op = make_op(gemm, kept_tile_bytes)
        first, second = (gradients(op, hidden, weight, targets, upstream) for _ in range(2))
        testing.assert_bitwise_equal(first[0], plain, "nll")
        for a, b, name in zip(first, second, ("nll", "dhidden", "dweight"), strict=True):
            testing.assert_bitwise_equal(a, b, name)
    frozen = make_op(gemm)(hidden.clone().requires_grad_(), weight, targets)
    testing.assert_bitwise_equal(frozen.detach(), plain, "nll with a frozen head")


def test_linear_cross_entropy__no_rows_and_one_class():
    hidden, weight, targets, _ = make_inputs(0, 100, 64, torch.bfloat16)
    nll, dhidden, dweight = gradients(make_op(), hidden, weight, targets, targets.float())
    assert nll.shape == (0,) and dhidden.shape == (0, 64)
    assert torch.equal(dweight, torch.zeros_like(dweight))
    hidden, weight, targets, upstream = make_inputs(5, 1, 64, torch.bfloat16)
    for value in gradients(make_op(), hidden, weight, targets, upstream):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__offsets_beyond_32_bits(gemm):
    # N * V = 2.5e9 kept values; only the last rows receive a gradient, so only they decide the gradients.
    N, V, D = 20000, 126464, 64
    with room_on_the_device(16):
        _check_last_rows(gemm, N, V, D)


def _check_last_rows(gemm, N, V, D):
    hidden, weight, targets, upstream = make_inputs(N, V, D, torch.bfloat16)
    last = slice(N - 64, N)
    upstream[: N - 64] = 0.0
    assert plan_linear_cross_entropy(hidden.requires_grad_(), weight.requires_grad_()).keep_tiles is False
    found = gradients(make_op(gemm), hidden.detach(), weight.detach(), targets, upstream)
    assert torch.equal(found[1][: N - 64], torch.zeros_like(found[1][: N - 64]))
    hidden, weight = hidden.detach()[last], weight.detach()
    testing.assert_ratios(
        testing.linear_cross_entropy_ratios(
            found[0][last], found[1][last], found[2], hidden, weight, targets[last], upstream[last]
        )
    )


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__frozen_head_needs_only_tiles(gemm):
    hidden, weight, targets, upstream = make_inputs(8192, 126464, 512, torch.bfloat16)
    tiles = tiles_for(torch.cuda.get_device_capability(), 2)
    num_sms = torch.cuda.get_device_properties("cuda").multi_processor_count
    hidden.requires_grad_()
    make_op(gemm)(hidden, weight, targets).backward(upstream)  # compiles; cuBLAS takes its workspace
    hidden.grad = None
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    make_op(gemm)(hidden, weight, targets).backward(upstream)
    used = torch.cuda.max_memory_allocated() - before
    both_gradients = 8192 * 512 * (4 + 2)  # fp32 in forward, bf16 in backward
    one_tile = tiles.rows * tiles.forward_cols(tiles.rows, num_sms) * (4 + 2)
    assert used <= 1.2 * (both_gradients + one_tile), f"{used / 2**20:.0f} MiB"


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
def test_linear_cross_entropy__never_waits_for_the_device(gemm, kept_tile_bytes, no_host_sync):
    inputs = make_inputs(300, 9000, 128, torch.bfloat16)
    gradients(make_op(gemm, kept_tile_bytes), *inputs)
    no_host_sync()
    gradients(make_op(gemm, kept_tile_bytes), *inputs)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
def test_linear_cross_entropy__can_be_captured_in_a_cuda_graph(gemm, kept_tile_bytes):
    hidden, weight, targets, upstream = make_inputs(300, 9000, 128, torch.bfloat16)
    hidden.requires_grad_()
    weight.requires_grad_()

    def step():
        nll = make_op(gemm, kept_tile_bytes)(hidden, weight, targets)
        return (nll, *torch.autograd.grad(nll, (hidden, weight), upstream))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        hidden.neg_()  # other values in the same memory
    graph.replay()
    for found, expected, name in zip(captured, step(), ("nll", "dhidden", "dweight"), strict=True):
        testing.assert_bitwise_equal(found.detach(), expected.detach(), name)


def test_linear_cross_entropy__compiles_without_a_graph_break():
    hidden, weight, targets, _ = make_inputs(300, 9000, 128, torch.bfloat16)

    def loss(hidden, weight):
        return torch.nn.functional.softplus(linear_cross_entropy(hidden, weight, targets).sum() / 100)

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        function(*leaves).backward()
        results.append([leaf.grad for leaf in leaves])
    for found, expected in zip(results[1], results[0], strict=True):
        # softplus may be rounded differently by the compiler: that scales everything by 1 + a few ulp.
        assert (found - expected).norm() <= 2**-8 * expected.norm()


def test_linear_cross_entropy__autocast_equals_an_explicit_cast():
    hidden, weight, targets, _ = make_inputs(300, 9000, 128, torch.float32)
    with torch.autocast("cuda", torch.bfloat16):
        found = linear_cross_entropy(hidden, weight, targets)
    expected = linear_cross_entropy(hidden.bfloat16(), weight.bfloat16(), targets)
    testing.assert_bitwise_equal(found, expected, "nll")


@pytest.mark.parametrize(("gemm", "dtype"), FORMS, ids=name_of)
def test_linear_cross_entropy_replay__gradients_without_kept_tiles(gemm, dtype):
    testing.assert_linear_cross_entropy(make_replay(gemm), *make_inputs(1500, 20000, 256, dtype))


def test_linear_cross_entropy__stages_move_no_bit(monkeypatch):
    inputs, results = make_inputs(300, 20000, 256, torch.bfloat16), []
    for stages in (3, 4):
        use_small_tiles(monkeypatch, num_stages=stages, num_stages_few_rows=stages)
        for kept_tile_bytes in (KEEP, RECOMPUTE):
            results.append(gradients(make_op("fused", kept_tile_bytes), *inputs))
    for found, expected in zip(results[2:], results[:2], strict=True):
        for a, b, name in zip(found, expected, ("nll", "dhidden", "dweight"), strict=True):
            testing.assert_bitwise_equal(a, b, name)


@pytest.mark.parametrize(("head", "gemm"), [("plain", "cublas"), ("whole", "fused")])
def test_operators__pass_opcheck(head, gemm):
    hidden, weight, targets, upstream = make_inputs(9, 70, 16, torch.float16)
    bias = weight[:, 0].contiguous() if head == "whole" else None
    for operator, arguments in operator_calls(hidden, weight, bias, targets, upstream, gemm):
        torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("in_place", [False, True], ids=["fresh", "in_place"])
@pytest.mark.parametrize("V", [2, 1000, 126464])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_cross_entropy__within_the_policy(dtype, V, in_place):
    generator = torch.Generator().manual_seed(V)
    logits = torch.randn(60, V, generator=generator).mul_(8).to("cuda", dtype)
    rows = torch.randperm(60, generator=generator)[:37].cuda()
    targets = torch.randint(V, (37,), generator=generator).cuda()
    upstream = testing.wide_range_upstream(37, generator).cuda()
    source = logits.clone().requires_grad_()
    nll = cross_entropy(source * 1, targets, rows, in_place=in_place)
    nll.backward(upstream)
    chosen = logits[rows]
    truth = cross_entropy_reference.cross_entropy(chosen.double(), targets)
    baseline = cross_entropy_reference.cross_entropy(chosen.float(), targets)
    gradient = cross_entropy_reference.gradient(upstream.double(), chosen.double(), targets)
    rounded = cross_entropy_reference.gradient(upstream, chosen.float(), targets).to(dtype)
    testing.assert_ratios(
        {
            "nll": testing.fp32_error_ratio(nll.detach(), truth, baseline),
            "dlogits": testing.matrix_error_ratio(source.grad[rows], gradient, rounded),
        }
    )
    source.grad[rows] = 0
    assert torch.equal(source.grad, torch.zeros_like(source.grad))


def test_cross_entropy__offsets_beyond_32_bits_in_place_without_a_copy(no_host_sync):
    with room_on_the_device(16):
        _check_in_place_at_the_end(20000, 126464, no_host_sync)


def _check_in_place_at_the_end(M, V, no_host_sync):
    logits = torch.zeros(M, V, dtype=torch.bfloat16, device="cuda")
    tail = torch.randn(3, V, device="cuda").mul_(4).bfloat16()
    logits[-3:] = tail
    rows = torch.tensor([M - 1, M - 3], device="cuda")
    targets = torch.tensor([V - 1, 5], device="cuda")
    upstream = torch.tensor([0.3, -2.0], device="cuda")
    nll = cross_entropy(logits[:9].clone().requires_grad_() * 1, targets, rows % 9, in_place=True)
    nll.backward(upstream)  # compiles
    logits = logits.requires_grad_() * 1  # a leaf may not be overwritten with its own gradient
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    no_host_sync()
    nll = cross_entropy(logits, targets, rows, in_place=True)
    (dlogits,) = torch.autograd.grad(nll, logits, upstream)
    torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < 2**22
    chosen = tail[[2, 0]]
    truth = cross_entropy_reference.gradient(upstream.double(), chosen.double(), targets)
    rounded = cross_entropy_reference.gradient(upstream, chosen.float(), targets).bfloat16()
    testing.assert_ratios({"dlogits": testing.matrix_error_ratio(dlogits[rows], truth, rounded)})
    assert not dlogits[M - 2].any() and not dlogits[0].any()


def _draw(lengths, by_rank, seed):
    generator = torch.Generator().manual_seed(seed % 2**32)
    length_S = torch.tensor(lengths)
    segments = len(lengths)
    counter_S3 = torch.randint(0, 2**32, (segments, 3), generator=generator)
    first_S = torch.randint(0, 2**32 + 1, (segments,), generator=generator)
    limit_S = length_S if by_rank else torch.full_like(length_S, 2**32)
    count_S = (torch.empty(segments).uniform_(generator=generator).double() * (limit_S + 1)).long()
    return length_S, counter_S3, first_S, count_S.minimum(limit_S)


@pytest.mark.parametrize("by_rank", [True, False], ids=["by_rank", "by_word"])
@pytest.mark.parametrize("seed", [0, 12345, 2**31 + 5, 2**40 + 7, 2**64 - 1])
def test_mask_select__bit_identical_to_the_reference(seed, by_rank):
    draw = _draw([1, 2, 3, 4, 5, 511, 512, 4095, 4096, 4097, 10000, 300000, *range(20, 180)], by_rank, seed)
    found = mask_select(*(tensor.cuda() for tensor in draw), seed=seed, by_rank=by_rank)
    expected = mask_select_reference.mask_select(*draw, seed, by_rank)
    testing.assert_bitwise_equal(found[0].cpu(), expected[0], "position_N")
    testing.assert_bitwise_equal(found[1].cpu(), expected[1], "offsets_S1")


def test_mask_select__equal_words_are_ordered_by_position():
    # With this seed and counter, positions 394 and 785 draw the same word, of ranks 1305 and 1306.
    length_S, counter_S3 = torch.tensor([2000, 2000]), torch.tensor([[162, 0, 0], [162, 0, 0]])
    draw = (length_S, counter_S3, torch.tensor([0, 1306]), torch.tensor([1306, 694]))
    position_N, offsets_S1 = mask_select(*(tensor.cuda() for tensor in draw), seed=7, by_rank=True)
    expected = mask_select_reference.mask_select(*draw, 7, True)
    testing.assert_bitwise_equal(position_N.cpu(), expected[0], "position_N")
    testing.assert_bitwise_equal(offsets_S1.cpu(), expected[1], "offsets_S1")


def test_mask_select__by_rank_never_waits_for_the_device(no_host_sync):
    draw = [tensor.cuda() for tensor in _draw([100, 512, 4096, 9000], True, 3)]
    total = int(draw[3].sum())
    expected = mask_select(*draw, seed=3, by_rank=True)
    no_host_sync()
    found = mask_select(*draw, seed=3, by_rank=True, num_rows=total)
    torch.cuda.set_sync_debug_mode("default")
    testing.assert_bitwise_equal(found[0], expected[0], "position_N")


def _masked_batch(num_samples, prompt_lengths, response_lengths):
    """(tokens_U, prompt_length_R, response_length_R, position_N, offsets_S1); tokens hold the mask id 3."""
    generator = torch.Generator().manual_seed(num_samples)
    prompt, response = torch.tensor(prompt_lengths).long(), torch.tensor(response_lengths).long()
    tokens_U = torch.randint(5, (int((prompt + response).sum()),), generator=generator)
    length_S = response.repeat_interleave(num_samples)
    share_S = torch.rand(len(length_S), generator=generator)  # from hardly any to nearly all
    drawn = torch.rand(int(length_S.sum()), generator=generator) < share_S.repeat_interleave(length_S)
    starts = (length_S.cumsum(0) - length_S).repeat_interleave(length_S)
    position_N = (torch.arange(len(drawn)) - starts)[drawn]
    offsets_S1 = torch.tensor([0, *(int(part.sum()) for part in drawn.split(length_S.tolist()))]).cumsum(0)
    return tokens_U, prompt, response, position_N, offsets_S1


PACKS = [
    pytest.param(8, [0, 5, 511, 40], [0, 512, 513, 4096], id="K8-four_responses"),
    pytest.param(3, [7] * 1500, list(range(1500)), id="K3-1500_responses"),
    pytest.param(1, [10], [300000], id="K1-one_long_response"),
    pytest.param(2, [], [], id="K2-no_responses"),
]


@pytest.mark.parametrize(("num_samples", "prompt_lengths", "response_lengths"), PACKS)
def test_pack_masked__bit_identical_to_the_reference_without_host_sync(
    num_samples, prompt_lengths, response_lengths, no_host_sync
):
    batch = _masked_batch(num_samples, prompt_lengths, response_lengths)
    on_device = [tensor.cuda() for tensor in batch]
    options = {"num_samples": num_samples, "mask_token_id": 3}
    pack_masked(*on_device, **options)  # compiles
    no_host_sync()
    with testing.poisoned_empty():
        pack = pack_masked(*on_device, **options)
    torch.cuda.set_sync_debug_mode("default")
    expected = pack_masked_reference.pack_masked(*batch, num_samples, 3)
    for found, wanted, name in zip(pack, expected, PackedTokens._fields, strict=True):
        testing.assert_bitwise_equal(found.cpu(), wanted, name)


@pytest.mark.parametrize(("num_samples", "prompt_lengths", "response_lengths"), PACKS)
def test_token_weight_sums__bit_identical_to_the_reference_without_host_sync(
    num_samples, prompt_lengths, response_lengths, no_host_sync
):
    _, _, response, position_N, offsets_S1 = _masked_batch(num_samples, prompt_lengths, response_lengths)
    weight_N = testing.wide_range_upstream(len(position_N), torch.Generator().manual_seed(2))
    rows = (weight_N, position_N, offsets_S1, response)
    on_device = [tensor.cuda() for tensor in rows]
    num_tokens = int(response.sum())
    options = {"num_samples": num_samples, "num_tokens": num_tokens}
    token_weight_sums(*on_device, **options)  # compiles
    no_host_sync()
    with testing.poisoned_empty():
        found = token_weight_sums(*on_device, **options)
    torch.cuda.set_sync_debug_mode("default")
    expected = pack_masked_reference.token_weight_sums(*rows, num_samples, num_tokens)
    for got, wanted, name in zip(found, expected, ("sum_M", "sum_N"), strict=True):
        testing.assert_bitwise_equal(got.cpu(), wanted, name)
