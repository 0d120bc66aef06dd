"""rms_norm: the formula, the tolerance policy, the same bits whatever the threads, its contract."""

import pytest
import torch
from backends import both_backends, needs_extension

from vrpo_kernels import rms_norm, testing
from vrpo_kernels.rms_norm import op

EPS = 1e-5


def make_inputs(rows=130, size=64, dtype=torch.float32, seed=0):
    """(hidden, weight, upstream), rows of unequal size."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        torch.randn(shape, generator=generator).double() for shape in ((rows, size), (size,), (rows, size))
    ]
    drawn[0] *= 10.0 ** torch.linspace(-3, 2, rows)[:, None].double()
    return [tensor.to(dtype) for tensor in drawn]


def differentiated(normalise, hidden, weight, upstream):
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (hidden, weight)]
    out = normalise(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


def by_hand(hidden, weight):
    return weight * hidden / (hidden.square().mean(-1, keepdim=True) + EPS).sqrt()


def run(backend):
    return lambda hidden, weight: rms_norm(hidden, weight, eps=EPS, backend=backend)


@both_backends
@pytest.mark.parametrize(("rows", "size"), [(130, 64), (1, 1), (65, 17), (3, 15), (64, 130)])
def test_rms_norm__stays_within_the_tolerance_policy(backend, rows, size):
    inputs = make_inputs(rows, size)
    found = differentiated(run(backend), *inputs)
    truth = differentiated(by_hand, *(tensor.double() for tensor in inputs))
    baseline = differentiated(by_hand, *inputs)
    names = ("out", "dhidden", "dweight")
    each = zip(names, found, truth, baseline, strict=True)
    testing.assert_ratios({name: testing.fp32_error_ratio(*three) for name, *three in each})
    by_row = [
        part[0].double().sub(part[1]).norm(dim=1) / part[1].norm(dim=1) for part in ((found[0], truth[0]),)
    ]
    assert by_row[0].max() < 4 * testing.ROUNDOFF[torch.float32]  # of small rows beside large ones too


@needs_extension
def test_cpu__the_same_bits_for_any_number_of_threads_and_any_strides():
    hidden, weight, upstream = make_inputs(1000, 48)
    spread = torch.stack((hidden, hidden), dim=-1)[..., 0]
    before, results = torch.get_num_threads(), []
    try:
        for threads, given in ((1, hidden), (2, hidden), (1, spread)):
            torch.set_num_threads(threads)
            results.append(differentiated(run("cpu"), given, weight, upstream))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            testing.assert_bitwise_equal(found, expected)


@needs_extension
def test_cpu__a_row_has_the_same_bits_with_and_without_gradients_and_alone():
    hidden, weight, _ = make_inputs()
    whole = run("cpu")(hidden, weight)
    testing.assert_bitwise_equal(run("cpu")(hidden[70:71], weight), whole[70:71])
    testing.assert_bitwise_equal(run("cpu")(hidden.requires_grad_(), weight).detach(), whole)


@needs_extension
def test_cpu__writes_every_element():
    with testing.poisoned_empty():
        results = differentiated(run("cpu"), *make_inputs(67, 19))
    assert all(result.isfinite().all() for result in results)


@both_backends
def test_rms_norm__keeps_leading_axes_and_takes_no_rows(backend):
    hidden, weight, _ = make_inputs(6, 8)
    out = run(backend)(hidden.view(2, 3, 8), weight)
    torch.testing.assert_close(out.view(6, 8), by_hand(hidden, weight))
    assert run(backend)(hidden[:0].view(2, 0, 8), weight).shape == (2, 0, 8)


@both_backends
def test_rms_norm__a_row_of_zeros_stays_zero(backend):
    _, weight, _ = make_inputs(1, 8)
    hidden = torch.zeros(1, 8)
    out, dhidden, _ = differentiated(run(backend), hidden, weight, torch.ones(1, 8))
    assert not out.any()
    torch.testing.assert_close(dhidden[0], weight * EPS**-0.5)


@needs_extension
def test_cpu__a_frozen_weight_gets_no_gradient():
    hidden, weight, upstream = make_inputs()
    hidden.requires_grad_()
    out = run("cpu")(hidden, weight)
    (found,) = torch.autograd.grad(out, hidden, upstream)
    torch.testing.assert_close(found, differentiated(by_hand, hidden, weight, upstream)[1])


@needs_extension
def test_cpu__refuses_a_second_derivative():
    hidden, weight, _ = make_inputs()
    out = run("cpu")(hidden.requires_grad_(), weight)
    (gradient,) = torch.autograd.grad((out**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="rms_norm has no second derivative"):
        torch.autograd.grad(gradient.sum(), hidden)


def test_reference__passes_gradcheck_twice():
    leaves = [tensor.requires_grad_() for tensor in make_inputs(2, 3, torch.float64)[:2]]
    assert torch.autograd.gradcheck(run("auto"), leaves)
    assert torch.autograd.gradgradcheck(run("auto"), leaves)


@needs_extension
def test_cpu__passes_opcheck():
    hidden, weight, upstream = make_inputs(5, 8)
    torch.library.opcheck(
        op._forward, (hidden.clone().requires_grad_(), weight.clone().requires_grad_(), EPS)
    )
    torch.library.opcheck(op._forward, (hidden.view(1, 5, 8).requires_grad_(), weight, EPS))
    torch.library.opcheck(op._backward, (upstream, hidden, weight, op._forward(hidden, weight, EPS)[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, w: (h, w[:3]), r"hidden must be \(\.\.\., D\) and weight \(D,\)"),
        (lambda h, w: (h, w[None]), r"hidden must be \(\.\.\., D\) and weight \(D,\)"),
        (lambda h, w: (h.long(), w), "hidden must be float32"),
    ],
)
def test_rms_norm__refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        rms_norm(*change(*make_inputs()[:2]), eps=EPS)


def test_rms_norm__says_why_a_backend_cannot_run():
    hidden, weight, _ = make_inputs(dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"it computes float32, not torch\.bfloat16"):
        rms_norm(hidden, weight, eps=EPS, backend="cpu")
    with pytest.raises(ValueError, match="backend must be 'auto', 'cpu' or 'reference', got 'triton'"):
        rms_norm(hidden, weight, eps=EPS, backend="triton")
