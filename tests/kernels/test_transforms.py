"""Second derivatives, torch.func, checkpointing: right values, or an error that says what to do."""

import functools

import pytest
import torch
from backends import needs_extension
from torch.utils.checkpoint import checkpoint

from vrpo_kernels import (
    cross_entropy,
    elbo_from_hidden,
    elbo_from_logits,
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
)
from vrpo_kernels.testing import assert_bitwise_equal

# torch's forward-mode AD scripts its decompositions on first use, and scripting is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
N, V = 5, 20
TARGETS = torch.tensor([3, 0, 19, 7, 7])
ROWS = torch.tensor([4, 1])


def _cross_entropy(z, **options):
    return cross_entropy(z, TARGETS, **options)


def _cross_entropy_rows(z, **options):
    return cross_entropy(z, TARGETS[:2], ROWS, **options)


D = 8
_GENERATOR = torch.Generator().manual_seed(0)
HIDDEN, WEIGHT, BIAS = (torch.randn(*size, generator=_GENERATOR) for size in ((N, D), (V, D), (V,)))
HEAD = {"softcap": 3.0, "scale": 0.7}


def _like(constant, x):
    return constant.to(x.dtype)


def _frozen_head(x, **options):
    return linear_cross_entropy(x, _like(WEIGHT, x), TARGETS, **options)


def _capped_head(x, **options):
    return linear_cross_entropy(x, _like(WEIGHT, x), TARGETS, bias=_like(BIAS, x), **HEAD, **options)


def _trained_head(w, **options):
    return linear_cross_entropy(_like(HIDDEN, w), w, TARGETS, **options)


def _trained_capped_head(w, **options):
    return linear_cross_entropy(_like(HIDDEN, w), w, TARGETS, bias=w[:, 0], **HEAD, **options)


def _recomputed_head(w, **options):
    return linear_cross_entropy(w[:N], w, TARGETS, kept_tile_bytes=0, **options)


def _replay(x, **options):
    head = (x, _like(WEIGHT, x), TARGETS)
    known = linear_cross_entropy_statistics(*(t.detach() for t in head), **options)
    return linear_cross_entropy_replay(*head, *known, **options)[0]


MASKED = torch.tensor([[True, False, True], [False, True, True]])
TOKENS = torch.tensor([[3, 1, 0], [2, 19, 7]])


def _elbo_from_hidden(x, **options):
    weights = _like(torch.tensor([1.5, -0.5]), x)
    return elbo_from_hidden(
        x.view(2, 3, D), _like(WEIGHT, x), TOKENS, MASKED, weights, num_masked=4, **options
    )


def _elbo_from_logits(z, **options):
    weights = _like(torch.tensor([1.5, -0.5]), z)
    return elbo_from_logits(z.view(2, 3, V), TOKENS, MASKED, weights, num_masked=4, **options)


OPS = {  # op(input, backend=...) -> nll, and the input's shape
    "cross_entropy": (_cross_entropy, (N, V)),
    "cross_entropy-rows": (_cross_entropy_rows, (N, V)),
    "linear-frozen": (_frozen_head, (N, D)),
    "linear-bias-softcap": (_capped_head, (N, D)),
    "linear-trained-bias-softcap": (_trained_capped_head, (V, D)),
    "linear-trained": (_trained_head, (V, D)),
    "linear-recomputed": (_recomputed_head, (V, D)),
    "replay": (_replay, (N, D)),
    "elbo_from_hidden": (_elbo_from_hidden, (6, D)),
    "elbo_from_logits": (_elbo_from_logits, (6, V)),
}
every_op = pytest.mark.parametrize("case", OPS.values(), ids=OPS)


def case_of(case, dtype=torch.float32):
    """(fused op, reference op, input)"""
    op, shape = case
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return functools.partial(op, backend="cpu"), functools.partial(op, backend="reference"), values


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def penalised(op, values):
    """Gradient of nll + 10 |dnll|^2: with a constant upstream gradient."""
    leaf = values.clone().requires_grad_()
    total = op(leaf).sum()
    (gradient,) = torch.autograd.grad(total, leaf, create_graph=True)
    (total + 10 * gradient.square().sum()).backward()
    return leaf.grad


@every_op
def test_reference__has_second_derivatives(case):
    _, reference, values = case_of(case, torch.float64)
    leaf = values.requires_grad_()
    assert torch.autograd.gradcheck(reference, leaf, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(reference, leaf)


@needs_extension
@every_op
@pytest.mark.parametrize("square", [False, True], ids=["constant-upstream", "upstream"])
def test_fused__a_second_derivative_raises(case, square):
    op, _, values = case_of(case)

    def nll_of(leaf):
        return op(leaf).square() if square else op(leaf)

    with pytest.raises(RuntimeError, match=r"no second derivative.*backend='reference'"):
        penalised(nll_of, values)


@needs_extension
@every_op
def test_fused__create_graph_alone_is_no_second_derivative(case):
    op, _, values = case_of(case)
    leaf = values.clone().requires_grad_()
    (want,) = torch.autograd.grad(op(leaf).sum(), leaf)
    (got,) = torch.autograd.grad(op(leaf).sum(), leaf, create_graph=True)
    assert_bitwise_equal(got.detach(), want)
    # What does not run through the op's input can still be differentiated.
    scale = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(leaf).sum(), leaf, create_graph=True)
    (dscale,) = torch.autograd.grad((scale * gradient).sum(), scale)
    assert_close(dscale, want.sum())


@needs_extension
@every_op
def test_fused__torch_func_has_the_values_of_the_reference(case):
    op, reference, values = case_of(case)
    upstream = torch.arange(1.0, 1 + op(values).numel())

    def transforms(nll_of):
        def total(x):
            return nll_of(x).sum()

        several = torch.stack([values, 2 * values, values.flip(0)])
        return [
            torch.func.grad(total)(values),
            torch.func.vjp(nll_of, values)[1](upstream)[0],
            torch.func.jacrev(nll_of)(values),
            torch.func.vmap(nll_of)(several),
            torch.func.vmap(nll_of, in_dims=1, out_dims=1)(several.transpose(0, 1)),
            torch.func.vmap(torch.func.grad(total))(several),
            torch.func.grad(lambda x: torch.func.vmap(nll_of)(x).sum())(several),
            torch.func.grad_and_value(total)(values)[1],
        ]

    for got, want in zip(transforms(op), transforms(reference), strict=True):
        assert_close(got, want)


@needs_extension
@every_op
@pytest.mark.parametrize(
    ("transform", "missing"),
    [
        (lambda f, x: torch.func.jvp(f, (x,), (x,)), "forward-mode"),
        (lambda f, x: torch.func.jacfwd(f)(x), "forward-mode"),
        (lambda f, x: torch.func.hessian(lambda x: f(x).sum())(x), "forward-mode"),
        (lambda f, x: torch.func.jacrev(torch.func.grad(lambda x: f(x).sum()))(x), "second"),
        (lambda f, x: _dual(f, x), "forward-mode"),
    ],
    ids=["jvp", "jacfwd", "hessian", "jacrev-grad", "forward_ad"],
)
def test_fused__what_has_no_formula_raises(case, transform, missing):
    op, reference, values = case_of(case)
    with pytest.raises(RuntimeError, match=rf"no {missing}.*derivative.*backend='reference'"):
        transform(op, values)
    transform(reference, values)


@needs_extension
@every_op
def test_fused__compiled_code_never_drops_a_derivative(case):
    """It raises, in our words or in torch.compile's; vmap has the values of the reference."""
    op, reference, values = case_of(case)
    several = torch.stack([values, 2 * values])

    def compiled(transform):
        torch.compiler.reset()
        return torch.compile(lambda x: transform(op, x), fullgraph=True, backend="aot_eager")

    with pytest.raises(Exception, match="no forward-mode derivative"):  # dynamo wraps it in its own
        compiled(lambda f, x: torch.func.jvp(f, (x,), (x,))[1])(values)
    with pytest.raises(RuntimeError, match=r"double backward|create_graph=False"):
        penalised(compiled(lambda f, x: f(x)), values)
    got = compiled(lambda f, x: torch.func.vmap(f)(x))(several)
    assert_close(got, torch.func.vmap(reference)(several))


def _dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        return f(torch.autograd.forward_ad.make_dual(x, x))


@needs_extension
@every_op
def test_fused__dual_level_without_tangents_changes_nothing(case):
    op, _, values = case_of(case)
    with torch.autograd.forward_ad.dual_level():
        assert_bitwise_equal(op(values), op(values.clone()))


@needs_extension
@every_op
@pytest.mark.parametrize("reentrant", [False, True])
def test_fused__checkpointing_and_saved_tensor_hooks_change_no_bit(case, reentrant):
    op, _, values = case_of(case)

    def gradient(nll_of, **options):
        leaf = values.clone().requires_grad_()
        (nll_of(2 * leaf) * torch.arange(1.0, 1 + op(values).numel())).sum().backward(**options)
        return leaf.grad

    want = gradient(op)
    recomputed = functools.partial(checkpoint, op, use_reentrant=reentrant)
    assert_bitwise_equal(gradient(recomputed), want)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, torch.clone):
        assert_bitwise_equal(gradient(op), want)
    with torch.autograd.graph.save_on_cpu():
        assert_bitwise_equal(gradient(op), want)


@needs_extension
@every_op
@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph")
def test_fused__create_graph_works_through_checkpointing(case):
    op, _, values = case_of(case)
    leaf = values.clone().requires_grad_()
    op(leaf).sum().backward()
    want, leaf.grad = leaf.grad, None
    checkpoint(op, leaf, use_reentrant=False).sum().backward(create_graph=True)
    assert_bitwise_equal(leaf.grad.detach(), want)
    leaf.grad = None


@needs_extension
def test_functional_call__per_sample_gradients_of_a_module():
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(WEIGHT.clone())

        def forward(self, hidden, targets, backend):
            return linear_cross_entropy(hidden, self.weight, targets, backend=backend).sum()

    head = Head()
    parameters = dict(head.named_parameters())

    def gradients(backend):
        def loss(parameters, hidden, target):
            return torch.func.functional_call(head, parameters, (hidden[None], target[None], backend))

        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, HIDDEN, TARGETS)

    assert_close(gradients("cpu")["weight"], gradients("reference")["weight"])
    # Without a transform a functional call is a call.
    got = torch.func.functional_call(head, parameters, (HIDDEN, TARGETS, "cpu"))
    assert_bitwise_equal(got, head(HIDDEN, TARGETS, "cpu"))


# What torch says of its own nonzero_static and searchsorted under vmap.
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:torch.searchsorted")
def test_vmap__over_masks_needs_their_number():
    several = torch.stack([MASKED, ~MASKED.flip(1)])
    logits = torch.randn(2, 3, V)

    def elbos(masked, **known):
        return elbo_from_logits(logits, TOKENS, masked, torch.ones(2), **known)

    with pytest.raises(ValueError, match="num_masked must say how many are True"):
        torch.func.vmap(elbos)(several)
    several = torch.stack([MASKED, MASKED.flip(1)])
    got = torch.func.vmap(lambda masked: elbos(masked, num_masked=4))(several)
    assert_close(got, torch.stack([elbos(masked) for masked in several]))
