"""The soft-cap of the C++ backend: two formulas, below and above |u| = 3/4 softcap, chosen lane by lane."""

import pytest
import torch
from backends import every_route, needs_extension

from vrpo_kernels import linear_cross_entropy, testing
from vrpo_kernels.linear_cross_entropy import cpu

pytestmark = needs_extension
SOFTCAP, BORDER = 32.0, 24.0


def tiles(hidden, weight, targets, gemm, **form):
    """(nll, statistics, kept, metrics): kept (V, N) holds exp(logit - shift) times the derivative."""
    nll, statistics, _, kept, _, metrics = cpu.forward(
        hidden, weight, targets, softcap=SOFTCAP, gemm=gemm, want_dhidden=False, keep_tiles=True,
        want_metrics=True, **{"bias": None, "scale": 1.0, **form},
    )  # fmt: skip
    return nll, statistics, kept[:, : len(hidden)], metrics


@every_route
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_soft_cap__both_formulas_agree_at_their_border(scale, gemm, dtype):
    """w = 1 for all classes but the target: the shift is their logit and the kept tile the derivative.

    Rows are sorted, so that there are vectors on either side and one across. The classes beside the target's,
    whose mark asks for the formula of large logits, hold the bits of all others.
    """
    near = torch.tensor([BORDER], dtype=torch.float32)
    below, above = near.nextafter(torch.tensor(0.0)), near.nextafter(torch.tensor(99.0))
    u = torch.cat([torch.linspace(20, 28, 125), below, near, above]).sort().values
    hidden = torch.cat([u, -u]).to(dtype)[:, None] / scale
    u = hidden.double()[:, 0] * scale
    assert (u.abs() <= BORDER).sum() > 100 and (u.abs() > BORDER).sum() > 100
    weight = torch.ones(64, 1, dtype=dtype)
    weight[0] = 0
    targets = torch.zeros(len(u), dtype=torch.int64)
    _, statistics, kept, _ = tiles(hidden, weight, targets, gemm, scale=scale)
    logit, t = SOFTCAP * (u / SOFTCAP).tanh(), (-2 * u.abs() / SOFTCAP).exp()
    slope = 4 * t / (1 + t) ** 2
    u32 = testing.ROUNDOFF[torch.float32]
    assert ((statistics[1].double() - logit).abs() <= 3 * u32 * logit.abs()).all()
    # the tile's exp(logit - shift) is 1 but for the rounding of both
    allowed = 8 * u32 + 2 * u32 * logit.abs()
    if kept.dtype is torch.bfloat16:
        allowed = allowed + testing.ROUNDOFF[dtype]
    assert ((kept[1:].double() - slope).abs() <= allowed * slope).all()
    for row in kept[2:]:
        testing.assert_bitwise_equal(row, kept[1])


@every_route
def test_soft_cap__bits_of_a_row_do_not_depend_on_its_neighbours(gemm, dtype):
    """Small multiples of 1/16: every h . w is exact, wherever the row stands."""
    generator = torch.Generator().manual_seed(0)
    size, classes = 8, 700
    hidden = torch.randint(-4, 5, (96, size), generator=generator) / 4
    weight = (torch.randint(-8, 9, (classes, size), generator=generator) / 4).to(dtype)
    hidden[64:] *= 8
    hidden = hidden.to(dtype)
    targets = torch.randint(classes, (96,), generator=generator)
    u = (hidden.double() @ weight.double().T).abs()
    assert u[:64].max() < BORDER and (u[64:] > BORDER).float().mean() > 0.01
    alone = tiles(hidden, weight, targets, gemm)

    # Each row beside one with logits on both sides of the border, in another order, targets elsewhere.
    others = (torch.randint(-64, 65, (96, size), generator=generator) / 4).to(dtype)
    order = torch.randperm(96, generator=generator)
    mixed = torch.stack([others, hidden[order]], dim=1).flatten(0, 1)
    mixed_targets = torch.stack([targets.flip(0), targets[order]], dim=1).flatten()
    together = tiles(mixed, weight, mixed_targets, gemm)
    for found, wanted in zip(together, alone, strict=True):
        testing.assert_bitwise_equal(found[..., 1::2].contiguous(), wanted[..., order].contiguous())
    with torch.no_grad():
        nll = linear_cross_entropy(mixed, weight, mixed_targets, softcap=SOFTCAP, backend="cpu", gemm=gemm)
    testing.assert_bitwise_equal(nll, together[0])
