"""Derivatives and torch.func transforms of the ops that are linear in their input: all of them, and right."""

import pytest
import torch

from vrpo_kernels import gather_rows, rotary, segment_sum, token_weight_sums

# torch's forward-mode AD scripts its decompositions on first use, and scripting is deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
N = 5
ROWS = torch.tensor([4, 1])


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


OFFSETS = torch.tensor([0, 2, 2, 5])
ANGLES = torch.linspace(0, 3, 6).view(1, 3, 2)


def _gather(x):
    return gather_rows(x, ROWS)


def _sums(x):
    return segment_sum(x, OFFSETS)


def _turn(x):
    return rotary(x, 2 * x, ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype))[0]


LINEAR = {  # op(input) -> output, the same in plain PyTorch, and the input's shape
    "gather_rows": (_gather, lambda x: x[ROWS], (N, 3)),
    "segment_sum": (_sums, lambda x: torch.stack([x[a:b].sum() for a, b in ((0, 2), (2, 2), (2, 5))]), (5,)),
    "rotary": (_turn, lambda x: _turn_by_hand(x), (1, 2, 3, 4)),
}
linear_op = pytest.mark.parametrize("case", LINEAR.values(), ids=LINEAR)


def _turn_by_hand(x):
    cos, sin = ANGLES.cos().to(x.dtype), ANGLES.sin().to(x.dtype)
    low, high = x[..., :2], x[..., 2:]
    return torch.cat([low * cos - high * sin, high * cos + low * sin], dim=-1)


@linear_op
def test_linear__has_every_derivative(case):
    op, _, shape = case
    values = torch.randn(*shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: op(x) ** 2, values, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(lambda x: op(x) ** 2, values)


@linear_op
def test_linear__torch_func_has_the_values_of_plain_pytorch(case):
    op, plain, shape = case
    values = torch.randn(*shape)
    several = torch.stack([values, 2 * values, values.flip(0)])

    def transforms(f):
        def total(x):
            return f(x).pow(2).sum()

        return [
            torch.func.grad(total)(values),
            torch.func.jacrev(f)(values),
            torch.func.jacfwd(f)(values),
            torch.func.jvp(f, (values,), (values.cos(),))[1],
            torch.func.hessian(total)(values),
            torch.func.vmap(f)(several),
            torch.func.vmap(torch.func.grad(total))(several),
        ]

    for got, want in zip(transforms(op), transforms(plain), strict=True):
        assert_close(got, want)


@linear_op
def test_linear__compiled_torch_func_has_the_values_of_plain_pytorch(case):
    op, plain, shape = case
    values = torch.randn(*shape)

    def transforms(f, x):
        tangent = torch.func.jvp(f, (x,), (x.cos(),))[1]
        return tangent, torch.func.grad(lambda x: f(x).pow(2).sum())(x), torch.func.vmap(f)(x[None])

    compiled = torch.compile(lambda x: transforms(op, x), fullgraph=True, backend="aot_eager")
    for got, want in zip(compiled(values), transforms(plain, values), strict=True):
        assert_close(got, want)


def test_rotary__refuses_angles_that_want_a_gradient():
    x, angles = torch.randn(1, 2, 3, 4), ANGLES.clone().requires_grad_()
    with pytest.raises(ValueError, match=r"cos_BLh is a constant to rotary.*cos_BLh.detach()"):
        rotary(x, x, angles.cos(), angles.detach().sin())
    with torch.no_grad():
        rotary(x, x, angles.cos(), angles.sin())


def test_rotary__has_derivatives_in_the_angles_under_torch_func():
    x = torch.randn(1, 2, 3, 4)

    def turned(angles):
        return rotary(x, x, angles.cos(), angles.sin())[0]

    dturned = torch.func.jvp(turned, (ANGLES,), (torch.ones_like(ANGLES),))[1]
    assert_close(dturned, turned(ANGLES + torch.pi / 2))


def test_token_weight_sums__refuses_weights_that_want_a_derivative():
    weights = torch.ones(3)

    def total(w):
        rows = (torch.tensor([0, 1, 1]), torch.tensor([0, 2, 3]), torch.tensor([2]))
        return token_weight_sums(w, *rows, num_samples=2, num_tokens=2)[0].sum()

    assert total(weights) == 3
    for derivative in (
        lambda: total(weights.clone().requires_grad_()),
        lambda: torch.func.grad(total)(weights),
        lambda: torch.func.jvp(total, (weights,), (weights,)),
    ):
        with pytest.raises(ValueError, match="weight_N is a constant to token_weight_sums"):
            derivative()
