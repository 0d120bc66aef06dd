"""Heads with bias, soft-cap and scale, and row metrics, in Triton's CPU interpreter; float32 and float16.

`test_triton_interpreter.py` runs it in a child process.
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from interpreter_support import KEEP, MARKS, RECOMPUTE, make_inputs, make_op, small_tiles

from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import (
    kernel,
    kernel_rows,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    reference,
)
from vrpo_kernels.linear_cross_entropy.metrics import cap_slope, capped
from vrpo_kernels.triton_math import cap

pytestmark = MARKS
FORMS = [("cublas", torch.float32), ("cublas", torch.float16), ("fused", torch.float16)]
# Logits have a standard deviation of 5: of u = scale * logit the caps see 0.17, 1, 10 and 50 caps.
HEADS = {
    "bias": {"bias": 2.0},
    "scale": {"scale": 0.3},
    "softcap_30": {"softcap": 30.0},
    "softcap_of_the_logits": {"softcap": 5.0},
    "tiny_softcap": {"softcap": 0.5},
    "huge_softcap": {"softcap": 1e5},
    "softcap_that_is_none": {"softcap": 1e20},  # 1 - 1e-20 is 1 in float64 too
    "everything": {"bias": 2.0, "softcap": 4.0, "scale": 0.7},
    "everything_saturated": {"bias": 2.0, "softcap": 3.0, "scale": 10.0},
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(kernel, "_tiles", small_tiles)


def _head(name, V, dtype):
    """The settings of HEADS with a bias of (V,) of that standard deviation."""
    head = {"bias": None, "softcap": None, "scale": 1.0, **HEADS[name]}
    if head["bias"] is not None:
        generator = torch.Generator().manual_seed(V)
        head["bias"] = torch.randn(V, generator=generator).mul_(head["bias"]).to(dtype)
    return head


def _cases():
    for name in HEADS:
        for gemm, dtype in FORMS:
            # Each head kept in one form and recomputed in another; the last two in all.
            whole = name.startswith("everything")
            budgets = (KEEP, RECOMPUTE) if whole else (KEEP if dtype is torch.float32 else RECOMPUTE,)
            if not whole and (gemm, dtype) == ("cublas", torch.float16):
                continue
            for budget in budgets:
                mode = "kept" if budget else "recomputed"
                kind = "fp32" if dtype is torch.float32 else "fp16"
                yield pytest.param(name, gemm, dtype, budget, id=f"{name}-{gemm}-{kind}-{mode}")


@pytest.mark.parametrize(("name", "gemm", "dtype", "kept_tile_bytes"), list(_cases()))
def test_linear_cross_entropy__heads_within_the_policy(name, gemm, dtype, kept_tile_bytes):
    # Three tiles, the last of 9 columns. In the fused form the last head has two row blocks.
    inputs = make_inputs(33 if gemm == "fused" and name == "everything" else 9, 137, 24, dtype)
    with testing.poisoned_empty():
        testing.assert_linear_cross_entropy(
            make_op(gemm, kept_tile_bytes), *inputs, **_head(name, 137, dtype)
        )


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
@pytest.mark.parametrize("wanted", ["head_frozen", "hidden_frozen"])
def test_linear_cross_entropy__one_side_frozen_within_the_policy(gemm, dtype, wanted):
    inputs = make_inputs(5, 137, 24, dtype)
    head = _head("everything", 137, dtype)
    testing.assert_linear_cross_entropy(make_op(gemm), *inputs, **head, **{wanted: True})


@pytest.mark.parametrize("kept_tile_bytes", [KEEP, RECOMPUTE], ids=["kept", "recomputed"])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
def test_linear_cross_entropy__the_gradient_of_the_bias_alone_has_the_same_bits(gemm, dtype, kept_tile_bytes):
    hidden, weight, targets, upstream = make_inputs(5, 137, 24, dtype)
    head = _head("everything", 137, dtype)
    grads = []
    for weight_wanted in (True, False):
        bias = head["bias"].clone().requires_grad_()
        leaf = weight.clone().requires_grad_(weight_wanted)
        op = make_op(gemm, kept_tile_bytes)
        op(hidden, leaf, targets, **{**head, "bias": bias}).backward(upstream)
        grads.append(bias.grad)
    testing.assert_bitwise_equal(grads[1], grads[0], "dbias")


@pytest.mark.parametrize(("gemm", "dtype"), FORMS[::2])
def test_linear_cross_entropy__more_rows_than_a_chunk_holds(gemm, dtype):
    # Chunks of 128 rows: dbias and dweight are summed over two of them in fp32, or fp64, and rounded once.
    inputs = make_inputs(130, 30, 8, dtype)
    testing.assert_linear_cross_entropy(make_op(gemm, RECOMPUTE), *inputs, **_head("everything", 30, dtype))


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
def test_linear_cross_entropy_replay__heads_within_the_policy(gemm, dtype):
    hidden, weight, targets, upstream = make_inputs(5, 137, 24, dtype)
    head = _head("everything", 137, dtype)
    settings = {"backend": "triton", "gemm": gemm}
    known = linear_cross_entropy_statistics(hidden, weight, targets, **settings, **head)

    def op(hidden, weight, targets, **head):
        value, drift = linear_cross_entropy_replay(hidden, weight, targets, *known, **settings, **head)
        assert drift.item() == 0.0
        return value

    testing.assert_linear_cross_entropy(op, hidden, weight, targets, upstream, **head)


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
@pytest.mark.parametrize("name", ["scale", "everything"])
def test_forward__nll_has_the_same_bits_with_and_without_gradients_and_metrics(gemm, dtype, name):
    hidden, weight, targets, _ = make_inputs(5, 137, 24, dtype)
    head = _head(name, 137, dtype)
    head["softcap"] = head["softcap"] or 0.0
    found = []
    for want_dhidden, keep_tiles, want_metrics in ((0, 0, 0), (0, 0, 1), (1, 0, 0), (0, 1, 1), (1, 1, 1)):
        wanted = {"want_dhidden": bool(want_dhidden), "keep_tiles": bool(keep_tiles)}
        out = kernel.forward(
            hidden, weight, targets, gemm=gemm, want_metrics=bool(want_metrics), **wanted, **head
        )
        found.append((out[0], out[1], out[5]))
    for nll, statistics, metrics in found[1:]:
        testing.assert_bitwise_equal(nll, found[0][0], "nll")
        testing.assert_bitwise_equal(statistics, found[0][1], "statistics")
        if metrics.numel():
            testing.assert_bitwise_equal(metrics, found[1][2], "metrics")


def _climbing_inputs(V, dtype):
    """Logits of row n climb by 12 nats per 64 classes for odd n and fall for even n."""
    hidden, weight, targets, upstream = make_inputs(6, V, 8, dtype, scale=0.1)
    weight[:, 0] = (torch.arange(V) // 64) * 12.0
    hidden[:, 0] = torch.tensor([-1.0, 1.0]).repeat(3)
    return hidden, weight, targets, upstream


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
@pytest.mark.parametrize("climbing", [False, True], ids=["flat", "climbing"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_linear_cross_entropy__metrics_are_those_of_the_dense_softmax(gemm, dtype, climbing, name):
    hidden, weight, targets, _ = _climbing_inputs(201, dtype) if climbing else make_inputs(6, 201, 24, dtype)
    head = {} if name == "plain" else {**_head("everything", 201, dtype), "softcap": 30.0}
    exact = [value.double() for value in (hidden, weight)]
    bias = None if head.get("bias") is None else head["bias"].double()
    dense = reference.logits(*exact, bias, head.get("softcap") or 0.0, head.get("scale", 1.0))
    targets[0], targets[1] = dense[0].argmax(), dense[1].topk(2).indices[1]
    nll, metrics = make_op(gemm)(hidden, weight, targets, return_metrics=True, **head)
    entropy = torch.distributions.Categorical(logits=dense).entropy()
    torch.testing.assert_close(metrics.entropy.double(), entropy, rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(metrics.log_sum_exp.double(), dense.logsumexp(1), rtol=1e-6, atol=1e-6)
    assert metrics.top1.tolist() == (dense.argmax(1) == targets).tolist()
    testing.assert_bitwise_equal(nll, make_op(gemm)(hidden, weight, targets, **head), "nll")


@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
def test_forward__metrics_hold_the_exact_maximum_and_the_moment_under_m(gemm, dtype):
    hidden, weight, targets, _ = _climbing_inputs(201, dtype)
    wanted = {"want_dhidden": True, "keep_tiles": False, "want_metrics": True}
    _, statistics, _, _, _, metrics = kernel.forward(hidden, weight, targets, gemm=gemm, **wanted)
    others = (hidden.double() @ weight.double().T).scatter(1, targets[:, None], float("-inf"))
    torch.testing.assert_close(metrics[0].double(), others.amax(1), rtol=1e-6, atol=0.0)
    gap = others - statistics[1][:, None]
    moment = torch.where(gap.isinf(), 0.0, gap.exp() * gap).sum(1)
    torch.testing.assert_close(metrics[1].double(), moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__metrics_of_what_came_before_a_new_shift(gemm):
    # 2000 logits of 0, then one of 18, to which the shift moves: all of the entropy is in the former.
    hidden, weight = torch.ones(3, 8, dtype=torch.float16), torch.zeros(2001, 8, dtype=torch.float16)
    weight[-1] = 18 / 8
    _, metrics = make_op(gemm)(hidden, weight, torch.tensor([0, 1, 2]), return_metrics=True)
    entropy = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T).entropy()
    torch.testing.assert_close(metrics.entropy.double(), entropy, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__classes_forbidden_by_their_bias(gemm):
    # -inf keeps a class out without a soft-cap; under one its logit is -softcap. Whole column blocks of them.
    hidden, weight, targets, _ = make_inputs(5, 201, 24, torch.float16)
    bias = torch.zeros(201, dtype=torch.float16)
    bias[32:100] = float("-inf")
    targets[:] = torch.tensor([0, 31, 100, 150, 200])
    allowed = torch.cat([torch.arange(32), torch.arange(100, 201)])
    nll, metrics = make_op(gemm)(hidden, weight, targets, bias=bias, return_metrics=True)
    dense = (hidden.double() @ weight.double().T)[:, allowed]
    expected = dense.logsumexp(1) - (hidden.double() * weight[targets].double()).sum(1)
    torch.testing.assert_close(nll.double(), expected, rtol=1e-5, atol=1e-5)
    entropy = torch.distributions.Categorical(logits=dense).entropy()
    torch.testing.assert_close(metrics.entropy.double(), entropy, rtol=1e-5, atol=1e-5)
    capped, _ = make_op(gemm)(hidden, weight, targets, bias=bias, softcap=4.0, return_metrics=True)
    dense = reference.logits(hidden.double(), weight.double(), bias.double(), 4.0)
    expected = dense.logsumexp(1) - dense.gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(capped.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("budget", [KEEP, RECOMPUTE])
@pytest.mark.parametrize(("gemm", "dtype"), FORMS)
def test_linear_cross_entropy__a_bias_that_is_no_number_makes_nan_of_all_it_enters(gemm, dtype, budget):
    # Gradients of kept tiles were 0 left of the tile that held it.
    hidden, weight, targets, upstream = make_inputs(3, 140, 16, dtype)
    targets[:] = torch.tensor([0, 70, 139])
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, torch.zeros(140, dtype=dtype))]
    with torch.no_grad():
        leaves[2][100] = math.nan
    nll = make_op(gemm, budget)(hidden, weight, targets, bias=leaves[2])
    for value in (nll, *torch.autograd.grad(nll, leaves, upstream)):
        assert value.isnan().all()


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__a_target_that_overflows_is_not_certain(gemm):
    hidden, weight, targets, _ = make_inputs(3, 70, 16, torch.float16)
    bias = torch.zeros(70, dtype=torch.float16)
    bias[targets[0]] = math.inf
    assert make_op(gemm)(hidden, weight, targets, bias=bias).isnan().all()


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__one_class_costs_nothing_under_any_head(gemm):
    hidden, weight, targets, upstream = make_inputs(3, 1, 8, torch.float16)
    head = {**_head("everything", 1, torch.float16)}
    leaves = [tensor.requires_grad_() for tensor in (hidden, weight, head["bias"])]
    nll, metrics = make_op(gemm)(hidden, weight, targets, return_metrics=True, **head)
    for value in (nll, *torch.autograd.grad(nll, leaves, upstream), metrics.entropy):
        assert torch.equal(value, torch.zeros_like(value))
    assert metrics.top1.all()


@pytest.mark.parametrize("gemm", ["cublas", "fused"])
def test_linear_cross_entropy__a_target_out_of_range_makes_nan_of_its_row_only(gemm):
    hidden, weight, targets, upstream = make_inputs(5, 130, 24, torch.float16)
    head = _head("everything", 130, torch.float16)
    targets[3] = 2**40
    wanted = {"want_dhidden": True, "keep_tiles": True, "want_metrics": True}
    nll, statistics, expected, kept, shift, _ = kernel.forward(
        hidden, weight, targets, gemm=gemm, **wanted, **head
    )
    others = torch.tensor([0, 1, 2, 4])
    assert nll[3].isnan() and nll[others].isfinite().all()
    settings = {"softcap": head["softcap"], "scale": head["scale"]}
    dhidden = kernel.dhidden(upstream, expected, statistics, weight, targets, **settings)
    wanted = {"want_dweight": True, "want_dbias": True}
    known = (upstream, hidden, weight, targets, statistics)
    kept = kernel.dweight(*known, kept, shift, gemm=gemm, **settings, **wanted)
    swept = kernel.sweep(*known, gemm=gemm, bias=head["bias"], **settings, want_dhidden=True, **wanted)
    for rows in (dhidden, swept[0]):
        assert rows[3].isnan().all() and rows[others].isfinite().all()
    assert all(value.isnan().all() for value in (*kept, *swept[1:]))  # every class has a share of that row


def test_scale_rows__kept_tiles_are_divided_by_the_very_number_that_stands_at_the_target():
    # Tiles hold -s * slope rounded to their dtype; dividing by s would leave the target's share off.
    value = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).half()
    target_logit = torch.linspace(-6, 6, 40)
    sums = 1.0 + torch.arange(1, 41) * 2.0**-11 * 0.97
    statistics = torch.stack([target_logit, torch.full((40,), 3.0), sums])
    dnll = torch.linspace(-1, 1, 40)
    out = torch.empty_like(value)
    kernel_rows.scale_rows(value, dnll, statistics, out, softcap=4.0, scale=0.7, per_sum=True)
    logit, slope = capped(target_logit.double(), 4.0), cap_slope(target_logit.double(), 4.0)
    factor = dnll.double() * torch.sigmoid(3.0 - logit + sums.double().log()) * 0.7
    entry = (sums * slope.float()).half().double()
    scaled = (value.double() * (factor / by)[:, None] for by in (entry / slope, sums.double()))
    rounded, exact = ((out != wanted.half()).double().mean() for wanted in scaled)
    assert rounded < 0.05 < 0.1 < exact


def test_scale_rows__a_target_whose_slope_has_no_bits_left_does_not_scale_the_others():
    # Slopes of 1e-7 are 1 or 2 steps of fp16's denormals: what they are rounded to says nothing.
    value = torch.ones(3, 128, dtype=torch.float16)
    statistics = torch.tensor([[35.0, 36.0, 500.0], [1.0, 1.0, 1.0], [2.0, 2.0, 2.0]])
    out = torch.empty_like(value)
    kernel_rows.scale_rows(value, torch.ones(3), statistics, out, softcap=4.0, scale=1.0, per_sum=False)
    log_odds = 1.0 - capped(statistics[0].double(), 4.0) + math.log(2.0)
    torch.testing.assert_close(out[:, 0].double(), torch.sigmoid(log_odds), rtol=2.0**-10, atol=0.0)


@triton.jit
def _cap_kernel(u_ptr, logit_ptr, slope_ptr, softcap, EXACT: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    logit, slope = cap(tl.load(u_ptr + offs), softcap, EXACT)
    tl.store(logit_ptr + offs, logit)
    tl.store(slope_ptr + offs, slope)


def _capped(u, softcap, exact):
    logit, slope = torch.empty_like(u), torch.empty_like(u)
    _cap_kernel[(1,)](u, logit, slope, softcap, EXACT=exact, BLOCK=u.numel())
    return logit, slope


@pytest.mark.parametrize("softcap", [30.0, 0.5, 1e5])
@pytest.mark.parametrize(
    ("exact", "dtype", "roundings"),
    [(True, torch.float32, 4.5), (False, torch.float32, 8.0), (True, torch.float64, 0.1)],
    ids=["exact", "fast", "fp64"],
)
def test_cap__is_tanh_and_its_derivative_without_cancellation(softcap, exact, dtype, roundings):
    x = torch.cat([torch.linspace(-40, 40, 2**15), torch.logspace(-8, 1.6, 2**15)]).double()
    u = (x * softcap).to(dtype)
    x = u.double() / softcap
    logit, slope = _capped(u, softcap, exact)
    relative = torch.where(x == 0, 0.0, (logit - softcap * x.tanh()) / (softcap * x.tanh()))
    assert relative.abs().max() <= roundings * 2.0**-24
    # A rounding of x, and in `fast` two and one of log2 e, weigh 2 |x| in its exponential.
    truth = x.cosh() ** -2
    allowed = (roundings + 2 * x.abs() * (0.0 if dtype is torch.float64 else 1 if exact else 3)) * 2.0**-24
    assert ((slope - truth).abs() / truth <= allowed + 1e-12).all()


@pytest.mark.parametrize("exact", [True, False])
def test_cap__of_infinities_and_nan(exact):
    u = torch.tensor([float("-inf"), float("inf"), float("nan"), 0.0])
    logit, slope = _capped(u, 30.0, exact)
    assert logit[[0, 1, 3]].tolist() == [-30.0, 30.0, 0.0] and logit[2].isnan()
    assert slope[[0, 1, 3]].tolist() == [0.0, 0.0, 1.0] and slope[2].isnan()
