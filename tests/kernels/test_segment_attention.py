"""segment_attention: the formula, the tolerance policy, the same bits in any pack, its contract."""

from itertools import pairwise

import pytest
import torch
from backends import both_backends, needs_extension

from vrpo_kernels import segment_attention, testing
from vrpo_kernels.segment_attention import op, reference

LENGTHS = [3, 3, 7, 1, 0, 16, 17, 1]
SCALE = 0.4


def boundaries(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def make_inputs(lengths=LENGTHS, heads=4, key_heads=2, size=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(sum(lengths), count, size) for count in (heads, key_heads, key_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def upstream_of(query):
    generator = torch.Generator().manual_seed(9)
    drawn = torch.empty(2, *query.shape, dtype=torch.float64).uniform_(generator=generator)
    signed = torch.where(drawn[0] < 0.5, -1.0, 1.0) * 10.0 ** (-3 * drawn[1])
    return signed.to(query.dtype)


def by_token(query, key, value, lengths):
    """One query at a time, written out."""
    out, group = torch.empty_like(query), query.shape[1] // key.shape[1]
    for start, end in pairwise(boundaries(lengths).tolist()):
        for t in range(start, end):
            for head in range(query.shape[1]):
                score = SCALE * (key[start:end, head // group] @ query[t, head])
                weight = (score - score.max()).exp()
                out[t, head] = weight @ value[start:end, head // group] / weight.sum()
    return out


def differentiated(attend, inputs, upstream):
    """Output and gradients, as matrices with a row per token."""
    leaves = [heads.detach().clone().requires_grad_() for heads in inputs]
    out = attend(*leaves)
    gradients = torch.autograd.grad(out, leaves, upstream.to(out.dtype))
    return [tensor.detach().flatten(1) for tensor in (out, *gradients)]


def ratios_to_policy(inputs, lengths):
    """Output and gradients of the C++ op, held against float64 and the formula in float32."""
    cu, upstream = boundaries(lengths), upstream_of(inputs[0])

    def formula(*leaves):
        return reference.segment_attention(*leaves, cu, SCALE)

    found = differentiated(
        lambda *leaves: segment_attention(*leaves, cu, scale=SCALE, backend="cpu"), inputs, upstream
    )
    truth = differentiated(formula, [heads.double() for heads in inputs], upstream)
    baseline = differentiated(formula, inputs, upstream)
    names = ("out", "dquery", "dkey", "dvalue")
    return {
        name: testing.fp32_error_ratio(*three)
        for name, *three in zip(names, found, truth, baseline, strict=True)
    }


def test_reference__is_the_formula_token_by_token():
    inputs = make_inputs(dtype=torch.float64)
    out = segment_attention(*inputs, boundaries(LENGTHS), scale=SCALE)
    torch.testing.assert_close(out, by_token(*inputs, LENGTHS))


@needs_extension
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads", "size"),
    [
        (LENGTHS, 4, 2, 8),
        ([25, 31, 14], 4, 4, 16),
        ([64, 65, 130], 2, 1, 24),
        ([63, 200], 3, 3, 64),
        ([5, 9], 2, 2, 130),
        ([1], 1, 1, 1),
    ],
)
def test_cpu__stays_within_the_tolerance_policy(lengths, heads, key_heads, size):
    testing.assert_ratios(ratios_to_policy(make_inputs(lengths, heads, key_heads, size), lengths))


@needs_extension
@pytest.mark.parametrize("size", [8, 24])
def test_cpu__large_scores_of_much_the_same_size_stay_within_the_policy(size):
    """Keys and queries with a large common part: one number for maximum and sum of the weights would lose the
    latter to rounding.
    """
    lengths = [9, 40]
    query, key, value = make_inputs(lengths, size=size)
    query, key = query + 30, key / 30 + 30
    testing.assert_ratios(ratios_to_policy([query, key, value], lengths))


@needs_extension
@pytest.mark.parametrize("common", [1.0, 1e3, 1e6])
def test_cpu__equal_keys_have_equal_weights_in_backward_too(common):
    query, key = (torch.full((8, 1, 4), common, requires_grad=True) for _ in range(2))
    value = torch.randn(8, 1, 4, requires_grad=True)
    out = segment_attention(query, key, value, boundaries([8]), scale=0.5, backend="cpu")
    (gradient,) = torch.autograd.grad(out.sum(), value)
    testing.assert_bitwise_equal(gradient, torch.ones_like(value))  # 8 times 1 / 8


@needs_extension
def test_cpu__a_segment_has_the_same_bits_in_any_pack():
    inputs, cu = make_inputs([70, 20, 9]), boundaries([70, 20, 9])
    upstream = upstream_of(inputs[0])

    def bits(place, boundaries_S1):
        return differentiated(
            lambda *leaves: segment_attention(*leaves, boundaries_S1, scale=SCALE, backend="cpu"),
            [heads[place] for heads in inputs],
            upstream[place],
        )

    whole = bits(slice(None), cu)
    for start, end in pairwise(cu.tolist()):
        alone = bits(slice(start, end), boundaries([end - start]))
        for found, expected in zip(whole, alone, strict=True):
            testing.assert_bitwise_equal(found[start:end], expected)


@needs_extension
def test_cpu__the_same_bits_for_any_number_of_threads_and_any_strides():
    lengths = [90, 33, 64, 70]
    inputs, cu = make_inputs(lengths, size=32), boundaries(lengths)
    strided = [heads.transpose(0, 1).contiguous().transpose(0, 1) for heads in inputs]
    backwards = [
        heads.flip(2).contiguous().flip(2).transpose(1, 2).contiguous().transpose(1, 2) for heads in inputs
    ]
    assert backwards[0].stride(2) != 1
    upstream, before = upstream_of(inputs[0]), torch.get_num_threads()
    results = []
    try:
        for threads, given in ((1, inputs), (2, inputs), (1, strided), (2, backwards)):
            torch.set_num_threads(threads)
            results.append(
                differentiated(
                    lambda *leaves: segment_attention(*leaves, cu, scale=SCALE, backend="cpu"),
                    given,
                    upstream,
                )
            )
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            testing.assert_bitwise_equal(found, expected)


@needs_extension
def test_cpu__the_same_bits_with_and_without_gradients():
    inputs, cu = make_inputs(), boundaries(LENGTHS)
    without = segment_attention(*inputs, cu, scale=SCALE, backend="cpu")
    tracked = [heads.requires_grad_() for heads in inputs]
    testing.assert_bitwise_equal(
        segment_attention(*tracked, cu, scale=SCALE, backend="cpu").detach(), without
    )


@needs_extension
def test_cpu__writes_every_element_and_reads_no_other_segment():
    inputs, cu = make_inputs(), boundaries(LENGTHS)
    inputs[1][6:13] = torch.nan  # the keys of the segment of length 7
    with testing.poisoned_empty():
        results = differentiated(
            lambda *leaves: segment_attention(*leaves, cu, scale=SCALE, backend="cpu"),
            inputs,
            upstream_of(inputs[0]),
        )
    inside = torch.zeros(len(inputs[0]), dtype=torch.bool)
    inside[6:13] = True
    for result in results:
        assert result[~inside].isfinite().all()
    assert results[0][inside].isnan().all()


@both_backends
def test_segment_attention__large_scores_do_not_overflow(backend):
    query, key, value = (1e3 * heads for heads in make_inputs([6], 1, 1, 4))
    out = segment_attention(query, key, value, boundaries([6]), scale=1.0, backend=backend)
    chosen = (key[:, 0] @ query[:, 0].T).argmax(0)
    torch.testing.assert_close(out[:, 0], value[chosen, 0])


@both_backends
def test_segment_attention__no_tokens_and_no_segments(backend):
    for lengths in ([], [0, 0]):
        inputs = [heads.requires_grad_() for heads in make_inputs(lengths)]
        out = segment_attention(*inputs, boundaries(lengths), scale=SCALE, backend=backend)
        assert out.shape == (0, 4, 8)
        assert torch.autograd.grad(out.sum(), inputs[0])[0].shape == (0, 4, 8)


def test_reference__passes_gradcheck_twice():
    inputs = [heads.requires_grad_() for heads in make_inputs([2, 3], 2, 1, 3, torch.float64)]

    def attend(*leaves):
        return segment_attention(*leaves, boundaries([2, 3]), scale=SCALE)

    assert torch.autograd.gradcheck(attend, inputs)
    assert torch.autograd.gradgradcheck(attend, inputs)


@needs_extension
def test_cpu__refuses_a_second_derivative():
    inputs, cu = [heads.requires_grad_() for heads in make_inputs()], boundaries(LENGTHS)
    out = segment_attention(*inputs, cu, scale=SCALE, backend="cpu")
    (gradient,) = torch.autograd.grad((out**2).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="segment_attention has no second derivative"):
        torch.autograd.grad(gradient.sum(), inputs[1])


@needs_extension
def test_cpu__torch_func_has_the_values_of_plain_pytorch():
    query, key, value = make_inputs()
    cu = boundaries(LENGTHS)

    def loss(backend):
        return lambda q: segment_attention(q, key, value, cu, scale=SCALE, backend=backend).square().sum()

    several = torch.stack([query, 2 * query])
    for transform in (torch.func.grad, lambda f: torch.func.vmap(torch.func.grad(f))):
        given = query if transform is torch.func.grad else several
        found, expected = (transform(loss(backend))(given) for backend in ("cpu", "reference"))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@needs_extension
def test_cpu__passes_opcheck():
    inputs, cu = make_inputs(), boundaries(LENGTHS)
    leaves = [heads.clone().requires_grad_() for heads in inputs]
    torch.library.opcheck(op._forward, (*leaves, cu, SCALE))
    lse_HT = op._forward(*inputs, cu, SCALE)[1]
    torch.library.opcheck(op._backward, (upstream_of(inputs[0]), *inputs, lse_HT, cu, SCALE))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v, cu: (q[0], k, v, cu), "query_THd must have shape"),
        (lambda q, k, v, cu: (q, k.double(), v, cu), "same dtype"),
        (lambda q, k, v, cu: (q, k, v[:, :1], cu), "key_THd and value_THd must have the same shape"),
        (lambda q, k, v, cu: (q, k[..., :4], v[..., :4], cu), r"same \(T, d\)"),
        (lambda q, k, v, cu: (q[:, :3], k, v, cu), "key heads must divide heads, got 2 and 3"),
        (lambda q, k, v, cu: (q.long(), k, v, cu), "query_THd must be float32"),
        (lambda q, k, v, cu: (q, k, v, cu.long()), "cu_seqlens_S1 must be int32"),
        (lambda q, k, v, cu: (q, k, v, cu[1:]), "must start at 0, never descend and end at 48"),
        (lambda q, k, v, cu: (q, k, v, cu[:-1]), "must start at 0, never descend and end at 48"),
        (lambda q, k, v, cu: (q, k, v, cu[[0, 2, 1, -1]]), "must start at 0, never descend and end at 48"),
        (lambda q, k, v, cu: (q, k, v, cu[:0]), "must start at 0, never descend and end at 48"),
    ],
)
@both_backends
def test_segment_attention__refuses_what_does_not_fit(change, message, backend):
    with pytest.raises(ValueError, match=message):
        segment_attention(*change(*make_inputs(), boundaries(LENGTHS)), scale=SCALE, backend=backend)


def test_segment_attention__says_why_a_backend_cannot_run():
    inputs, cu = make_inputs(dtype=torch.float64), boundaries(LENGTHS)
    with pytest.raises(ValueError, match=r"it computes float32, not torch\.float64"):
        segment_attention(*inputs, cu, scale=SCALE, backend="cpu")
    with pytest.raises(ValueError, match="backend must be 'auto', 'cpu' or 'reference', got 'triton'"):
        segment_attention(*inputs, cu, scale=SCALE, backend="triton")
