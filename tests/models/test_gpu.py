"""What only a GPU can show of the models: the variable-length attention, 16-bit layers, ops on CUDA tensors.

Runs without the suite's conftest (`pytest --noconftest`), so that a bare CUDA machine can run it. Where no
result is known bit for bit, errors are measured in float64 and allowed to be twice those of plain PyTorch in
the same dtype on the same inputs (`vrpo_kernels.testing`): both round the same truth to 16 bits.
"""

import os
from itertools import pairwise

# cuBLAS reads it once, before its first product; without it deterministic algorithms are refused.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

pytest.importorskip("transformers")  # before what imports it

from packs import pack, random_segments
from plain_llada import PlainLLaDA

from vrpo.models import LLaDAConfig, LLaDAForMaskedDiffusion, choose_attention
from vrpo.models.attention import Segments, attend_packed
from vrpo.models.layers import RMSNorm, RotaryEmbedding, rotate
from vrpo_kernels import elbo_from_hidden, elbo_from_logits, gather_rows, segment_sum, testing
from vrpo_kernels.testing import ROUNDOFF, assert_bitwise_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    # What a newer or older torch deprecates is reported and no fault of the results.
    pytest.mark.filterwarnings("default"),
]
DEVICE, DTYPE, VARLEN = "cuda", torch.bfloat16, "torch_varlen"
LENGTHS = [1, 63, 64, 65, 200, 200, 1000, 1024, 7, 1024, 129]
HEAD_SIZE = 128
CLASSES = 126464  # LLaDA's padded vocabulary
REPEATS = 50


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def to_segments(lengths):
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)
    return Segments(cu, max(lengths))


def random_qkv(lengths=LENGTHS, heads=8, key_heads=8, seed=0):
    """Queries twice as large as they come, so that attention is not flat."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), h, HEAD_SIZE) for h in (heads, key_heads, key_heads)]
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(DEVICE, DTYPE) for tensor in (2 * query, key, value)]


def attend(query, key, value, lengths=LENGTHS, requested=VARLEN):
    scale = HEAD_SIZE**-0.5
    return attend_packed(query, key, value, to_segments(lengths), scale=scale, requested=requested)


def formula(query, key, value, lengths=LENGTHS):
    """softmax(q k^T / sqrt(d)) v, segment by segment, in the dtype of the inputs."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    outputs = []
    for start, end in pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]):
        q, k, v = (tensor[start:end].transpose(0, 1) for tensor in (query, key, value))
        weights = (q @ k.transpose(1, 2) * HEAD_SIZE**-0.5).softmax(dim=-1)
        outputs.append((weights @ v).transpose(0, 1))
    return torch.cat(outputs)


def with_gradients(function, tensors, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in tensors]
    output = function(*leaves)
    return output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))


def upstream_of(query):
    return torch.randn(query.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE, DTYPE)


def relative_error(found, truth):
    return ((found.double() - truth.double()).norm() / truth.double().norm()).item()


def lines(tensor):
    """One row per token and head."""
    return tensor.reshape(-1, tensor.shape[-1])


def test_choose_attention__takes_a_kernel_for_variable_lengths():
    name, reason = choose_attention(DEVICE, DTYPE)
    assert name in ("flash_attn", "torch_varlen"), reason
    assert choose_attention(DEVICE, torch.float32)[0] == "sdpa"


@pytest.mark.parametrize("key_heads", [8, 2], ids=["as_many_key_heads", "grouped"])
@pytest.mark.parametrize("requested", [VARLEN, "sdpa"])
def test_attend_packed__within_twice_the_error_of_the_formula(requested, key_heads):
    tensors = random_qkv(key_heads=key_heads)
    upstream = upstream_of(tensors[0])
    found = with_gradients(lambda *qkv: attend(*qkv, requested=requested), tensors, upstream)
    truth = with_gradients(formula, [tensor.double() for tensor in tensors], upstream)
    baseline = with_gradients(formula, tensors, upstream)
    output = testing.matrix_error_ratio(*(lines(side[0]) for side in (found, truth, baseline)))
    testing.assert_ratios({"output": output})
    for index, name in ((1, "dquery"), (2, "dkey"), (3, "dvalue")):
        # Not row by row: where attention is sharp a row's gradient is a difference of nearly equal numbers,
        # one of which, dout . out, flash attention takes from the output rounded to 16 bits.
        wrong, plain = (relative_error(side[index], truth[index]) for side in (found, baseline))
        assert 0 < wrong <= 2 * plain + ROUNDOFF[DTYPE], name


def test_attend_packed__varlen_agrees_with_sdpa():
    """Each rounds its output once and its weights once, relative to u: |difference| <= 2 (2 u) max|v|."""
    tensors = random_qkv()
    varlen, sdpa = attend(*tensors), attend(*tensors, requested="sdpa")
    bound = 4 * ROUNDOFF[DTYPE] * tensors[2].abs().max().item()
    assert (varlen.float() - sdpa.float()).abs().max().item() <= bound


def test_attend_packed__a_segment_alone_gives_what_it_gives_in_a_pack():
    """Another number of segments may change the order of sums, hence the bound and not bit for bit."""
    tensors = random_qkv()
    together = attend(*tensors).split(LENGTHS)
    alone = [
        attend(*parts, lengths=[length])
        for length, *parts in zip(LENGTHS, *(tensor.split(LENGTHS) for tensor in tensors), strict=True)
    ]
    same = [torch.equal(a, b) for a, b in zip(together, alone, strict=True)]
    print(f"bitwise equal: {sum(same)} of {len(same)} segments")
    bound = 4 * ROUNDOFF[DTYPE] * tensors[2].abs().max().item()
    for a, b in zip(together, alone, strict=True):
        assert (a.float() - b.float()).abs().max().item() <= bound


@pytest.mark.parametrize("requested", [VARLEN, "sdpa"])
def test_attend_packed__nothing_crosses_a_boundary(requested):
    """Every output outside of the changed segment keeps its bits, and every gradient that belongs there."""
    tensors, upstream = random_qkv(), upstream_of(random_qkv()[0])
    start = sum(LENGTHS[:6])
    inside = slice(start, start + LENGTHS[6])
    before = with_gradients(lambda *qkv: attend(*qkv, requested=requested), tensors, upstream)
    for tensor, other in zip(tensors, random_qkv(seed=1), strict=True):
        tensor[inside] = other[inside]
    after = with_gradients(lambda *qkv: attend(*qkv, requested=requested), tensors, upstream)
    outside = torch.ones(sum(LENGTHS), dtype=torch.bool, device=DEVICE)
    outside[inside] = False
    assert_bitwise_equal(after[0][outside], before[0][outside], "output")
    assert not torch.equal(after[0][inside], before[0][inside])
    for found, expected in zip(after[1:], before[1:], strict=True):
        # The order of atomic additions may move the last bits, a leak would move the first.
        scale = expected[outside].abs().max()
        assert (found[outside] - expected[outside]).abs().max() <= 4 * ROUNDOFF[DTYPE] * scale


def test_attend_packed__forward_repeats_bit_for_bit():
    tensors = random_qkv()
    first = attend(*tensors)
    for _ in range(REPEATS):
        assert_bitwise_equal(attend(*tensors), first, "output")


def test_attend_packed__backward_repeats_bit_for_bit_when_asked_to(deterministic):
    tensors = random_qkv()
    upstream = upstream_of(tensors[0])
    first = with_gradients(attend, tensors, upstream)
    for _ in range(REPEATS // 5):
        found = with_gradients(attend, tensors, upstream)
        for part, expected, name in zip(found, first, ("output", "dq", "dk", "dv"), strict=True):
            assert_bitwise_equal(part, expected, name)


def test_attend_packed__backward_by_default_repeats_within_its_roundoff():
    """Unless deterministic algorithms are on, flash attention adds dquery with atomics, in float32.

    Their order changes the float32 sums by a few u32 and so the rounded result by at most one unit in the
    last place; the other gradients have one owner each. How often it happened is printed.
    """
    tensors = random_qkv()
    upstream = upstream_of(tensors[0])
    first = with_gradients(attend, tensors, upstream)
    changed = [0, 0, 0, 0]
    for _ in range(REPEATS // 5):
        for index, (part, expected) in enumerate(
            zip(with_gradients(attend, tensors, upstream), first, strict=True)
        ):
            changed[index] += not torch.equal(part, expected)
            bound = 4 * ROUNDOFF[DTYPE] * expected.float().abs() + 1e-3 * expected.float().abs().max()
            assert ((part.float() - expected.float()).abs() <= bound).all()
    print(f"repeats that differ in output, dq, dk, dv: {changed} of {REPEATS // 5}")
    assert changed[0] == 0


# The model.


@pytest.fixture(scope="module")
def model():
    """Two layers and LLaDA's vocabulary; weights large enough that every part matters."""
    config = LLaDAConfig(
        d_model=256,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        mlp_hidden_size=512,
        embedding_size=CLASSES,
        max_sequence_length=4096,
        rope_theta=500000.0,
        mask_token_id=CLASSES - 1,
        attn_implementation="vrpo",
    )
    with torch.device("meta"):
        made = LLaDAForMaskedDiffusion(config).to(DTYPE)
    made.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(0)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.dim() == 1:
                parameter.uniform_(0.5, 1.5, generator=generator)
            else:
                parameter.normal_(std=0.08, generator=generator)
    return made.eval()


MODEL_LENGTHS = [40, 40, 3, 128, 1, 77]


def scored_pack(seed=0):
    """(pack on the device, rows, targets, segments): every second token is scored."""
    segments = random_segments(MODEL_LENGTHS, seed=seed)
    inputs = {
        key: value.to(DEVICE) if torch.is_tensor(value) else value for key, value in pack(segments).items()
    }
    rows = torch.arange(0, sum(MODEL_LENGTHS), 2, device=DEVICE)
    targets = torch.arange(len(rows), device=DEVICE) * 7919 % CLASSES
    return inputs, rows, targets, segments


def plain_nll(plain, segments, rows, targets):
    """The same rows by the second implementation, one segment at a time, full logits."""
    with torch.device(DEVICE):
        hidden = torch.cat([plain(segment.to(DEVICE)) for segment in segments])[rows]
        wide = hidden.to(torch.promote_types(hidden.dtype, torch.float32))
        return torch.nn.functional.cross_entropy(wide, targets, reduction="none")


def test_model__nll_and_gradients_against_a_second_implementation_in_float64(model):
    inputs, rows, targets, segments = scored_pack()
    upstream = testing.wide_range_upstream(len(rows), torch.Generator().manual_seed(3)).to(DEVICE)
    model.zero_grad()
    nll = model(**inputs, rows=rows, targets=targets).nll
    nll.backward(upstream)
    truth, baseline = (PlainLLaDA.like(model, dtype) for dtype in (torch.float64, DTYPE))
    values = []
    for plain in (truth, baseline):
        values.append(plain_nll(plain, segments, rows, targets))
        values[-1].backward(upstream.to(values[-1].dtype))
    error = (nll.detach() - values[0].detach()).abs().max()
    assert error <= 2 * (values[1].detach() - values[0].detach()).abs().max() + 1e-5
    for name, parameter in model.named_parameters():
        expected = truth.gradient_of(name)
        wrong = relative_error(parameter.grad, expected)
        plain = relative_error(baseline.gradient_of(name), expected)
        assert 0 < wrong <= 2 * plain + ROUNDOFF[DTYPE], name
    model.zero_grad()


@torch.no_grad()
def test_model__a_segment_alone_is_as_right_as_in_a_pack(model):
    """Matrix products of other shapes add in another order, so both are held against the truth."""
    inputs, rows, targets, segments = scored_pack()
    truth = plain_nll(PlainLLaDA.like(model), segments, rows, targets)
    together = model(**inputs, rows=rows, targets=targets).nll
    alone, first = [], 0
    for segment in segments:
        inside = (rows >= first) & (rows < first + len(segment))
        one = {
            key: value.to(DEVICE) if torch.is_tensor(value) else value
            for key, value in pack([segment]).items()
        }
        alone.append(model(**one, rows=rows[inside] - first, targets=targets[inside]).nll)
        first += len(segment)
    errors = [(nll - truth).abs().max().item() for nll in (together, torch.cat(alone))]
    assert errors[0] <= 2 * errors[1] + 1e-5 and errors[1] <= 2 * errors[0] + 1e-5


@torch.no_grad()
def test_model__changing_a_segment_leaves_the_others_bitwise_equal(model):
    inputs, rows, targets, _ = scored_pack()
    before = model(**inputs, rows=rows, targets=targets).nll
    start = sum(MODEL_LENGTHS[:3])
    inputs["input_ids"][0, start : start + MODEL_LENGTHS[3]] += 1
    after = model(**inputs, rows=rows, targets=targets).nll
    inside = (rows >= start) & (rows < start + MODEL_LENGTHS[3])
    assert_bitwise_equal(after[~inside], before[~inside], "nll of the other segments")
    assert not torch.equal(after[inside], before[inside])


def test_model__nll_repeats_bit_for_bit_with_and_without_gradients(model):
    inputs, rows, targets, _ = scored_pack()
    first = model(**inputs, rows=rows, targets=targets).nll.detach()
    with torch.no_grad():
        for _ in range(REPEATS):
            found = model(**inputs, rows=rows, targets=targets).nll
            assert_bitwise_equal(found, first, "nll")


def test_model__gradients_repeat_bit_for_bit_when_asked_to(model, deterministic):
    inputs, rows, targets, _ = scored_pack()
    results = []
    for _ in range(3):
        model.zero_grad()
        model(**inputs, rows=rows, targets=targets).nll.square().sum().backward()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for found in results[1:]:
        for name, gradient in found.items():
            assert_bitwise_equal(gradient, results[0][name], name)
    model.zero_grad()


# Its layers.


def projected_heads(dtype, lengths=MODEL_LENGTHS, heads=32, key_heads=8):
    """(query, key, rotation) of a pack: views of projections, positions that restart in each segment."""
    generator = torch.Generator().manual_seed(6)
    tokens = sum(lengths)
    query, key = (
        torch.randn(1, tokens, count * HEAD_SIZE, generator=generator)
        .to(DEVICE, dtype)
        .view(1, tokens, count, HEAD_SIZE)
        .transpose(1, 2)
        for count in (heads, key_heads)
    )
    positions = torch.cat([torch.arange(length) for length in lengths]).to(DEVICE)
    config = LLaDAConfig(d_model=HEAD_SIZE, n_heads=1, n_layers=1, embedding_size=8, rope_theta=500000.0)
    return query, key, RotaryEmbedding(config)(query, positions[None])


def rotated_by_formula(heads, rotation):
    """x cos + (-x_high, x_low) sin, every step a kernel of its own, rounded to the dtype of x at the end."""
    low, high = heads.chunk(2, dim=-1)
    other = torch.cat((-high, low), dim=-1)
    wide = heads * rotation.cos_BLd[:, None] + other * rotation.sin_BLd[:, None]
    return wide.to(heads.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_rotate__equals_the_formula_bit_for_bit_in_a_pack(dtype):
    query, key, rotation = projected_heads(dtype)
    with testing.poisoned_empty():
        found = rotate(query, key, rotation)
    for turned, heads, name in zip(found, (query, key), ("query", "key"), strict=True):
        assert_bitwise_equal(turned.contiguous(), rotated_by_formula(heads, rotation).contiguous(), name)
        assert turned.transpose(1, 2).is_contiguous()  # attention takes it without a copy
    start = MODEL_LENGTHS[0]  # position 0 turns nothing
    assert_bitwise_equal(found[0][:, :, start].contiguous(), query[:, :, start].contiguous(), "position 0")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotate__gradient_is_rounded_once(dtype):
    query, key, rotation = projected_heads(dtype)
    upstream = [heads.roll(1, 2) for heads in (query, key)]

    def gradients_in(kind):
        leaves = [heads.detach().to(kind).requires_grad_() for heads in (query, key)]
        if kind is torch.float64:
            turned = [rotated_by_formula(heads, rotation) for heads in leaves]
        else:
            turned = rotate(*leaves, rotation)
        return torch.autograd.grad(turned, leaves, [g.to(kind) for g in upstream])

    for found, exact in zip(gradients_in(dtype), gradients_in(torch.float64), strict=True):
        # Half a unit in the last place, and what three roundings in float32 add to it.
        bound = ROUNDOFF[dtype] * exact.abs() * (1 + 1e-2) + 1e-6
        assert ((found.double() - exact).abs() <= bound).all()


def test_rotate__a_batch_shares_its_positions():
    query, key, _ = projected_heads(DTYPE, [128])
    batch = [heads.expand(3, -1, -1, -1) for heads in (query, key)]
    rotation = projected_heads(DTYPE, [128])[2]
    for turned, alone in zip(rotate(*batch, rotation), rotate(query, key, rotation), strict=True):
        assert_bitwise_equal(turned.contiguous(), alone.expand(3, -1, -1, -1).contiguous())


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rms_norm__is_rounded_twice_and_keeps_its_dtype(dtype, autocast):
    """Quotient, then product; float32 sums in another order may move the quotient by one unit."""
    generator = torch.Generator().manual_seed(7)
    x = 3 * torch.randn(200, 4096, generator=generator)
    norm = RMSNorm(4096, 1e-5).to(DEVICE, dtype)
    norm.weight.data.copy_(0.5 + torch.rand(4096, generator=generator))
    leaf = x.to(DEVICE, dtype).requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=autocast):
        found = norm(leaf)
    assert found.dtype == dtype
    wide = leaf.detach().double().requires_grad_()
    quotient = wide / (wide.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()
    rounded = norm.weight * quotient.detach().to(dtype)
    share = (found != rounded).float().mean().item()
    print(f"elements that differ from those of the exact quotient: {share:.1e}")
    assert dtype is torch.float32 or share < 1e-2
    torch.testing.assert_close(found, rounded, rtol=max(4 * ROUNDOFF[dtype], 2e-6), atol=0)
    upstream = leaf.detach().roll(1, 0)
    (gradient,) = torch.autograd.grad(found, leaf, upstream)
    exact = (quotient * norm.weight.double() * upstream.double()).sum()
    (truth,) = torch.autograd.grad(exact, wide)
    assert gradient.dtype == dtype
    assert relative_error(gradient, truth) <= 2 * ROUNDOFF[dtype] + 1e-6


# Ops that have no kernel of their own.


def test_gather_rows__bit_identical_to_the_cpu():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(500, 64, generator=generator).to(DTYPE)
    rows = torch.randperm(500, generator=generator)[:123].sort().values
    upstream = torch.randn(123, 64, generator=generator).to(DTYPE)
    results = []
    for device in ("cpu", DEVICE):
        leaf = hidden.to(device).detach().requires_grad_()
        picked = gather_rows(leaf, rows.to(device))
        picked.backward(upstream.to(device))
        results.append((picked.detach().cpu(), leaf.grad.cpu()))
    assert_bitwise_equal(results[1][0], results[0][0], "rows")
    assert_bitwise_equal(results[1][1], results[0][1], "gradient")


def test_segment_sum__within_one_rounding_of_the_cpu_and_repeatable():
    """Summed in float64, in whatever order, and rounded once: at most neighbours in float32."""
    counts = [3, 0, 1, 500, 0, 40000, 17]
    generator = torch.Generator().manual_seed(0)
    value = torch.randn(sum(counts), generator=generator)
    offsets = torch.tensor([0, *counts]).cumsum(0)
    upstream = torch.randn(len(counts), generator=generator)
    expected = segment_sum(value, offsets)
    leaf = value.to(DEVICE).requires_grad_()
    found = segment_sum(leaf, offsets.to(DEVICE))
    found.backward(upstream.to(DEVICE))
    torch.testing.assert_close(found.detach().cpu(), expected, rtol=2**-23, atol=0)
    assert found[1] == 0 and found[4] == 0
    assert_bitwise_equal(leaf.grad.cpu(), upstream.repeat_interleave(torch.tensor(counts)), "gradient")
    for _ in range(REPEATS):
        assert_bitwise_equal(segment_sum(leaf.detach(), offsets.to(DEVICE)), found.detach(), "sum")


def elbo_inputs(dtype):
    """hidden (B, L, D), head (V, D), tokens, masked, weight of each sequence; sequence 1 has no mask."""
    generator = torch.Generator().manual_seed(4)
    hidden = torch.randn(4, 60, 96, generator=generator).mul_(0.3)
    weight = torch.randn(1000, 96, generator=generator)
    tokens = torch.randint(1000, (4, 60), generator=generator)
    masked = torch.rand(4, 60, generator=generator) < 0.5
    masked[1] = False
    row_weights = torch.rand(4, generator=generator) * 9 + 1
    return hidden.to(dtype), weight.to(dtype), tokens, masked, row_weights


def objective(elbo):
    """Signed and unequal upstream gradients, as VRPO's loss makes them."""
    return torch.nn.functional.softplus(-0.02 * (elbo[0] - elbo[2])) + 0.01 * elbo[3] + elbo[1]


def elbo_of(form, hidden, weight, rest):
    if form == "hidden":
        return elbo_from_hidden(hidden, weight, *rest)
    return elbo_from_logits(hidden @ weight.T, *rest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("form", ["hidden", "logits"])
def test_elbo__equals_the_cpu_and_repeats(form, dtype):
    hidden, weight, *rest = elbo_inputs(dtype)
    results = {}
    for name, device, kind in (
        ("truth", "cpu", torch.float64),
        ("baseline", "cpu", dtype),
        ("found", DEVICE, dtype),
        ("again", DEVICE, dtype),
    ):
        leaves = [tensor.to(device, kind).requires_grad_() for tensor in (hidden, weight)]
        elbo = elbo_of(form, *leaves, [tensor.to(device) for tensor in rest])
        gradients = torch.autograd.grad(objective(elbo), leaves)
        results[name] = [elbo.detach().cpu(), *(gradient.cpu() for gradient in gradients)]
    for found, again in zip(results["found"], results["again"], strict=True):
        assert_bitwise_equal(again, found, "a second call")
    truth, baseline, found = results["truth"], results["baseline"], results["found"]
    assert found[0].dtype is torch.float32 and found[0][1] == 0
    # bf16 logits are rounded before either side sees them, as the baseline's are.
    allowed = 2 * (baseline[0] - truth[0]).abs().max() + 2e-5 * truth[0].abs().max()
    assert (found[0] - truth[0]).abs().max() <= allowed
    for index, name in ((1, "dhidden"), (2, "dweight")):
        wrong, plain = (relative_error(side[index], truth[index]) for side in (found, baseline))
        assert wrong <= 2 * plain + max(ROUNDOFF[dtype] / 4, 8 * ROUNDOFF[torch.float32]), name
