"""cross_entropy(in_place=True): which memory it may write over, and that nothing is written otherwise."""

import pytest
import torch
from backends import both_backends

from vrpo_kernels import cross_entropy
from vrpo_kernels.testing import assert_bitwise_equal

V = 5
SHARED = {  # rows of V classes that share memory, from 64 numbers
    "expanded": lambda x: x[:V].view(1, V).expand(3, V),
    "overlapping": lambda x: x.as_strided((3, V), (2, 1)),
    "last-class-shared": lambda x: x.as_strided((3, V), (V - 1, 1)),
    "one-class": lambda x: x[:1].view(1, 1).expand(3, 1),
    "overlapping-3-D": lambda x: x.as_strided((2, 3, V), (9, 3, 1)),
    "unfold": lambda x: x[:12].unfold(0, V, 2),
}
DISJOINT = {
    "padded": lambda x: x.view(8, 8)[:, :V],
    "every-other": lambda x: x.view(8, 8)[::2, :V],
    "touching": lambda x: x[: 3 * V].view(3, V),
    "one-row-stride-0": lambda x: x.as_strided((1, V), (0, 1)),
    "singleton-axes": lambda x: x.as_strided((2, 1, 3, V), (24, 1, 8, 1)),
    "one-class-column": lambda x: x.view(8, 8)[:, :1],
}


def logits_of(view):
    leaf = torch.linspace(-2, 2, 64).requires_grad_()
    computed = leaf * 1
    logits = view(computed)
    targets = torch.arange(logits[..., 0].numel()).remainder(logits.shape[-1]).view(logits.shape[:-1])
    return leaf, computed, logits, targets


@both_backends
@pytest.mark.parametrize("view", SHARED.values(), ids=SHARED)
def test_cross_entropy__in_place_refuses_rows_that_share_memory(backend, view):
    _, computed, logits, targets = logits_of(view)
    before = computed.detach().clone()
    with pytest.raises(ValueError, match="rows share no memory"):
        cross_entropy(logits, targets, in_place=True, backend=backend)
    assert_bitwise_equal(computed.detach(), before)
    # Rows that are not scored are overwritten too, with zeros.
    with pytest.raises(ValueError, match="rows share no memory"):
        cross_entropy(logits, targets.reshape(-1)[:1], torch.tensor([1]), in_place=True, backend=backend)


@both_backends
@pytest.mark.parametrize("view", SHARED.values(), ids=SHARED)
def test_cross_entropy__rows_that_share_memory_add_their_gradients(backend, view):
    """Not in place, such logits are as right as a copy of them."""
    leaf, _, logits, targets = logits_of(view)
    upstream = torch.arange(1.0, 1 + targets.numel()).view(targets.shape)
    want_leaf, _, want_logits, _ = logits_of(view)
    cross_entropy(logits, targets, backend=backend).backward(upstream)
    cross_entropy(want_logits.contiguous(), targets, backend="reference").backward(upstream)
    torch.testing.assert_close(leaf.grad, want_leaf.grad, rtol=1e-5, atol=1e-7)


@both_backends
@pytest.mark.parametrize("view", DISJOINT.values(), ids=DISJOINT)
def test_cross_entropy__in_place_takes_any_rows_of_their_own(backend, view):
    leaf, computed, logits, targets = logits_of(view)
    outside = torch.ones(64, dtype=torch.bool)
    view(outside).fill_(False)
    before = computed.detach().clone()
    want_leaf, _, want_logits, _ = logits_of(view)
    cross_entropy(want_logits, targets, backend=backend).sum().backward()
    cross_entropy(logits, targets, in_place=True, backend=backend).sum().backward()
    assert_bitwise_equal(leaf.grad, want_leaf.grad)
    assert_bitwise_equal(computed.detach()[outside], before[outside], "memory between the rows")


@both_backends
@pytest.mark.parametrize(
    "view", [lambda x: x, lambda x: x[:, :V], lambda x: x.view(2, 3, 8), lambda x: x[1:].detach()[:1]]
)
def test_cross_entropy__in_place_refuses_a_leaf_and_its_views(backend, view):
    leaf = torch.randn(6, 8, requires_grad=True)
    logits = view(leaf)
    targets = torch.zeros(logits.shape[:-1], dtype=torch.int64)
    before = leaf.detach().clone()
    if logits.requires_grad:
        with pytest.raises(ValueError, match="leaf"):
            cross_entropy(logits, targets, in_place=True, backend=backend).sum().backward()
    else:  # there is no backward pass that could write
        cross_entropy(logits, targets, in_place=True, backend=backend)
    assert_bitwise_equal(leaf.detach(), before)


@both_backends
def test_cross_entropy__in_place_refuses_a_second_derivative(backend):
    leaf = torch.randn(3, 8, requires_grad=True)
    nll = cross_entropy(leaf * 1, torch.tensor([0, 1, 2]), in_place=True, backend=backend)
    (gradient,) = torch.autograd.grad(nll.sum(), leaf, create_graph=True)
    assert gradient.isfinite().all()
    with pytest.raises(RuntimeError, match="no second derivative"):
        gradient.square().sum().backward()


@both_backends
def test_cross_entropy__in_place_has_memory_for_one_gradient(backend):
    computed = torch.randn(3, 8, requires_grad=True) * 1
    nll = cross_entropy(computed, torch.tensor([0, 1, 2]), in_place=True, backend=backend)

    def vjp(upstream):
        return torch.autograd.grad(nll, computed, upstream, retain_graph=True)

    with pytest.raises(RuntimeError, match="vmap"):
        torch.func.vmap(vjp)(torch.eye(3))
    with pytest.raises(RuntimeError, match=r"vmap|Batching rule"):  # torch's words
        torch.autograd.grad(nll, computed, torch.eye(3), is_grads_batched=True)


@both_backends
def test_cross_entropy__in_place_is_ignored_under_torch_func(backend):
    logits, targets = torch.randn(3, 8), torch.tensor([0, 1, 2])
    before = logits.clone()

    def total(z, in_place):
        return cross_entropy(z, targets, in_place=in_place, backend=backend).sum()

    got, want = torch.func.grad(total)(logits, True), torch.func.grad(total)(logits, False)
    assert_bitwise_equal(got, want)
    assert_bitwise_equal(logits, before)
