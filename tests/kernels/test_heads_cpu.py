"""Heads with a bias, a soft-cap or a scale, and row metrics, in the C++ backend: values, gradients, bits."""

import pytest
import torch
import torch.nn.functional as F
from backends import ROUTES, every_route, needs_extension
from feature_orders import ratios_of, unluckiest_ratios
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from vrpo_kernels import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    testing,
)
from vrpo_kernels.linear_cross_entropy import cpu, op, reference

pytestmark = needs_extension
# (with a bias, soft-cap, scale)
HEADS = [(True, None, 1.0), (False, None, 0.3), (False, 3.0, 1.0), (True, 30.0, 2.5), (True, 0.5, 0.7)]
HEAD = pytest.mark.parametrize("head", HEADS, ids=lambda h: f"bias{int(h[0])}-cap{h[1]}-scale{h[2]}")
SHAPES = [(67, 513, 48), (67, 1031, 33), (1040, 1300, 24)]
SHAPE = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-V{}-D{}".format(*s))


def make_inputs(num_rows, num_classes, size, dtype, *, head, seed=0, spread=2.0):
    """(hidden, weight, targets, upstream), {bias, softcap, scale}; h . w has standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator).to(dtype)
    weight = (torch.randn(num_classes, size, generator=generator) * spread * size**-0.5).to(dtype)
    targets = torch.randint(num_classes, (num_rows,), generator=generator)
    upstream = testing.wide_range_upstream(num_rows, generator)
    bias = torch.randn(num_classes, generator=generator).to(dtype) if head[0] else None
    return (hidden, weight, targets, upstream), {"bias": bias, "softcap": head[1], "scale": head[2]}


def fused(gemm, budget=2**30):
    def run(hidden, weight, targets, **form):
        return linear_cross_entropy(
            hidden, weight, targets, backend="cpu", gemm=gemm, kept_tile_bytes=budget, **form
        )

    return run


def gradients(run, hidden, weight, targets, upstream, *, bias=None, **form):
    """(nll, dhidden, dweight, dbias) of run(hidden, weight, targets, bias=, softcap=, scale=)."""
    leaves = [part if part is None else part.detach().requires_grad_() for part in (hidden, weight, bias)]
    nll = run(leaves[0], leaves[1], targets, bias=leaves[2], **form)
    nll.backward(upstream.to(nll.dtype))
    return nll.detach(), *(leaf if leaf is None else leaf.grad for leaf in leaves)


def exact_logits(hidden, weight, bias, softcap, scale):
    bias = None if bias is None else bias.double()
    return reference.logits(hidden.double(), weight.double(), bias, softcap or 0.0, scale)


# ---- policy ----------------------------------------------------------------------------------------------


@every_route
@HEAD
@SHAPE
@pytest.mark.parametrize("budget", [2**30, 0], ids=["kept", "recomputed"])
def test_linear_cross_entropy__any_head_within_policy(budget, shape, head, gemm, dtype):
    inputs, form = make_inputs(*shape, dtype, head=head)
    with testing.poisoned_empty():
        for frozen in ({}, {"head_frozen": True}, {"hidden_frozen": True}):
            testing.assert_linear_cross_entropy(fused(gemm, budget), *inputs, **form, **frozen)


@every_route
@HEAD
def test_replay__any_head_within_policy(head, gemm, dtype):
    inputs, form = make_inputs(67, 1031, 33, dtype, head=head)
    known = linear_cross_entropy_statistics(*inputs[:3], **form, backend="cpu", gemm=gemm)

    def replay(hidden, weight, targets, **form):
        nll, drift = linear_cross_entropy_replay(
            hidden, weight, targets, *known, **form, backend="cpu", gemm=gemm
        )
        assert drift == 0
        return nll

    testing.assert_linear_cross_entropy(replay, *inputs, **form)
    testing.assert_linear_cross_entropy(replay, *inputs, **form, head_frozen=True)


@every_route
@pytest.mark.parametrize("budget", [2**30, 0], ids=["kept", "recomputed"])
def test_linear_cross_entropy__logits_far_beyond_the_cap_within_policy(budget, gemm, dtype):
    """|u| up to 50 c: most logits are +-c, to every digit, and carry no gradient; those near 0 carry all.

    Multiples of 1/8 make every h . w + b exact: the derivative's size hangs on how near u is to 0.
    """
    (hidden, weight, targets, upstream), form = make_inputs(
        64, 700, 32, torch.float32, head=(True, 0.5, 1.0), spread=8.0
    )
    form["bias"] = (8 * form["bias"]).round().to(dtype) / 8
    inputs = ((2 * hidden).round().to(dtype) / 2, (4 * weight).round().to(dtype) / 4, targets, upstream)
    logits = exact_logits(*inputs[:2], form["bias"], None, 1.0)
    assert logits.abs().max() > 50 * form["softcap"] and logits.abs().min() < 0.1 * form["softcap"]
    testing.assert_linear_cross_entropy(fused(gemm, budget), *inputs, **form)


@every_route
@pytest.mark.parametrize("budget", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_linear_cross_entropy__any_head_corrects_what_was_summed_under_a_lower_maximum(
    softcap, budget, gemm, dtype
):
    """The logits of odd rows climb from tile to tile, those of even rows fall: the shift moves."""
    inputs, form = make_inputs(33, 4 * cpu.TILE + 7, 24, dtype, head=(True, softcap, 0.5), spread=0.3)
    hidden, weight, *_ = inputs
    weight[:, 0] = (torch.arange(len(weight)) // cpu.TILE - 2) * 40
    hidden[:, 0] = 1 - 2 * (torch.arange(33) % 2 == 0).to(dtype)
    testing.assert_linear_cross_entropy(fused(gemm, budget), *inputs, **form)


@every_route
@pytest.mark.parametrize(("softcap", "scale"), [(None, 2.0), (30.0, 1.0), (50.0, 2.0)])
def test_linear_cross_entropy__peaked_rows_of_any_head_keep_relative_accuracy(softcap, scale, gemm, dtype):
    """Rows with p(target) close to 1: nll and the gradient of each row against its own size."""
    (hidden, weight, targets, upstream), form = make_inputs(64, 800, 64, dtype, head=(True, softcap, scale))
    weight = F.normalize(weight.float()).to(dtype)
    hidden = (25.0 * weight[targets].float()).to(dtype)  # the target's h . w is 25
    form["bias"] = 0.1 * form["bias"]

    def by_log_odds(hidden, weight, targets, bias, **settings):
        z = reference.logits(hidden, weight, bias, settings["softcap"] or 0.0, settings["scale"])
        others = z.scatter(1, targets[:, None], float("-inf")).logsumexp(1)
        return F.softplus(others - z.gather(1, targets[:, None])[:, 0], threshold=1e9)

    exact = {**form, "bias": form["bias"].double()}
    truth = gradients(by_log_odds, hidden.double(), weight.double(), targets, upstream, **exact)
    nll, dhidden, _, _ = gradients(fused(gemm), hidden, weight, targets, upstream, **form)
    assert truth[0].max() < 1e-3
    tolerance = 40 * 25 * scale * testing.ROUNDOFF[torch.float32]
    assert ((nll.double() - truth[0]).abs() < tolerance * truth[0]).all()
    allowed = (tolerance + 2 * testing.ROUNDOFF[dtype]) * truth[1].norm(dim=1)
    allowed += torch.finfo(dtype).smallest_normal * 64**0.5  # fp16 cannot hold the smallest gradients
    assert ((dhidden.double() - truth[1]).norm(dim=1) < allowed).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(0, 40),
    num_classes=st.sampled_from([2, 15, 16, 17, 511, 512, 513, 1100]),
    size=st.integers(1, 40),
    route=st.sampled_from(ROUTES),
    head=st.tuples(st.booleans(), st.sampled_from([None, 1.0, 30.0, 1e6]), st.floats(0.1, 4.0)),
    strided=st.booleans(),
    budget=st.sampled_from([0, 2**30]),
    seed=st.integers(0, 2**16),
)
def test_linear_cross_entropy__any_head_property(
    num_rows, num_classes, size, route, head, strided, budget, seed
):
    """Any shape, dtype, layout and head: within policy, same nll with and without gradients.

    In bf16 a gradient of few rows or of two classes is decided by the rounding of a few factors, in which the
    policy's baseline may be lucky. Of 60,000 random cases 400 exceeded the policy with at most four rows or
    two classes, the worst at 8.1 times what it allows, and 27 others, the worst at 2.7: here it is 10 and 3.
    Of 40,000 in fp16 none did. Targets as good as certain are left out: float64 gives them an nll of 0.

    In fp32 a gradient of few rows is decided by the rounding of one logit (the next test shows how often). So
    there it is the baseline that is the unluckiest of 32 orders of the features. Of 2182 random cases with at
    least four of them the worst was then 1.96 times what the policy allows, and 12 were above it: here it is
    2.5. With fewer features there are too few orders, and it is 4.
    """
    gemm, dtype = route
    inputs, form = make_inputs(num_rows, num_classes, size, dtype, head=head, seed=seed)
    logits = exact_logits(*inputs[:2], form["bias"], form["softcap"], form["scale"])
    assume((logits.softmax(1).gather(1, inputs[2][:, None]) < 1 - 1e-9).all())
    if strided and head[0]:
        form["bias"] = torch.stack([form["bias"], form["bias"] + 1], dim=1)[:, 0]
        assert form["bias"].stride(0) == 2
    results = gradients(fused(gemm, budget), *inputs, **form)
    testing.assert_bitwise_equal(
        fused(gemm, budget)(*inputs[:3], **form), results[0], "nll without gradients"
    )
    ratios = ratios_of(results, inputs, form)
    assert ratios["nll"] <= 1
    bound = 1.0
    if dtype is torch.bfloat16:
        bound = 10.0 if num_rows < 5 or num_classes == 2 else 3.0
    elif dtype is torch.float32:
        ratios = unluckiest_ratios(results, inputs, form, seed)
        bound = 2.5 if size >= 4 else 4.0
    assert max(ratios.values()) <= bound, ratios


def test_unluckiest_ratios__hold_the_formula_in_any_order_where_one_order_does_not():
    def formula(hidden, weight, targets, **form):
        return linear_cross_entropy(hidden, weight, targets, backend="reference", **form)

    (hidden, weight, *others), form = make_inputs(
        17, 513, 48, torch.float32, head=(False, 1e5, 1.0), spread=4.0
    )
    worst = {ratios_of: 0.0, unluckiest_ratios: 0.0}
    for seed in range(16):
        order = torch.randperm(48, generator=torch.Generator().manual_seed(1000 + seed))
        nll, dhidden, dweight, dbias = gradients(formula, hidden[:, order], weight[:, order], *others, **form)
        results = (nll, dhidden[:, order.argsort()], dweight[:, order.argsort()], dbias)
        for policy in worst:
            ratios = policy(results, (hidden, weight, *others), form)
            worst[policy] = max(worst[policy], *ratios.values())
    assert worst[ratios_of] > 1 >= worst[unluckiest_ratios], worst


@pytest.mark.parametrize("gemm", cpu.gemms(torch.float32))
def test_linear_cross_entropy__gradients_of_few_rows_are_as_exact_as_the_formula_in_another_order(gemm):
    """The policy's baseline itself, its features added up in another order, is outside of the policy in a
    fifth of such cases; ours in a tenth.
    """

    def formula(hidden, weight, targets, **form):
        return linear_cross_entropy(hidden, weight, targets, backend="reference", **form)

    beyond = {"ours": 0, "the formula": 0}
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        num_rows, size, tenths = (int(torch.randint(2, 41, (), generator=generator)) for _ in range(3))
        head = (seed % 2 == 0, (None, 1.0, 30.0, 1e6)[seed // 2 % 4], tenths / 10)
        inputs, form = make_inputs(
            num_rows, (2, 17, 513)[seed % 3], size, torch.float32, head=head, seed=seed
        )
        for name, run in (("ours", fused(gemm)), ("the formula", formula)):
            order = torch.randperm(size, generator=generator)
            ratios = ratios_of(gradients(run, *inputs, **form), inputs, form, order)
            beyond[name] += max(ratios.values()) > 1
    assert beyond["the formula"] > 0
    assert beyond["ours"] <= beyond["the formula"], beyond


# ---- the soft-cap's two functions, one number at a time --------------------------------------------------


@every_route
@pytest.mark.parametrize("softcap", [1e-3, 1.0, 30.0, 1e5])
def test_soft_cap__logit_and_derivative_keep_their_relative_accuracy(softcap, gemm, dtype):
    """With two classes and w = 0 for the target, the shift is the other's logit and the kept tile its
    derivative: to a few units of the last place, from 1e-6 c over saturation to +-40 c.
    """
    exponents = torch.arange(-6, 1.62, 0.005, dtype=torch.float64)
    hidden = softcap * 10**exponents
    if dtype is torch.float16:
        hidden = hidden[(hidden > 1e-4) & (hidden < 6e4)]
    hidden = hidden.to(dtype)[:, None]
    hidden = torch.cat([hidden, -hidden])[:, 0]
    weight = torch.tensor([[0.0], [1.0]], dtype=dtype)
    _, statistics, _, kept, _, _ = cpu.forward(
        hidden[:, None], weight, torch.zeros(len(hidden), dtype=torch.int64), bias=None, softcap=softcap,
        scale=1.0, gemm=gemm, want_dhidden=False, keep_tiles=True, want_metrics=False,
    )  # fmt: skip
    u = hidden.double()
    logit = softcap * (u / softcap).tanh()
    t = (-2 * u.abs() / softcap).exp()
    slope = 4 * t / (1 + t) ** 2
    u32 = testing.ROUNDOFF[torch.float32]
    assert ((statistics[1].double() - logit).abs() <= 6 * u32 * logit.abs()).all()
    # t is rounded like its exponent; and the tile's exp(logit - shift) is 1 but for the shift's own rounding
    allowed = 5 * u32 * (1 + u.abs() / softcap) + u32 * logit.abs()
    if kept.dtype is torch.bfloat16:
        allowed = allowed + testing.ROUNDOFF[dtype]
    found = kept[1, : len(hidden)].double()
    assert ((found - slope).abs() <= allowed * slope + 1e-37).all()


@every_route
def test_scale__of_a_power_of_two_gives_the_bits_of_a_scaled_head(gemm, dtype):
    inputs, _ = make_inputs(67, 1031, 40, dtype, head=(False, None, 1.0))
    hidden, weight, targets, upstream = inputs
    expected = gradients(fused(gemm), hidden, 2 * weight, targets, upstream)
    found = gradients(fused(gemm), hidden, weight, targets, upstream, softcap=None, scale=2.0)
    testing.assert_bitwise_equal(found[0], expected[0], "nll")
    testing.assert_bitwise_equal(found[1], expected[1], "dhidden")


@every_route
def test_bias__moves_classes_as_a_column_of_ones_does(gemm, dtype):
    """D + 1 columns, the last of hidden 1 and of weight the bias; its gradient is the bias's."""
    inputs, form = make_inputs(67, 600, 40, dtype, head=(True, 5.0, 1.5))
    hidden, weight, targets, upstream = inputs
    wider = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
    head = torch.cat([weight, form["bias"][:, None]], dim=1)
    truth = gradients(
        reference.linear_cross_entropy, wider.double(), head.double(), targets, upstream,
        bias=None, softcap=5.0, scale=1.5,
    )  # fmt: skip
    nll, dhidden, dweight, dbias = gradients(fused(gemm), *inputs, **form)
    tolerance = {"rtol": 0, "atol": 0.01 if dtype is torch.bfloat16 else 2e-3}
    for found, expected in [(nll, truth[0]), (dhidden, truth[1][:, :-1])]:
        torch.testing.assert_close(found.double(), expected, **tolerance)
    torch.testing.assert_close(torch.cat([dweight, dbias[:, None]], dim=1).double(), truth[2], **tolerance)


@every_route
@pytest.mark.parametrize("budget", [2**30, 0], ids=["kept", "recomputed"])
def test_bias__has_its_gradient_where_hidden_and_weight_want_none(budget, gemm, dtype):
    inputs, form = make_inputs(67, 1031, 40, dtype, head=(True, 5.0, 1.5))
    expected = gradients(fused(gemm, budget), *inputs, **form)[3]
    leaf = form["bias"].detach().requires_grad_()
    fused(gemm, budget)(*inputs[:3], **{**form, "bias": leaf}).backward(inputs[3])
    testing.assert_bitwise_equal(leaf.grad, expected, "dbias")
    assert leaf.grad.dtype is dtype


# ---- metrics ---------------------------------------------------------------------------------------------


def exact_metrics(hidden, weight, targets, shift, form):
    """The contract of `op._forward`'s metrics, in float64."""
    others = exact_logits(hidden, weight, form["bias"], form["softcap"], form["scale"])
    others = others.scatter(1, targets[:, None], float("-inf"))
    above = others - shift.double()[:, None]
    moment = torch.where(above.exp() == 0, 0.0, above * above.exp())
    return others.amax(dim=1), moment.sum(dim=1), moment.abs().sum(dim=1)


@every_route
@pytest.mark.parametrize("head", [(False, None, 1.0), *HEADS])
@pytest.mark.parametrize("climb", [0.0, 40.0], ids=["level", "climbing"])
def test_metrics__are_the_largest_other_logit_and_the_moment(climb, head, gemm, dtype):
    """With logits that climb or fall from tile to tile, the moment is carried from one shift to the next."""
    inputs, form = make_inputs(67, 3 * cpu.TILE + 9, 33, dtype, head=head)
    hidden, weight, targets, _ = inputs
    weight[:, 0] = (torch.arange(len(weight)) // cpu.TILE - 1) * climb
    hidden[:, 0] = 1 - 2 * (torch.arange(67) % 2 == 0).to(dtype)
    with testing.poisoned_empty():
        _, statistics, _, _, _, metrics = cpu.forward(
            hidden, weight, targets, **{**form, "softcap": form["softcap"] or 0.0}, gemm=gemm,
            want_dhidden=False, keep_tiles=False, want_metrics=True,
        )  # fmt: skip
    highest, moment, size = exact_metrics(hidden, weight, targets, statistics[1], form)
    raw = exact_logits(hidden, weight, form["bias"], None, form["scale"]).abs().amax(dim=1)
    rounding = 8 * testing.ROUNDOFF[torch.float32] * raw  # of a logit: products of both signs add up to it
    assert ((metrics[0].double() - highest).abs() <= rounding + 1e-7).all()
    assert ((metrics[1].double() - moment).abs() <= (rounding + 1e-6) * (size + statistics[2])).all()


@every_route
def test_metrics__what_came_before_a_new_shift_keeps_its_distance_to_it(gemm, dtype):
    """20,000 logits of 0, then one of 18, to which the shift moves: all of the entropy is in the former."""
    hidden, weight = torch.ones(16, 8, dtype=dtype), torch.zeros(20001, 8, dtype=dtype)
    weight[-1] = 18 / 8
    _, metrics = linear_cross_entropy(
        hidden, weight, torch.zeros(16, dtype=torch.int64), return_metrics=True, backend="cpu", gemm=gemm
    )
    entropy = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T).entropy()
    torch.testing.assert_close(metrics.entropy.double(), entropy, rtol=1e-5, atol=1e-6)


@every_route
@pytest.mark.parametrize("head", [(False, None, 1.0), *HEADS])
def test_metrics__come_with_the_same_nll_and_gradients(head, gemm, dtype):
    inputs, form = make_inputs(67, 1031, 33, dtype, head=head)

    def with_metrics(hidden, weight, targets, **form):
        nll, metrics = linear_cross_entropy(
            hidden, weight, targets, **form, return_metrics=True, backend="cpu", gemm=gemm
        )
        assert not any(part.requires_grad for part in metrics)
        return nll

    expected = gradients(fused(gemm), *inputs, **form)
    for found, wanted in zip(gradients(with_metrics, *inputs, **form), expected, strict=True):
        assert (found is None) == (wanted is None)
        if found is not None:
            testing.assert_bitwise_equal(found, wanted)
    for mode in ({"gemm": gemm, "budget": 0}, {"gemm": gemm}):
        with torch.no_grad():
            testing.assert_bitwise_equal(fused(**mode)(*inputs[:3], **form), expected[0])


@every_route
@HEAD
def test_row_metrics__are_those_of_the_softmax(head, gemm, dtype):
    inputs, form = make_inputs(130, 1031, 33, dtype, head=head)
    hidden, weight, targets, _ = inputs
    logits = exact_logits(hidden, weight, form["bias"], form["softcap"], form["scale"])
    targets[::2] = logits.argmax(dim=1)[::2]
    _, metrics = linear_cross_entropy(
        hidden, weight, targets, **form, return_metrics=True, backend="cpu", gemm=gemm
    )
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(metrics.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics.log_sum_exp.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    lead = logits.gather(1, targets[:, None])[:, 0] - logits.scatter(1, targets[:, None], -1e9).amax(1)
    clear = lead.abs() > 1e-4  # nearer ones are decided by rounding; many are equal where the cap saturates
    assert clear.sum() > 30 and torch.equal(metrics.top1[clear], (lead >= 0)[clear])


# ---- bits, layouts, edges --------------------------------------------------------------------------------


@HEAD
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "kept"])
@pytest.mark.parametrize(("gemm", "dtype"), [r for r in ROUTES if r[0] != "fp32"], ids=str)
def test_linear_cross_entropy__any_head_has_the_same_bits_on_any_number_of_threads(gemm, dtype, budget, head):
    """Also where rows fill several chunks. ("fp32" is torch.mm.)"""
    inputs, form = make_inputs(1100, 700, 40, dtype, head=head)
    threads = torch.get_num_threads()

    def run(count):
        torch.set_num_threads(count)
        return gradients(fused(gemm, budget), *inputs, **form)

    try:
        expected = run(1)
        for count in (2, 5):
            for found, wanted in zip(run(count), expected, strict=True):
                assert (found is None) == (wanted is None)
                if found is not None:
                    testing.assert_bitwise_equal(found, wanted)
    finally:
        torch.set_num_threads(threads)


@every_route
@HEAD
def test_linear_cross_entropy__any_head_reads_nothing_beside_its_inputs(head, gemm, dtype):
    """Views into larger arrays whose other elements are NaN, at any alignment, give the same bits."""
    inputs, form = make_inputs(35, 517, 33, dtype, head=head)
    hidden, weight, targets, upstream = inputs
    expected = gradients(fused(gemm), *inputs, **form)

    def embedded(tensor):
        larger = torch.full([n + 3 for n in tensor.shape], float("nan"), dtype=dtype)
        return larger[tuple(slice(1, 1 + n) for n in tensor.shape)].copy_(tensor)

    bias = None if form["bias"] is None else embedded(form["bias"])
    found = gradients(
        fused(gemm), embedded(hidden), embedded(weight), targets, upstream, **{**form, "bias": bias}
    )
    for a, b in zip(found, expected, strict=True):
        assert a is b is None or torch.equal(a, b)


@every_route
@pytest.mark.parametrize("head", [(True, None, 1.0), (False, 2.0, 1.0), (True, 2.0, 3.0)])
def test_linear_cross_entropy__any_head_passes_nan_on_and_hides_no_overflow(head, gemm, dtype):
    """tanh(inf) is 1: without care an overflow would look like a logit at the cap."""
    for value in (float("nan"), float("inf")):
        (hidden, weight, targets, _), form = make_inputs(20, 600, 8, dtype, head=head)
        hidden[3, 2] = value
        nll = fused(gemm)(hidden, weight, targets, **form)
        assert nll[3].isnan() and nll.isnan().sum() == 1
        if head[0]:
            (hidden, weight, targets, _), form = make_inputs(20, 600, 8, dtype, head=head)
            form["bias"][555] = value  # nobody's target: only the sums can tell
            targets[targets == 555] = 0
            assert fused(gemm)(hidden, weight, targets, **form).isnan().all()


@every_route
@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_bias__of_minus_infinity_takes_a_class_out(scale, gemm, dtype):
    (hidden, weight, targets, upstream), form = make_inputs(30, 600, 24, dtype, head=(True, None, scale))
    targets.clamp_(max=598)
    form["bias"][599] = float("-inf")
    found = gradients(fused(gemm), hidden, weight, targets, upstream, **form)
    shorter = {**form, "bias": form["bias"][:599]}
    expected = gradients(fused(gemm), hidden, weight[:599], targets, upstream, **shorter)
    testing.assert_bitwise_equal(found[0], expected[0], "nll")
    assert (found[2][599] == 0).all() and found[3][599] == 0


@every_route
@pytest.mark.parametrize("out", [slice(599, 600), slice(0, 512), slice(0, 600)], ids=["one", "tile", "all"])
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "kept"])
def test_bias__of_minus_infinity_is_at_the_softcap_as_in_the_formula(budget, out, gemm, dtype):
    """tanh(-inf) is -1: such a class has the logit -softcap. It used to be left out."""
    inputs, form = make_inputs(30, 600, 24, dtype, head=(True, 3.0, 1.5))
    inputs[2][:3] = torch.tensor([599, 0, 555])
    form["bias"][out] = float("-inf")
    nll, *grads = gradients(fused(gemm, budget), *inputs, **form)
    z = exact_logits(*inputs[:2], **form)
    torch.testing.assert_close(nll, F.cross_entropy(z, inputs[2], reduction="none").float())
    expected = gradients(
        lambda x, w, y, **form: linear_cross_entropy(x, w, y, backend="reference", **form), *inputs, **form
    )
    for part, wanted in zip(grads, expected[1:], strict=True):
        torch.testing.assert_close(part, wanted, rtol=0.02, atol=0.01 * float(wanted.abs().max()))
    _, metrics = linear_cross_entropy(*inputs[:3], **form, return_metrics=True, backend="cpu", gemm=gemm)
    entropy = torch.special.entr(z.softmax(1)).sum(1).float()
    torch.testing.assert_close(metrics.entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics.log_sum_exp, z.logsumexp(1).float())


@pytest.mark.parametrize("bias", [88.5, 88.7, 89.0, 266.0])
@every_route
def test_linear_cross_entropy__a_large_bias_makes_no_nan_of_lanes_without_rows(bias, gemm, dtype):
    """35 rows leave lanes empty, whose logits are the bias alone: its exponential overflows."""
    inputs, form = make_inputs(35, 600, 24, dtype, head=(True, None, 1.0))
    form["bias"] = torch.full_like(form["bias"], bias)
    for part in gradients(fused(gemm, 0), *inputs, **form):
        assert part.isfinite().all()


@every_route
def test_metrics__of_logits_far_apart_are_finite(gemm, dtype):
    """exp of a difference beyond 709 overflows in float64."""
    (hidden, weight, targets, _), form = make_inputs(40, 600, 24, dtype, head=(True, None, 1e4))
    targets[0] = exact_logits(hidden, weight, **form)[0].argmax()
    _, metrics = linear_cross_entropy(hidden, weight, targets, **form, return_metrics=True, gemm=gemm)
    z = exact_logits(hidden, weight, **form)
    entropy = torch.special.entr(z.softmax(1)).sum(1).float()
    torch.testing.assert_close(metrics.entropy, entropy, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(metrics.log_sum_exp, z.logsumexp(1).float(), rtol=1e-6, atol=0.0)
    assert torch.equal(metrics.top1, z.argmax(1) == targets)


@every_route
def test_metrics__of_a_target_that_is_out_are_those_of_the_others(gemm, dtype):
    (hidden, weight, targets, _), form = make_inputs(40, 600, 24, dtype, head=(True, None, 1.0))
    targets[:] = 7
    form["bias"][7] = float("-inf")
    nll, metrics = linear_cross_entropy(hidden, weight, targets, **form, return_metrics=True, gemm=gemm)
    z = exact_logits(hidden, weight, **form)
    entropy = torch.special.entr(z.softmax(1)).sum(1).float()
    torch.testing.assert_close(metrics.entropy, entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics.log_sum_exp, z.logsumexp(1).float())
    assert (nll == float("inf")).all() and not metrics.top1.any()
    form["bias"][:] = float("-inf")
    nll, metrics = linear_cross_entropy(hidden, weight, targets, **form, return_metrics=True, gemm=gemm)
    assert nll.isnan().all() and metrics.entropy.isnan().all()


@every_route
def test_metrics__classes_at_the_softcap_share_the_first_place(gemm, dtype):
    """0.05 lies between two float32 numbers, and the target's logit must be rounded as the others' are."""
    (hidden, weight, *_), form = make_inputs(40, 600, 24, dtype, head=(False, 0.05, 100.0))
    highest = exact_logits(hidden, weight, None, None, 1.0).topk(2, dim=1).indices
    for place in range(2):
        found = linear_cross_entropy(
            hidden, weight, highest[:, place], **form, return_metrics=True, gemm=gemm
        )
        assert found[1].top1.all()


@every_route
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_replay__a_target_that_is_out_does_not_drift(softcap, gemm, dtype):
    (hidden, weight, targets, _), form = make_inputs(40, 600, 24, dtype, head=(True, softcap, 1.5))
    form["bias"][targets[0]] = float("-inf")
    form |= {"backend": "cpu", "gemm": gemm}
    known = linear_cross_entropy_statistics(hidden, weight, targets, **form)
    _, drift = linear_cross_entropy_replay(hidden, weight, targets, *known, **form)
    assert drift == 0


@every_route
@HEAD
def test_linear_cross_entropy__a_single_class_is_certain(head, gemm, dtype):
    inputs, form = make_inputs(5, 1, 8, dtype, head=head)
    nll, *grads = gradients(fused(gemm), *inputs, **form)
    assert (nll == 0).all() and all(part is None or (part == 0).all() for part in grads)
    _, metrics = linear_cross_entropy(*inputs[:3], **form, return_metrics=True, backend="cpu", gemm=gemm)
    assert (metrics.entropy == 0).all() and metrics.top1.all()


@every_route
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "kept"])
def test_linear_cross_entropy__no_rows_give_zero_gradients_of_any_head(budget, gemm, dtype):
    inputs, form = make_inputs(0, 600, 8, dtype, head=(True, 2.0, 3.0))
    nll, dhidden, dweight, dbias = gradients(fused(gemm, budget), *inputs, **form)
    assert nll.shape == (0,) and dhidden.shape == (0, 8)
    assert (dweight == 0).all() and dbias.shape == (600,) and (dbias == 0).all()


@every_route
@HEAD
def test_forward__absent_targets_leave_all_classes_to_the_sums(head, gemm, dtype):
    """A shard: s and the metrics run over all its classes, and the gradients have no target's part."""
    inputs, form = make_inputs(33, 700, 24, dtype, head=head)
    hidden, weight, targets, upstream = inputs
    form["softcap"] = form["softcap"] or 0.0
    absent = torch.full_like(targets, op.ABSENT)
    _, statistics, _, kept, shifts, metrics = cpu.forward(
        hidden, weight, absent, **form, gemm=gemm, want_dhidden=False, keep_tiles=True, want_metrics=True
    )
    logits = exact_logits(hidden, weight, **form)
    assert (statistics[0] == 0).all()
    torch.testing.assert_close(metrics[0].double(), logits.amax(1), rtol=1e-5, atol=1e-5)
    total = statistics[1].double() + statistics[2].double().log()
    torch.testing.assert_close(total, logits.logsumexp(1), rtol=1e-5, atol=1e-5)
    swept = cpu.sweep(
        upstream, hidden, weight, absent, statistics, **form, gemm=gemm, want_dhidden=False,
        want_dweight=False, want_dbias=True,
    )[2]  # fmt: skip
    slope = 1 - (logits / form["softcap"]) ** 2 if form["softcap"] else torch.ones_like(logits)
    q = torch.sigmoid(logits.logsumexp(1))  # an absent target counts as a logit of 0
    dlogits = (upstream * q * form["scale"])[:, None] * logits.softmax(1) * slope
    expected = dlogits.sum(0)
    # a logit's rounding, of some units in the last place of 10, is a relative error of its probability
    roundoff = (4 * testing.ROUNDOFF[dtype] + 1e-5) * dlogits.abs().sum(0).max()
    torch.testing.assert_close(swept.double(), expected, rtol=0, atol=roundoff.item())
    from_kept = cpu.dweight(
        upstream, hidden, weight, absent, statistics, kept, shifts, softcap=form["softcap"],
        scale=form["scale"], gemm=gemm, want_dweight=False, want_dbias=True,
    )  # fmt: skip
    assert from_kept[0].numel() == 0
    torch.testing.assert_close(from_kept[1].double(), expected, rtol=0, atol=roundoff.item())


# ---- heads of real models --------------------------------------------------------------------------------

REAL = {
    "Dream": (3584, 152064, None),
    "LLaDA2-mini": (2048, 157184, None),
    "DiffusionGemma": (2304, 262144, 30.0),
}


def _wide_head(num_classes, size, generator):
    """(V, D) bf16 in a second or two: 1024 drawn rows, each repeat of them with its own order and signs."""
    block = torch.randn(1024, size, generator=generator) * 2.5 * size**-0.5
    head = torch.empty(num_classes, size, dtype=torch.bfloat16)
    for first in range(0, num_classes, 1024):
        rows = head[first : first + 1024]
        signs = torch.randint(2, (size,), generator=generator) * 2 - 1
        rows.copy_((block.roll(first // 1024 * 7 + 1, dims=1) * signs)[: len(rows)])
    return head


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_linear_cross_entropy__heads_of_real_models_within_policy(name):
    """8 rows in bf16, by the processor's own route, against float64 over chunks of the head."""
    size, num_classes, softcap = REAL[name]
    generator = torch.Generator().manual_seed(3)
    weight = _wide_head(num_classes, size, generator)
    hidden = torch.randn(8, size, generator=generator).bfloat16()
    targets = torch.randint(num_classes, (8,), generator=generator)
    targets[0] = num_classes - 1
    upstream = testing.wide_range_upstream(8, generator)
    form = {"bias": None, "softcap": softcap, "scale": 1.0}

    leaves = hidden.detach().requires_grad_(), weight.requires_grad_()
    nll, metrics = linear_cross_entropy(*leaves, targets, **form, return_metrics=True, backend="cpu")
    nll.backward(upstream)
    weight = weight.detach()

    chunks = [slice(first, first + 16384) for first in range(0, num_classes, 16384)]
    logits = torch.cat([exact_logits(hidden, weight[part], **form) for part in chunks], dim=1)
    truth = logits.logsumexp(1) - logits.gather(1, targets[:, None])[:, 0]
    dlogits = logits.softmax(1).scatter_add(1, targets[:, None], -torch.ones(8, 1, dtype=torch.float64))
    dlogits *= upstream.double()[:, None]
    if softcap:
        dlogits *= 1 - (logits / softcap) ** 2
    dhidden = sum(dlogits[:, part] @ weight[part].double() for part in chunks)

    baseline_leaf = hidden.detach().requires_grad_()
    reference.linear_cross_entropy(baseline_leaf, weight, targets, None, softcap or 0.0).backward(upstream)
    nll32 = torch.cat([F.linear(hidden.float(), weight[part].float()) for part in chunks], dim=1)
    nll32 = softcap * (nll32 / softcap).tanh() if softcap else nll32
    nll32 = nll32.logsumexp(1) - nll32.gather(1, targets[:, None])[:, 0]
    some = torch.cat([targets, torch.randint(num_classes, (500,), generator=generator)])
    testing.assert_ratios(
        {
            "nll": testing.fp32_error_ratio(nll.detach(), truth, nll32),
            "dhidden": testing.matrix_error_ratio(leaves[0].grad, dhidden, baseline_leaf.grad),
            "dweight": testing.matrix_error_ratio(
                leaves[1].grad[some],
                dlogits[:, some].T @ hidden.double(),
                dlogits[:, some].bfloat16().T @ hidden,
            ),
        }
    )
    entropy = torch.special.entr(logits.softmax(1)).sum(1)
    torch.testing.assert_close(metrics.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(metrics.log_sum_exp.double(), logits.logsumexp(1), rtol=1e-5, atol=1e-5)
