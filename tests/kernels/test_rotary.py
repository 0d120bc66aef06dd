"""rotary: the formula, its gradient, its contract. The kernel's bits: interpreted.py, models/test_gpu.py."""

import math

import pytest
import torch
from backends import needs_extension

from vrpo_kernels import rotary, testing
from vrpo_kernels.rotary import op, reference


def make_inputs(batch=2, heads=4, key_heads=2, length=5, size=8, dtype=torch.float32, seed=0):
    """(query, key, cos, sin), heads as views of projections."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(batch, length, count, size, generator=generator).to(dtype).transpose(1, 2)
        for count in (heads, key_heads)
    )
    angle = 6 * torch.rand(batch, length, size // 2, generator=generator)
    return query, key, angle.cos(), angle.sin()


def complex_product(heads, cos, sin):
    """The same rotation as a product of complex numbers, in float64."""
    low, high = heads.double().chunk(2, dim=-1)
    turned = torch.complex(low, high) * torch.complex(cos.double(), sin.double())[:, None]
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rotary__is_a_product_of_complex_numbers(dtype):
    query, key, cos, sin = make_inputs(dtype=dtype)
    for found, heads in zip(rotary(query, key, cos, sin), (query, key), strict=True):
        exact = complex_product(heads, cos, sin)
        roundoff = torch.finfo(dtype).eps
        assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
        atol = 1e-15 if dtype is torch.float64 else 4e-7
        torch.testing.assert_close(found.double(), exact, rtol=roundoff, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rotary__gradient_is_rounded_once(dtype):
    query, key, cos, sin = make_inputs(dtype=dtype)
    leaves = [heads.detach().requires_grad_() for heads in (query, key)]
    turned = rotary(*leaves, cos, sin)
    upstream = [heads.roll(1, 2) for heads in (query, key)]
    found = torch.autograd.grad(turned, leaves, upstream)
    wide = [heads.double().requires_grad_() for heads in (query, key)]
    exact = [complex_product(heads, cos, sin) for heads in wide]
    truth = torch.autograd.grad(exact, wide, [g.double() for g in upstream])
    for gradient, expected in zip(found, truth, strict=True):
        bound = torch.finfo(dtype).eps / 2 * 1.001
        torch.testing.assert_close(gradient.double(), expected, rtol=bound, atol=1e-6)


def test_rotary__passes_gradcheck_twice():
    query, key, cos, sin = make_inputs(1, 2, 1, 3, 4, torch.float64)
    leaves = [heads.contiguous().requires_grad_() for heads in (query, key)]
    assert torch.autograd.gradcheck(lambda *heads: rotary(*heads, cos, sin), leaves)
    assert torch.autograd.gradgradcheck(lambda *heads: rotary(*heads, cos, sin), leaves)


def test_rotary__one_gradient_alone():
    query, key, cos, sin = make_inputs()
    query.requires_grad_()
    turned, _ = rotary(query, key, cos, sin)
    (gradient,) = torch.autograd.grad(turned, query, turned.detach())
    torch.testing.assert_close(gradient, query.detach())


def test_rotary__passes_opcheck():
    query, key, cos, sin = make_inputs()
    leaves = [heads.detach().requires_grad_() for heads in (query, key)]
    torch.library.opcheck(op._rotary, (*leaves, cos, sin, False, "auto"))


def test_rotary__position_zero_and_no_tokens_change_nothing():
    query, key, cos, sin = make_inputs(length=1)
    for found, heads in zip(rotary(query, key, 0 * cos + 1, 0 * sin), (query, key), strict=True):
        testing.assert_bitwise_equal(found.contiguous(), heads.contiguous())
    empty = [part[:, :, :0] for part in (query, key)]
    turned, _ = rotary(*empty, cos[:, :0], sin[:, :0])
    assert turned.shape == (2, 4, 0, 8)


def test_rotary__a_known_quarter_turn():
    query = torch.tensor([3.0, 5.0]).view(1, 1, 1, 2)
    angle = torch.tensor([math.pi / 2]).view(1, 1, 1)
    turned, _ = rotary(query, query, angle.cos(), angle.sin())
    torch.testing.assert_close(turned.flatten(), torch.tensor([-5.0, 3.0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, c, s: (q[..., :7], k, c, s), "d even"),
        (lambda q, k, c, s: (q[0], k, c, s), "must be"),
        (lambda q, k, c, s: (q, k.double(), c, s), "same dtype"),
        (lambda q, k, c, s: (q, k[:, :, :3], c, s), r"same \(B, L, d\)"),
        (lambda q, k, c, s: (q, k, c[:1], s), "cos_BLh"),
        (lambda q, k, c, s: (q, k, c, s.bfloat16()), "sin_BLh"),
        (lambda q, k, c, s: (q.long(), k, c, s), "query_BHLd must be float32"),
    ],
)
def test_rotary__refuses_what_does_not_fit(change, message):
    with pytest.raises(ValueError, match=message):
        rotary(*change(*make_inputs()))


@pytest.mark.parametrize("place", range(4))
def test_rotary__refuses_sharded_tensors_by_name(place):
    # Each of them: beside plain tensors, torch would say only that two kinds of tensor met.
    names = ("query_BHLd", "key_BHLd", "cos_BLh", "sin_BLh")
    inputs = list(make_inputs())
    inputs[place].placements = ()  # what tells a DTensor
    with pytest.raises(ValueError, match=f"{names[place]} is a sharded DTensor"):
        rotary(*inputs)


@needs_extension
@pytest.mark.parametrize("shape", [(1, 4, 4, 700, 16), (3, 2, 1, 5, 6), (2, 1, 1, 1, 130)], ids=str)
def test_cpu__bit_identical_to_the_reference(shape):
    batch, heads, key_heads, length, size = shape
    query, key, cos, sin = make_inputs(batch, heads, key_heads, length, size)
    wide = torch.stack((query, query), dim=-1)[..., 0]  # no unit stride
    for given in (query, wide, query.contiguous()):
        results = []
        for backend in ("cpu", "reference"):
            leaves = [part.detach().requires_grad_() for part in (given, key)]
            turned = rotary(*leaves, cos, sin, backend=backend)
            upstream = [part.detach().roll(1, 2) for part in (query, key)]
            results.append((*turned, *torch.autograd.grad(turned, leaves, upstream)))
        for found, expected in zip(*results, strict=True):
            testing.assert_bitwise_equal(found, expected)


def test_rotary__refuses_backends_that_cannot_run():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"computes float32, not torch\.bfloat16"):
        rotary(*make_inputs(dtype=torch.bfloat16), backend="cpu")
    with pytest.raises(ValueError, match="needs tensors on a CUDA device"):
        rotary(*inputs, backend="triton")


def test_reference__angles_of_equal_halves_equal_the_usual_spelling():
    query, _, cos, sin = make_inputs()
    cos_d, sin_d = (torch.cat((part, part), dim=-1)[:, None] for part in (cos, sin))
    half = torch.cat((-query[..., 4:], query[..., :4]), dim=-1)
    testing.assert_bitwise_equal(reference.rotary(query, cos, sin), query * cos_d + half * sin_d)
