"""segment_sum and gather_rows: values, gradients, determinism, registration."""

import itertools

import pytest
import torch

from vrpo_kernels import gather_rows, segment_sum
from vrpo_kernels.testing import assert_bitwise_equal


def random_segments(counts, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    value = torch.randn(sum(counts), dtype=dtype, generator=generator)
    return value, torch.tensor([0, *counts]).cumsum(0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_segment_sum__equals_a_sum_per_segment(dtype):
    value, offsets = random_segments([3, 0, 1, 500, 0], dtype)
    parts = [value[a:b].double().sum() for a, b in itertools.pairwise(offsets)]
    torch.testing.assert_close(segment_sum(value, offsets).double(), torch.stack(parts), rtol=1e-7, atol=0)


def test_segment_sum__an_empty_segment_is_exactly_zero():
    value, offsets = random_segments([0, 2, 0], torch.float32)
    total = segment_sum(value, offsets)
    assert total[0] == 0 and total[2] == 0


def test_segment_sum__a_long_one_signed_sum_keeps_fp32_accuracy():
    value = torch.full((100_001,), 0.1, dtype=torch.float32)
    total = segment_sum(value, torch.tensor([0, 100_001]))
    assert_bitwise_equal(total, (value.double().sum()).float().view(1))


def test_segment_sum__a_total_does_not_depend_on_its_batch():
    value, offsets = random_segments([17, 400, 3, 90], torch.float32)
    together = segment_sum(value, offsets)
    for s in range(4):
        part = value[offsets[s] : offsets[s + 1]].clone()
        alone = segment_sum(part, torch.tensor([0, len(part)]))
        assert_bitwise_equal(together[s : s + 1], alone)


def test_segment_sum__gradcheck_first_and_second_order():
    value, offsets = random_segments([2, 0, 3], torch.float64)
    value.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: segment_sum(v, offsets) ** 2, value)
    assert torch.autograd.gradgradcheck(lambda v: segment_sum(v, offsets) ** 2, value)


def test_segment_sum__no_rows_still_have_a_gradient():
    value = torch.zeros(0, requires_grad=True)
    total = segment_sum(value, torch.zeros(3, dtype=torch.int64))
    total.sum().backward()
    assert total.tolist() == [0, 0] and value.grad.shape == (0,)


def test_segment_sum__passes_opcheck():
    value, offsets = random_segments([2, 0, 3], torch.float32)
    torch.library.opcheck(torch.ops.vrpo_kernels.segment_sum, (value.requires_grad_(), offsets))


@pytest.mark.parametrize(
    ("value", "offsets", "message"),
    [
        (torch.zeros(3, 2), torch.tensor([0, 3]), "value_N must be"),
        (torch.zeros(3, dtype=torch.bfloat16), torch.tensor([0, 3]), "value_N must be"),
        (torch.zeros(3), torch.tensor([0, 3], dtype=torch.int32), "offsets_S1 must be"),
        (torch.zeros(3), torch.tensor([], dtype=torch.int64), "offsets_S1 must be"),
    ],
    ids=["2-D", "bf16", "int32", "no-offsets"],
)
def test_segment_sum__says_what_is_wrong(value, offsets, message):
    with pytest.raises(ValueError, match=message):
        segment_sum(value, offsets)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gather_rows__copies_forward_and_backward(dtype):
    hidden = torch.randn(9, 5).to(dtype).requires_grad_()
    rows = torch.tensor([7, 0, 3])
    upstream = torch.randn(3, 5).to(dtype)
    picked = gather_rows(hidden, rows)
    picked.backward(upstream)
    expected = torch.zeros_like(hidden)
    expected[rows] = upstream
    assert_bitwise_equal(picked.detach(), hidden.detach()[rows])
    assert_bitwise_equal(hidden.grad, expected)


def test_gather_rows__gradcheck_first_and_second_order():
    hidden, rows = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([4, 1])
    assert torch.autograd.gradcheck(lambda h: gather_rows(h, rows) ** 2, hidden)
    assert torch.autograd.gradgradcheck(lambda h: gather_rows(h, rows) ** 2, hidden)


def test_gather_rows__no_rows_still_pass_a_zero_gradient():
    hidden = torch.randn(5, 3, requires_grad=True)
    gather_rows(hidden, torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert torch.equal(hidden.grad, torch.zeros(5, 3))


def test_gather_rows__passes_opcheck():
    hidden = torch.randn(9, 5, requires_grad=True)
    torch.library.opcheck(torch.ops.vrpo_kernels.gather_rows, (hidden, torch.tensor([7, 0, 3])))


def test_gather_rows_and_segment_sum__compile_without_a_graph_break():
    hidden, rows = torch.randn(6, 3, requires_grad=True), torch.tensor([5, 0, 2])
    offsets = torch.tensor([0, 1, 3])

    def sums(hidden):
        return segment_sum(gather_rows(hidden, rows).sum(dim=1), offsets)

    compiled = torch.compile(sums, fullgraph=True, backend="aot_eager")
    upstream = torch.tensor([1.0, -2.0])
    (want,) = torch.autograd.grad(sums(hidden), hidden, upstream)
    (got,) = torch.autograd.grad(compiled(hidden), hidden, upstream)
    assert_bitwise_equal(got, want)


@pytest.mark.parametrize(
    ("hidden", "rows", "message"),
    [
        (torch.zeros(2, 3, 4), torch.tensor([0]), "hidden_TD must be"),
        (torch.zeros(2, 3), torch.tensor([0.0]), "row_N must be"),
        (torch.zeros(2, 3), torch.tensor([[0]]), "row_N must be"),
    ],
    ids=["3-D", "float-rows", "2-D-rows"],
)
def test_gather_rows__says_what_is_wrong(hidden, rows, message):
    with pytest.raises(ValueError, match=message):
        gather_rows(hidden, rows)
