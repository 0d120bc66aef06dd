"""linear_cross_entropy on the CPU backends: values, gradients, autograd behaviour, determinism, errors."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from backends import DTYPES, ROUTES, every_route, needs_extension
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

import vrpo_kernels
from vrpo_kernels import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    plan_linear_cross_entropy,
    testing,
)
from vrpo_kernels.linear_cross_entropy import cpu, op, reference

SHAPES = [(1, 1, 3), (1, 2, 16), (17, 513, 48), (67, 1031, 33), (130, 600, 64), (1040, 1300, 24)]
SHAPES += [(64, 530, 1101)]  # more products than one call of the bf16 micro-kernels sums
SHAPES += [(330, 530, 1101)]  # rows enough for parts of a wide head to meet several panels of them


def make_inputs(num_rows, num_classes, size, dtype, *, seed=0, scale=2.0):
    """hidden, weight, targets, upstream; logits have standard deviation `scale`."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(num_rows, size, generator=generator)
    weight = torch.randn(num_classes, size, generator=generator) * scale * size**-0.5
    targets = torch.randint(0, num_classes, (num_rows,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), targets, testing.wide_range_upstream(num_rows, generator)


def gradients(function, hidden, weight, upstream, *, need_hidden=True, need_weight=True):
    """(nll, dhidden, dweight) of function(hidden, weight) -> nll."""
    hidden = hidden.detach().requires_grad_(need_hidden)
    weight = weight.detach().requires_grad_(need_weight)
    nll = function(hidden, weight)
    nll.backward(upstream)
    return nll.detach(), hidden.grad, weight.grad


def nll_by_log_odds(hidden, weight, targets):
    """softplus(logsumexp of the other classes - target's logit): exact in float64 also where p is close to
    1.
    """
    logits = hidden @ weight.T
    others = logits.scatter(1, targets[:, None], float("-inf")).logsumexp(1)
    return torch.nn.functional.softplus(others - logits.gather(1, targets[:, None])[:, 0], threshold=1e9)


# ---- reference -------------------------------------------------------------------------------------------


def test_reference__equals_torch_cross_entropy_and_passes_gradcheck():
    hidden, weight, targets, _ = make_inputs(5, 7, 3, torch.float64)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), expected)
    torch.autograd.gradcheck(
        lambda x, w: linear_cross_entropy(x, w, targets), (hidden.requires_grad_(), weight.requires_grad_())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy__reference_backend_within_policy(dtype):
    testing.assert_linear_cross_entropy(
        lambda x, w, y: linear_cross_entropy(x, w, y, backend="reference"), *make_inputs(67, 513, 48, dtype)
    )


# ---- policy ----------------------------------------------------------------------------------------------


@needs_extension
@every_route
@pytest.mark.parametrize("budget", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-V{}-D{}".format(*s))
def test_linear_cross_entropy__within_policy(shape, budget, gemm, dtype):
    inputs = make_inputs(*shape, dtype)

    def op(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm=gemm, kept_tile_bytes=budget)

    with testing.poisoned_empty():
        testing.assert_linear_cross_entropy(op, *inputs)
        testing.assert_linear_cross_entropy(op, *inputs, head_frozen=True)
        testing.assert_linear_cross_entropy(op, *inputs, hidden_frozen=True)


@needs_extension
@every_route
@pytest.mark.parametrize("scale", [12.0, 25.0, 1e4])
def test_linear_cross_entropy__peaked_rows_keep_relative_accuracy(scale, gemm, dtype):
    """Rows with p(target) close to 1: nll and gradient of each row against its own size, not the
    largest's.
    """
    hidden, weight, targets, upstream = make_inputs(64, 800, 64, dtype)
    weight = torch.nn.functional.normalize(weight.float()).to(dtype)
    hidden = (scale * weight[targets].float()).to(dtype)  # the target's logit is `scale`
    truth = gradients(
        lambda x, w: nll_by_log_odds(x, w, targets),
        hidden.double(), weight.double(), upstream.double(),
    )  # fmt: skip
    nll, dhidden, _ = gradients(
        lambda x, w: linear_cross_entropy(x, w, targets, backend="cpu", gemm=gemm), hidden, weight, upstream
    )
    # fp32 logits of size `scale` carry an error of about scale * u; exp turns it into a relative one.
    tolerance = 40 * scale * testing.ROUNDOFF[torch.float32]
    representable = truth[0] > 1e-30
    error = ((nll.double() - truth[0]).abs() / truth[0].clamp(min=1e-30))[representable]
    assert error.numel() == 0 or error.max() < tolerance
    row_error = (dhidden.double() - truth[1]).norm(dim=1)
    allowed = (tolerance + 2 * testing.ROUNDOFF[dtype]) * truth[1].norm(dim=1)
    allowed += torch.finfo(dtype).smallest_normal * 64**0.5  # fp16 cannot hold the smallest gradients
    assert (row_error < allowed)[representable].all()
    assert dhidden.isfinite().all()


@needs_extension
@every_route
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "kept"])
@pytest.mark.parametrize("size", [24, 33])
def test_linear_cross_entropy__reads_nothing_beside_its_inputs(size, budget, gemm, dtype):
    """Views into larger matrices whose other elements are NaN: 0 * NaN would show."""
    hidden, weight, targets, upstream = make_inputs(35, 517, size, dtype)

    def embedded(matrix):
        larger = torch.full((matrix.shape[0] + 2, matrix.shape[1] + 2), float("nan"), dtype=dtype)
        return larger[: matrix.shape[0], : matrix.shape[1]].copy_(matrix)

    testing.assert_linear_cross_entropy(
        lambda x, w, y: linear_cross_entropy(x, w, y, backend="cpu", gemm=gemm, kept_tile_bytes=budget),
        embedded(hidden), embedded(weight), targets, upstream,
    )  # fmt: skip


@needs_extension
@every_route
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "kept"])
def test_linear_cross_entropy__corrects_what_was_summed_under_a_lower_maximum(budget, gemm, dtype):
    """The logits of odd rows climb by 20 nats per tile, those of even rows fall."""
    hidden, weight, targets, upstream = make_inputs(33, 4 * cpu.TILE + 7, 24, dtype, scale=0.3)
    weight[:, 0] = torch.arange(len(weight)) // cpu.TILE * 20
    hidden[:, 0] = 1 - 2 * (torch.arange(33) % 2 == 0).to(dtype)
    testing.assert_linear_cross_entropy(
        lambda x, w, y: linear_cross_entropy(x, w, y, backend="cpu", gemm=gemm, kept_tile_bytes=budget),
        hidden, weight, targets, upstream,
    )  # fmt: skip


@needs_extension
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    num_rows=st.integers(0, 40),
    num_classes=st.sampled_from([1, 2, 15, 16, 17, 511, 512, 513, 1100]),
    size=st.integers(1, 40),
    route=st.sampled_from(ROUTES),
    scale=st.sampled_from([0.0, 1.0, 30.0, 1e4]),
    repeated=st.booleans(),
    strided=st.booleans(),
    budget=st.sampled_from([0, 2**30]),
    seed=st.integers(0, 2**16),
)
def test_linear_cross_entropy__property(
    num_rows, num_classes, size, route, scale, repeated, strided, budget, seed
):
    """Any shape, dtype, layout and logit size: within policy, finite, same nll with and without gradients."""
    gemm, dtype = route
    hidden, weight, targets, upstream = make_inputs(
        num_rows, num_classes, size, dtype, seed=seed, scale=scale
    )
    if repeated and num_rows:
        targets = targets[:1].expand(num_rows).contiguous()
    if strided:  # views: every second row of hidden, a transposed head, every second target
        hidden = torch.stack([hidden, hidden + 1], dim=1).reshape(2 * num_rows, size)[::2]
        weight = weight.T.contiguous().T
        targets = targets.repeat_interleave(2)[::2]

    def op(x, w, y):
        return linear_cross_entropy(x, w, y, backend="cpu", gemm=gemm, kept_tile_bytes=budget)

    nll, dhidden, dweight = gradients(lambda x, w: op(x, w, targets), hidden, weight, upstream)
    assert (nll >= 0).all()
    testing.assert_bitwise_equal(op(hidden, weight, targets), nll, "nll without gradients")
    if scale <= 30:  # at 1e4 the baseline's own softmax is decided by the rounding of its logits
        testing.assert_ratios(
            testing.linear_cross_entropy_ratios(nll, dhidden, dweight, hidden, weight, targets, upstream)
        )
    else:
        truth = reference.linear_cross_entropy(hidden.double(), weight.double(), targets)
        baseline = reference.linear_cross_entropy(hidden.float(), weight.float(), targets)
        assert testing.fp32_error_ratio(nll, truth, baseline) <= 1
        assert dhidden.isfinite().all() and dweight.isfinite().all()


@needs_extension
def test_linear_cross_entropy__long_sums_of_one_sign_stay_exact():
    """m5: the head's gradient is summed in fp32, over more rows than one chunk holds."""
    generator = torch.Generator().manual_seed(1)
    hidden = (1 + 0.1 * torch.randn(4096, 16, generator=generator)).bfloat16()
    weight = (0.1 * torch.randn(24, 16, generator=generator)).bfloat16()
    targets = torch.zeros(4096, dtype=torch.int64)
    for budget in (0, 2**30):
        testing.assert_linear_cross_entropy(
            lambda x, w, y, b=budget: linear_cross_entropy(x, w, y, backend="cpu", kept_tile_bytes=b),
            hidden, weight, targets, torch.ones(4096),
        )  # fmt: skip


# ---- autograd --------------------------------------------------------------------------------------------


@needs_extension
@every_route
def test_linear_cross_entropy__nll_bitwise_same_in_every_mode_and_run(gemm, dtype):
    hidden, weight, targets, _ = make_inputs(67, 1300, 40, dtype)

    def nll(need_hidden, need_weight, budget=2**30):
        x, w = hidden.detach().requires_grad_(need_hidden), weight.detach().requires_grad_(need_weight)
        return linear_cross_entropy(x, w, targets, backend="cpu", gemm=gemm, kept_tile_bytes=budget).detach()

    expected = nll(False, False)
    for need_hidden, need_weight, budget in [(1, 0, 0), (0, 1, 0), (1, 1, 0), (0, 1, 2**30), (1, 1, 2**30)]:
        testing.assert_bitwise_equal(nll(bool(need_hidden), bool(need_weight), budget), expected)
    with torch.no_grad():
        testing.assert_bitwise_equal(nll(True, True), expected)
    testing.assert_bitwise_equal(
        linear_cross_entropy_statistics(hidden, weight, targets, backend="cpu", gemm=gemm)[0], expected
    )


@needs_extension
@every_route
def test_linear_cross_entropy__nll_independent_of_memory_alignment(gemm, dtype):
    """A head mapped from a checkpoint file starts anywhere; its nll is that of the same head elsewhere."""
    hidden, weight, targets, _ = make_inputs(33, 700, 48, dtype)
    expected = linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm=gemm)
    for shift in (1, 3, 8):
        moved = torch.empty(weight.numel() + shift, dtype=dtype)[shift:].view_as(weight).copy_(weight)
        x = torch.empty(hidden.numel() + shift, dtype=dtype)[shift:].view_as(hidden).copy_(hidden)
        found = linear_cross_entropy(x, moved, targets, backend="cpu", gemm=gemm)
        testing.assert_bitwise_equal(found, expected)


@needs_extension
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "kept"])
@pytest.mark.parametrize(("gemm", "dtype"), [r for r in ROUTES if r[0] != "fp32"], ids=str)
@pytest.mark.parametrize("shape", [(150, 1300, 80), (590, 530, 1537)], ids=["narrow", "wide"])
def test_linear_cross_entropy__same_bits_on_any_number_of_threads(shape, gemm, dtype, budget):
    """Rows, panels and blocks are dealt out to threads; no sum crosses them. ("fp32" is torch.mm.)

    Where AMX is, groups of 5, 5, 4 and 2 panels meet copied parts of the wide head; with 16 threads none.
    """
    hidden, weight, targets, upstream = make_inputs(*shape, dtype)
    threads = torch.get_num_threads()

    def run(count):
        torch.set_num_threads(count)
        return gradients(
            lambda x, w: linear_cross_entropy(
                x, w, targets, backend="cpu", gemm=gemm, kept_tile_bytes=budget
            ),
            hidden, weight, upstream,
        )  # fmt: skip

    try:
        expected = run(1)
        for count in (2, 3, 8, 16):
            for found, wanted in zip(run(count), expected, strict=True):
                testing.assert_bitwise_equal(found, wanted)
    finally:
        torch.set_num_threads(threads)


@needs_extension
@every_route
def test_linear_cross_entropy__gradients_bitwise_same_run_to_run_and_on_second_backward(gemm, dtype):
    hidden, weight, targets, upstream = make_inputs(67, 1300, 40, dtype)
    hidden.requires_grad_(), weight.requires_grad_()

    def results(nll):
        return torch.autograd.grad(nll, (hidden, weight), upstream, retain_graph=True)

    nll = linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm=gemm)
    first = results(nll)
    torch.autograd.grad(nll, (hidden, weight), 3 * upstream, retain_graph=True)
    for again in (
        results(nll),
        results(linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm=gemm)),
    ):
        for a, b in zip(again, first, strict=True):
            testing.assert_bitwise_equal(a, b)


@needs_extension
@every_route
@pytest.mark.parametrize("budget", [0, 2**30], ids=["recomputed", "kept"])
def test_linear_cross_entropy__linear_in_upstream(budget, gemm, dtype):
    hidden, weight, targets, upstream = make_inputs(33, 600, 24, dtype)

    def run(g):
        return gradients(
            lambda x, w: linear_cross_entropy(
                x, w, targets, backend="cpu", gemm=gemm, kept_tile_bytes=budget
            ),
            hidden, weight, g,
        )[1:]  # fmt: skip

    for doubled, single in zip(run(2 * upstream), run(upstream), strict=True):
        exact = torch.ones_like(single, dtype=torch.bool)  # powers of two are
        if dtype is torch.float16:  # but for its subnormal numbers, which are rounded to a fixed unit
            exact = single.abs() >= torch.finfo(dtype).smallest_normal
        testing.assert_bitwise_equal(doubled[exact], 2 * single[exact])
    for zero in run(torch.zeros_like(upstream)):
        assert (zero == 0).all()


@needs_extension
@every_route
def test_linear_cross_entropy__permutations_of_rows_and_classes(gemm, dtype):
    inputs = make_inputs(37, 600, 48, dtype)
    hidden, weight, targets, upstream = inputs
    rows, classes = torch.randperm(37), torch.randperm(600)
    position = torch.empty_like(classes)
    position[classes] = torch.arange(600)
    nll, dhidden, dweight = gradients(
        lambda x, w: linear_cross_entropy(x, w, position[targets[rows]], backend="cpu", gemm=gemm),
        hidden[rows], weight[classes], upstream[rows],
    )  # fmt: skip
    restored = torch.empty_like(nll), torch.empty_like(dhidden), torch.empty_like(dweight)
    restored[0][rows], restored[1][rows], restored[2][classes] = nll, dhidden, dweight
    testing.assert_ratios(testing.linear_cross_entropy_ratios(*restored, *inputs))


@needs_extension
def test_linear_cross_entropy__empty_rows_give_zero_gradients_that_reach_the_parameters():
    hidden, weight, targets, _ = make_inputs(0, 50, 8, torch.float32)
    for budget in (0, 2**30):
        nll, dhidden, dweight = gradients(
            lambda x, w, b=budget: linear_cross_entropy(x, w, targets, backend="cpu", kept_tile_bytes=b),
            hidden, weight, torch.zeros(0),
        )  # fmt: skip
        assert nll.shape == (0,) and dhidden.shape == (0, 8)
        testing.assert_bitwise_equal(dweight, torch.zeros_like(weight))


@needs_extension
def test_linear_cross_entropy__gradient_checkpointing_changes_no_bit():
    hidden, weight, targets, upstream = make_inputs(33, 600, 24, torch.float32)

    def loss(x, w):
        return linear_cross_entropy(x.tanh(), w, targets, backend="cpu")

    plain = gradients(loss, hidden, weight, upstream)
    for reentrant in (False, True):
        again = gradients(
            lambda x, w, r=reentrant: checkpoint(loss, x, w, use_reentrant=r), hidden, weight, upstream
        )
        for a, b in zip(again, plain, strict=True):
            testing.assert_bitwise_equal(a, b)


@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_linear_cross_entropy__autocast_casts_as_linear_does(requested):
    hidden, weight, targets, upstream = make_inputs(33, 600, 24, torch.float32)

    def under_autocast(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            return linear_cross_entropy(x, w, targets, backend=requested)

    nll, dhidden, dweight = gradients(under_autocast, hidden, weight, upstream)
    assert nll.dtype is dhidden.dtype is dweight.dtype is torch.float32
    rounded = gradients(
        lambda x, w: linear_cross_entropy(x.bfloat16(), w.bfloat16(), targets, backend=requested),
        hidden, weight, upstream,
    )  # fmt: skip
    for a, b in zip((nll, dhidden, dweight), rounded, strict=True):
        testing.assert_bitwise_equal(a, b)


# ---- torch.library ---------------------------------------------------------------------------------------


@needs_extension
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch.compile itself
@pytest.mark.parametrize("head_frozen", [False, True], ids=["trained", "frozen"])
def test_linear_cross_entropy__compiles_without_graph_break(head_frozen):
    hidden, weight, targets, upstream = make_inputs(33, 600, 24, torch.float32)

    def loss(x, w):
        return linear_cross_entropy(x * 2, w, targets)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    eager = gradients(loss, hidden, weight, upstream, need_weight=not head_frozen)
    traced = gradients(compiled, hidden, weight, upstream, need_weight=not head_frozen)
    for a, b in zip(traced, eager, strict=True):
        if b is None:
            assert a is None
        else:
            testing.assert_bitwise_equal(a, b)


PLAIN = (0.0, 1.0)  # no soft-cap, scale 1


@needs_extension
@every_route
@pytest.mark.parametrize(("want_dhidden", "keep_tiles"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_linear_cross_entropy__passes_opcheck(want_dhidden, keep_tiles, gemm, dtype):
    hidden, weight, targets, _ = make_inputs(5, 530, 8, dtype)
    arguments = (
        hidden.requires_grad_(bool(want_dhidden)), weight.requires_grad_(bool(keep_tiles)),
        None, targets, *PLAIN, "cpu", gemm, bool(want_dhidden), bool(keep_tiles), False,
    )  # fmt: skip
    torch.library.opcheck(op._forward, arguments)


@needs_extension
@every_route
def test_linear_cross_entropy_helpers__pass_opcheck(gemm, dtype):
    hidden, weight, targets, upstream = make_inputs(5, 530, 8, dtype)
    settings = (*PLAIN, "cpu", gemm)
    nll, statistics, expected, kept, shift, _ = op._forward(
        hidden, weight, None, targets, *settings, True, True, False
    )
    torch.library.opcheck(op._dhidden, (upstream, expected, statistics, weight, targets, *settings[:3]))
    known = (upstream, hidden, weight, targets, statistics, kept, shift, *settings)
    torch.library.opcheck(op._dweight, (*known, True, False))
    for flags in [(True, True, False), (True, False, False), (False, True, False)]:
        torch.library.opcheck(
            op._sweep, (upstream, hidden, weight, None, targets, statistics, *settings, *flags)
        )
    hidden.requires_grad_(), weight.requires_grad_()
    torch.library.opcheck(op._replay, (hidden, weight, None, targets, nll, statistics, *settings))


# ---- replay ----------------------------------------------------------------------------------------------


@needs_extension
@every_route
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "N{}-V{}-D{}".format(*s))
def test_replay__same_nll_and_gradients_within_policy(shape, gemm, dtype):
    inputs = make_inputs(*shape, dtype)
    hidden, weight, targets, upstream = inputs
    known = linear_cross_entropy_statistics(hidden, weight, targets, backend="cpu", gemm=gemm)
    for need_hidden, need_weight in [(True, True), (True, False), (False, True)]:
        x, w = hidden.detach().requires_grad_(need_hidden), weight.detach().requires_grad_(need_weight)
        nll, drift = linear_cross_entropy_replay(x, w, targets, *known, backend="cpu", gemm=gemm)
        testing.assert_bitwise_equal(nll.detach(), known[0])
        assert drift.item() == 0
        nll.backward(upstream)
        testing.assert_ratios(testing.linear_cross_entropy_ratios(nll.detach(), x.grad, w.grad, *inputs))


@pytest.mark.parametrize("requested", ["auto", "reference"])
def test_replay__drift_reports_changed_hidden_states(requested):
    hidden, weight, targets, _ = make_inputs(33, 600, 24, torch.float32)
    known = linear_cross_entropy_statistics(hidden, weight, targets, backend=requested)
    changed = hidden.clone()
    changed[5] += 0.5
    _, drift = linear_cross_entropy_replay(changed, weight, targets, *known, backend=requested)
    expected = (0.5 * weight[targets[5]].sum()).abs()
    torch.testing.assert_close(drift, expected, rtol=1e-4, atol=1e-5)


# ---- plan and errors -------------------------------------------------------------------------------------


@needs_extension
def test_plan__states_units_and_bytes():
    hidden, weight, *_ = make_inputs(40, 600, 24, torch.float32)
    plan = plan_linear_cross_entropy(hidden, weight, backend="cpu")
    assert (plan.forward_units, plan.backward_units, plan.kept_bytes) == (1, 0, 0)
    hidden.requires_grad_()
    plan = plan_linear_cross_entropy(hidden, weight, backend="cpu")
    assert (plan.forward_units, plan.backward_units, plan.kept_bytes) == (2, 0, 0)
    weight.requires_grad_()
    plan = plan_linear_cross_entropy(hidden, weight, backend="cpu")
    assert (plan.forward_units, plan.backward_units) == (2, 1)
    assert plan.kept_bytes == 4 * (600 * 48 + 2 * 48)
    limited = plan_linear_cross_entropy(hidden, weight, backend="cpu", kept_tile_bytes=plan.kept_bytes - 1)
    assert (limited.forward_units, limited.backward_units, limited.kept_bytes) == (1, 3, 0)
    with torch.no_grad():
        assert plan_linear_cross_entropy(hidden, weight, backend="cpu").forward_units == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must have shape \(N, D\)"),
        ({"weight": torch.zeros(7, 5)}, "same size D"),
        ({"weight": torch.zeros(7, 4, dtype=torch.bfloat16)}, "same dtype"),
        ({"weight": torch.zeros(0, 4)}, "at least one row"),
        ({"bias": torch.zeros(6)}, "same size V"),
        ({"backend": "fast"}, "backend"),
    ],
)
def test_plan__refuses_what_the_call_refuses(changed, message):
    arguments = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4)} | changed
    with pytest.raises(ValueError, match=message):
        plan_linear_cross_entropy(**arguments)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(targets=torch.zeros(3, dtype=torch.int64), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, y: (x[0], w, y), r"hidden must have shape \(N, D\), got \(8,\)"),
        (lambda x, w, y: (x, w[:, :5], y), "hidden and weight must have the same size D, got 8 and 5"),
        (lambda x, w, y: (x, w.bfloat16(), y), "hidden and weight must have the same dtype"),
        (lambda x, w, y: (x, w, y[:2]), "hidden and targets must have the same size N, got 4 and 2"),
        (lambda x, w, y: (x, w, y.int()), "targets must be int64"),
        (lambda x, w, y: (x.long(), w.long(), y), "hidden must be float32"),
        (lambda x, w, y: (x, w[:0], y), "at least one row"),
    ],
)
def test_linear_cross_entropy__names_the_wrong_argument(change, message):
    hidden, weight, targets, _ = make_inputs(4, 9, 8, torch.float32)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy(*change(hidden, weight, targets))


@needs_extension
@pytest.mark.parametrize("wrong", [-1, 9])
def test_linear_cross_entropy__rejects_targets_out_of_range(wrong):
    hidden, weight, targets, _ = make_inputs(4, 9, 8, torch.float32)
    targets[2] = wrong
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, 9\), got {wrong} in row 2"):
        linear_cross_entropy(hidden, weight, targets, backend="cpu")


@pytest.mark.parametrize("wrong", [-1, 9, op.ABSENT])
@pytest.mark.parametrize("function", [linear_cross_entropy, linear_cross_entropy_statistics])
def test_reference__rejects_targets_out_of_range_in_the_words_of_cpp(function, wrong):
    hidden, weight, targets, _ = make_inputs(4, 9, 8, torch.float32)
    targets[2] = wrong
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, 9\), got {wrong} in row 2"):
        function(hidden, weight, targets, backend="reference")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch.compile itself
def test_reference__compiles_without_graph_break():
    hidden, weight, targets, _ = make_inputs(4, 9, 8, torch.bfloat16)

    def loss(x):
        return linear_cross_entropy(x, weight, targets, backend="reference")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    testing.assert_bitwise_equal(compiled(hidden), loss(hidden))


@needs_extension
def test_linear_cross_entropy__rejects_unknown_gemm():
    hidden, weight, targets, _ = make_inputs(4, 9, 8, torch.float32)
    with pytest.raises(ValueError, match="gemm must be one of"):
        linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm="cublas")


@needs_extension
def test_linear_cross_entropy__rejects_a_gemm_that_cannot_run(monkeypatch):
    hidden, weight, targets, _ = make_inputs(4, 9, 8, torch.float32)
    with pytest.raises(ValueError, match=r"'bf16' needs bfloat16 inputs, got torch\.float32"):
        linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm="bf16")
    monkeypatch.setattr(cpu, "_BF16_RUNS", False)  # a processor without the instructions
    hidden, weight = hidden.bfloat16(), weight.bfloat16()
    with pytest.raises(ValueError, match="AVX512_BF16"):
        linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm="bf16")


@needs_extension
@pytest.mark.parametrize("limit", ["DEFAULT", "AVX512_CORE", "AVX2"])
def test_linear_cross_entropy__runs_where_onednn_may_not_use_the_instructions(limit):
    """The processor's flags alone would choose micro-kernels that refuse."""
    code = (
        "import torch, vrpo_kernels; from vrpo_kernels.linear_cross_entropy import cpu;"
        "x, w = torch.ones(3, 8).bfloat16(), torch.ones(5, 8).bfloat16();"
        "print(*vrpo_kernels.linear_cross_entropy(x, w, torch.arange(3)).tolist(), cpu._BF16_RUNS)"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": limit}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    *nll, runs = done.stdout.split()
    assert [float(value) for value in nll] == pytest.approx([math.log(5)] * 3)
    assert runs == str(cpu._BF16_RUNS if limit == "DEFAULT" else False)


@needs_extension
@pytest.mark.skipif(
    "ONEDNN_MAX_CPU_ISA" in os.environ
    or not Path("/proc/cpuinfo").exists()
    or "avx512_bf16" not in Path("/proc/cpuinfo").read_text(),
    reason="the processor has no AVX512_BF16, or oneDNN may not use it",
)
def test_gemms__offer_bf16_where_the_processor_has_it():
    """Else a wrong refusal would take the route and its tests away in silence."""
    assert "bf16" in cpu.gemms(torch.bfloat16)


@needs_extension
def test_plan__keeps_bf16_tiles_in_bf16():
    hidden, weight, *_ = make_inputs(40, 600, 24, torch.bfloat16)
    hidden.requires_grad_(), weight.requires_grad_()
    for gemm in cpu.gemms(torch.bfloat16):
        plan = plan_linear_cross_entropy(hidden, weight, backend="cpu", gemm=gemm)
        assert plan.kept_bytes == (2 if gemm == "bf16" else 4) * 600 * 48 + 4 * 2 * 48


@needs_extension
def test_probe_gemms__times_every_choice():
    for dtype in DTYPES:
        seconds = cpu.probe_gemms(dtype, repeats=1)
        assert set(seconds) == set(cpu.gemms(dtype)) and min(seconds.values()) > 0
        assert cpu.resolve_gemm("auto", dtype) in seconds


@needs_extension
@every_route
def test_linear_cross_entropy__nan_inputs_give_nan(gemm, dtype):
    hidden, weight, targets, _ = make_inputs(20, 600, 8, dtype)
    hidden[3, 2] = float("nan")
    nll = linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm=gemm)
    assert nll[3].isnan() and nll.isnan().sum() == 1
    hidden, weight, targets, _ = make_inputs(20, 600, 8, dtype)
    weight[555, 2] = float("nan")  # nobody's target: only the sums can tell
    targets[targets == 555] = 0
    assert linear_cross_entropy(hidden, weight, targets, backend="cpu", gemm=gemm).isnan().all()


def test_public_names__exist():
    assert all(hasattr(vrpo_kernels, name) for name in vrpo_kernels.__all__)
