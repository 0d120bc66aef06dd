"""Inputs that are legal and rarely tried, each with the value of plain PyTorch, or refused by name."""

import pytest
import torch
import torch.nn.functional as F
from backends import both_backends

from vrpo_kernels import (
    cross_entropy,
    elbo_from_hidden,
    elbo_from_logits,
    gather_rows,
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    mask_select,
    pack_masked,
    philox4x32,
    segment_sum,
    token_weight_sums,
)
from vrpo_kernels.testing import assert_bitwise_equal

N, D, V = 6, 8, 20
_GENERATOR = torch.Generator().manual_seed(5)
HIDDEN, WEIGHT = torch.randn(N, D, generator=_GENERATOR), torch.randn(V, D, generator=_GENERATOR)
TARGETS = torch.tensor([3, 0, 19, 7, 7, 12])
UPSTREAM = torch.linspace(-1, 2, N)


def assert_close(got, want):
    for ours, plain in zip(got, want, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)


def head_results(nll_of, hidden_view=lambda x: x, weight_view=lambda w: w, upstream=UPSTREAM):
    leaves = HIDDEN.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    nll = nll_of(hidden_view(leaves[0]), weight_view(leaves[1]))
    nll.backward(upstream[: len(nll)])
    return nll.detach(), leaves[0].grad, leaves[1].grad


def plain(x, w):
    return F.cross_entropy(x @ w.T, TARGETS[: len(x)], reduction="none")


HIDDEN_VIEWS = {
    "transposed": lambda x: x.T.contiguous().T,
    "one-row-expanded": lambda x: x[:1].expand(N, D),
    "one-column-expanded": lambda x: x[:, :1].expand(N, D),
    "every-other-row": lambda x: x[::2],
    "overlapping-rows": lambda x: x.as_strided((N, D), (3, 1)),
    "negated": torch._neg_view,
    "no-rows": lambda x: x[:0],
}
WEIGHT_VIEWS = {
    "transposed": lambda w: w.T.contiguous().T,
    "one-row-expanded": lambda w: w[:1].expand(V, D),
    "every-other-number": lambda w: torch.cat([w, w], 1)[:, ::2],
    "negated": torch._neg_view,
}


@both_backends
@pytest.mark.parametrize("kept_tile_bytes", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", HIDDEN_VIEWS)
def test_linear_cross_entropy__hidden_of_any_strides(name, backend, kept_tile_bytes):
    def ours(x, w):
        options = {"backend": backend, "kept_tile_bytes": kept_tile_bytes}
        return linear_cross_entropy(x, w, TARGETS[: len(x)], **options)

    view = HIDDEN_VIEWS[name]
    assert_close(head_results(ours, view), head_results(plain, view))


@both_backends
@pytest.mark.parametrize("kept_tile_bytes", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", WEIGHT_VIEWS)
def test_linear_cross_entropy__weight_of_any_strides(name, backend, kept_tile_bytes):
    def ours(x, w):
        return linear_cross_entropy(x, w, TARGETS, backend=backend, kept_tile_bytes=kept_tile_bytes)

    view = WEIGHT_VIEWS[name]
    assert_close(head_results(ours, weight_view=view), head_results(plain, weight_view=view))


BIAS_VIEWS = {
    "strided": lambda b: b.view(V, 2)[:, 0],
    "expanded": lambda b: b[:1].expand(V),
    "reversed": lambda b: b[:V].flip(0),
    "negated": lambda b: torch._neg_view(b[:V]),
    "overlapping-the-weight": None,
}


@both_backends
@pytest.mark.parametrize("kept_tile_bytes", [2**30, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", BIAS_VIEWS)
def test_linear_cross_entropy__bias_of_any_strides(name, backend, kept_tile_bytes):
    def gradients(nll_of):
        weight, numbers = WEIGHT.clone().requires_grad_(), torch.linspace(-1, 1, 2 * V).requires_grad_()
        view = BIAS_VIEWS[name]
        nll = nll_of(weight, weight[:, 3] if view is None else view(numbers))
        nll.backward(UPSTREAM)
        return nll.detach(), weight.grad, torch.zeros(1) if view is None else numbers.grad

    def ours(weight, bias):
        options = {"backend": backend, "kept_tile_bytes": kept_tile_bytes}
        return linear_cross_entropy(HIDDEN, weight, TARGETS, bias=bias, softcap=2.0, scale=0.5, **options)

    def torchs(weight, bias):
        logits = 2 * torch.tanh(0.5 * F.linear(HIDDEN, weight, bias) / 2)
        return F.cross_entropy(logits, TARGETS, reduction="none")

    assert_close(gradients(ours), gradients(torchs))


@both_backends
@pytest.mark.parametrize(
    "upstream",
    [torch.tensor(2.0).expand(N), torch.linspace(0, 1, 2 * N)[::2], torch._neg_view(UPSTREAM)],
    ids=["expanded", "strided", "negated"],
)
def test_linear_cross_entropy__upstream_of_any_strides(upstream, backend):
    def ours(x, w):
        return linear_cross_entropy(x, w, TARGETS, backend=backend)

    assert_close(head_results(ours, upstream=upstream), head_results(plain, upstream=upstream))


@both_backends
def test_linear_cross_entropy__the_head_may_be_the_hidden_states(backend):
    ours, torchs = WEIGHT.clone().requires_grad_(), WEIGHT.clone().requires_grad_()
    linear_cross_entropy(ours, ours, torch.arange(V), backend=backend).sum().backward()
    F.cross_entropy(torchs @ torchs.T, torch.arange(V), reduction="sum").backward()
    assert_close([ours.grad], [torchs.grad])


@both_backends
@pytest.mark.parametrize("kept_tile_bytes", [2**30, 0], ids=["kept", "recomputed"])
def test_linear_cross_entropy__no_hidden_size_is_a_uniform_distribution(backend, kept_tile_bytes):
    hidden, weight = torch.zeros(3, 0, requires_grad=True), torch.zeros(5, 0, requires_grad=True)
    options = {"backend": backend, "kept_tile_bytes": kept_tile_bytes}
    nll = linear_cross_entropy(hidden, weight, torch.tensor([0, 4, 2]), **options)
    nll.sum().backward()
    torch.testing.assert_close(nll.detach(), torch.full((3,), 5.0).log())
    assert hidden.grad.shape == (3, 0) and weight.grad.shape == (5, 0)


@both_backends
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=["nan", "inf"])
@pytest.mark.parametrize("where", ["upstream", "hidden"])
def test_linear_cross_entropy__a_bad_number_stays_in_its_row_and_the_head(where, value, backend):
    hidden, upstream = HIDDEN.clone(), torch.ones(N)
    (hidden if where == "hidden" else upstream)[2] = value
    leaves = hidden.requires_grad_(), WEIGHT.clone().requires_grad_()
    nll = linear_cross_entropy(*leaves, TARGETS, backend=backend)
    nll.backward(upstream)
    others = torch.tensor([0, 1, 3, 4, 5])
    want = head_results(plain, upstream=torch.ones(N))
    assert_close([nll[others], leaves[0].grad[others]], [want[0][others], want[1][others]])
    assert not leaves[0].grad[2].isfinite().any() and not leaves[1].grad.isfinite().all()


@both_backends
@pytest.mark.parametrize(
    "change",
    [lambda x: x.T.contiguous().T, lambda x: torch.stack([x, x], -1)[..., 0], torch._neg_view],
    ids=["transposed", "strided", "negated"],
)
def test_replay__known_numbers_of_any_strides(change, backend):
    """Statistics that are not contiguous used to be read as if they were."""

    def ours(x, w):
        known = linear_cross_entropy_statistics(HIDDEN, WEIGHT, TARGETS, backend=backend)
        changed = [change(part.neg() if change is torch._neg_view else part) for part in known[1:]]
        nll, drift = linear_cross_entropy_replay(x, w, TARGETS, known[0], *changed, backend=backend)
        assert drift < 1e-5
        return nll

    assert_close(head_results(ours), head_results(plain))


@both_backends
def test_cross_entropy__targets_rows_and_logits_of_any_strides(backend):
    logits = torch.randn(2, 3, V)
    targets = torch.arange(6).view(3, 2).T
    want = F.cross_entropy(logits.view(6, V), targets.reshape(-1), reduction="none").view(2, 3)
    assert_close([cross_entropy(logits, targets, backend=backend)], [want])
    negated = cross_entropy(torch._neg_view(logits.neg()), targets, backend=backend)
    assert_close([negated], [want])
    rows = torch.tensor([5, 1, 0, 1])[::2]
    picked = cross_entropy(logits, torch.tensor([1, 9, 2])[::2], rows, backend=backend)
    assert_close([picked], [F.cross_entropy(logits.view(6, V)[rows], torch.tensor([1, 2]), reduction="none")])


@both_backends
def test_cross_entropy__a_lazily_negated_view_is_no_memory_to_write_to(backend):
    logits = torch._neg_view(torch.randn(3, V, requires_grad=True) * 1)
    with pytest.raises(ValueError, match="lazily negated"):
        cross_entropy(logits, torch.tensor([0, 1, 2]), in_place=True, backend=backend)


@both_backends
def test_draws_and_packs__read_any_strides(backend):
    def strided(x):
        return torch.stack([x, x + 1], -1)[..., 0]

    length, counter = torch.tensor([5, 70, 3]), torch.arange(9).view(3, 3)
    draw = (length, counter, torch.zeros(3, dtype=torch.int64), torch.tensor([2, 30, 1]))
    options = {"seed": 3, "by_rank": True, "backend": backend}
    position, offsets = mask_select(*draw, **options)
    for got, want in zip(mask_select(*map(strided, draw), **options), (position, offsets), strict=True):
        assert_bitwise_equal(got, want)
    pack = (torch.arange(84), torch.tensor([2, 0, 4]), length, position, offsets)
    options = {"num_samples": 1, "mask_token_id": 7, "backend": backend}
    packs = pack_masked(*pack, **options), pack_masked(*map(strided, pack), **options)
    for want, got in zip(*packs, strict=True):
        assert_bitwise_equal(got, want)
    rows = (torch.rand(len(position)), position, offsets, length)
    options = {"num_samples": 1, "num_tokens": 78, "backend": backend}
    sums = token_weight_sums(*rows, **options), token_weight_sums(*map(strided, rows), **options)
    for want, got in zip(*sums, strict=True):
        assert_bitwise_equal(got, want)


def test_gather_rows_and_segment_sum__upstream_of_any_strides():
    rows, values = torch.randn(5, 3, requires_grad=True), torch.ones(5, requires_grad=True)
    gather_rows(rows, torch.tensor([4, 0])).backward(torch.tensor(3.0).expand(2, 3))
    assert rows.grad[:, 0].tolist() == [3, 0, 0, 0, 3]
    offsets = torch.tensor([0, 9, 2, 9, 5])[::2]
    segment_sum(values, offsets).backward(torch.tensor([1.0, 0.0, float("nan")])[::2])
    assert values.grad[:2].tolist() == [1, 1] and values.grad[2:].isnan().all()
    assert segment_sum(torch.tensor(2.0).expand(5), torch.tensor([0, 2, 5])).tolist() == [4, 6]


def test_ops__work_in_inference_mode():
    with torch.inference_mode():
        logits = HIDDEN @ WEIGHT.T
        want = F.cross_entropy(logits, TARGETS, reduction="none")
        masked = torch.ones(1, N, dtype=torch.bool)
        assert_close([linear_cross_entropy(HIDDEN, WEIGHT, TARGETS)], [want])
        assert_close(
            [elbo_from_hidden(HIDDEN[None], WEIGHT, TARGETS[None], masked, torch.ones(1))],
            [-want.sum(0, keepdim=True)],
        )
        assert_close([cross_entropy(logits, TARGETS, in_place=True)], [want])


STRANGE = {
    "a list": (lambda x: x.tolist(), "must be a tensor, got list"),
    "sparse": (lambda x: x.to_sparse(), "dense, strided tensor, got a torch.sparse_coo one"),
    "nested": (lambda x: torch.nested.nested_tensor([x, x[:1]], layout=torch.jagged), "got a nested one"),
    "complex": (lambda x: x.to(torch.complex64), "must be float32"),
    "float8": (lambda x: x.to(torch.float8_e4m3fn), "must be float32"),
    "bool": (lambda x: x > 0, "must be float32"),
}


@both_backends
@pytest.mark.parametrize("name", STRANGE)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_ops__name_what_is_no_plain_floating_tensor(name, backend):
    change, message = STRANGE[name]
    masked, ones = torch.ones(1, N, dtype=torch.bool), torch.ones(1)
    elbo = (TARGETS[None], masked, ones)
    calls = {
        "hidden": lambda x: linear_cross_entropy(change(x), WEIGHT, TARGETS, backend=backend),
        "logits": lambda x: cross_entropy(change(x @ WEIGHT.T), TARGETS, backend=backend),
    }
    if name != "nested":  # a nested tensor has no [None]
        calls |= {
            "hidden ": lambda x: elbo_from_hidden(change(x[None]), WEIGHT, *elbo, backend=backend),
            "logits ": lambda x: elbo_from_logits(change((x @ WEIGHT.T)[None]), *elbo, backend=backend),
        }
    for argument, call in calls.items():
        with pytest.raises(ValueError, match=rf"{argument.strip()} .*{message}"):
            call(HIDDEN)


def test_meta_tensors__have_no_backend():
    parts = (HIDDEN.to("meta"), WEIGHT.to("meta"), TARGETS.to("meta"))
    with pytest.raises(ValueError, match="cannot run because"):
        linear_cross_entropy(*parts)


@pytest.mark.parametrize("seed", [True, 1.0, -1, 2**64])
def test_draws__name_a_seed_that_is_none(seed):
    ones = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="seed must be an integer in"):
        philox4x32(seed, ones, ones, ones, ones)
    with pytest.raises(ValueError, match="seed must be an integer in"):
        mask_select(ones, ones.expand(1, 3), ones, ones, seed=seed, by_rank=True)


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_philox__names_a_word_that_would_overflow(dtype):
    ones = torch.ones(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="c2 must be int64"):
        philox4x32(0, ones, ones, ones.to(dtype), ones)


@pytest.mark.parametrize("token", [True, 1.5])
def test_pack_masked__names_a_mask_token_that_is_none(token):
    one, none = torch.ones(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ValueError, match="mask_token_id must be an integer"):
        pack_masked(one, one - 1, one, none, torch.zeros(2).long(), num_samples=1, mask_token_id=token)
