"""token_logps, shift and boundaries on a CUDA device: values, no waiting, NaN where nobody looks."""

import pytest
import torch
from gpu_support import MARKS

from vrpo_kernels import elbo_from_hidden, elbo_from_logits, segment_sum, set_debug, testing, token_logps

pytestmark = MARKS
B, L, V, D = 3, 200, 5000, 128


class Case:
    """One batch on the device, padded or as one pack of five sequences (the second is empty)."""

    def __init__(self, dtype=torch.bfloat16):
        generator = torch.Generator().manual_seed(9)
        self.hidden = torch.randn(B * L, D, generator=generator).to("cuda", dtype)
        self.weight = torch.randn(V, D, generator=generator).mul_(D**-0.5).to("cuda", dtype)
        self.tokens = torch.randint(V, (B * L,), generator=generator).cuda()
        self.masked = (torch.rand(B * L, generator=generator) < 0.5).cuda()
        self.cu_seqlens = torch.tensor([0, 7, 7, 200, 400, B * L], dtype=torch.int32).cuda()
        self.masked[self.cu_seqlens[:-1].long()] = False  # nothing predicts a first token under shift
        self.weights = torch.rand(B * L, generator=generator).cuda()

    def call(self, op, hidden=None, **options):
        hidden = self.hidden if hidden is None else hidden
        options = {"cu_seqlens": self.cu_seqlens} | options
        if op is elbo_from_logits:
            return op(hidden @ self.weight.T, self.tokens, self.masked, self.weights, **options)
        if op is elbo_from_hidden:
            return op(hidden, self.weight, self.tokens, self.masked, self.weights, **options)
        return op(hidden, self.weight, self.tokens, self.masked, **options)


OPS = pytest.mark.parametrize(
    "op", [elbo_from_hidden, elbo_from_logits, token_logps], ids=lambda op: op.__name__
)


@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_token_logps__agrees_with_all_logits(shift):
    case = Case()
    logp = case.call(token_logps, shift=shift)
    exact = torch.log_softmax(case.hidden.double() @ case.weight.double().T, dim=-1)
    exact = exact.roll(1, dims=0) if shift else exact
    want = exact.gather(-1, case.tokens[:, None])[:, 0]
    base = torch.log_softmax(case.hidden.float() @ case.weight.float().T, dim=-1)
    base = (base.roll(1, dims=0) if shift else base).gather(-1, case.tokens[:, None])[:, 0]
    kept = case.masked
    assert testing.fp32_error_ratio(logp[kept], want[kept], base[kept]) <= 1
    assert (logp[~kept] == 0).all()


@OPS
def test_shift__moves_the_rows_and_nothing_else(op):
    case = Case()
    by_hand = torch.cat([case.hidden[:1], case.hidden[:-1]])
    testing.assert_bitwise_equal(case.call(op, shift=True), case.call(op, by_hand))


@pytest.mark.parametrize("op", [elbo_from_hidden, token_logps], ids=lambda op: op.__name__)
def test_layout__never_waits_for_the_device_if_the_count_is_known(op):
    case = Case()
    count = int(case.masked.sum())
    name = "num_wanted" if op is token_logps else "num_masked"
    hidden = case.hidden.requires_grad_()

    def run():
        value = case.call(op, shift=True, **{name: count})
        return value.detach(), *torch.autograd.grad(value.square().sum(), hidden)

    expected = run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for value, wanted in zip(found, expected, strict=True):
        testing.assert_bitwise_equal(value, wanted)


@OPS
@pytest.mark.parametrize(
    "bad", [[1, 400, B * L], [0, 400, 200, B * L], [0, 2**31 - 1, B * L], [0, B * L - 1]], ids=str
)
def test_cu_seqlens__that_are_no_boundaries_make_nan(op, bad):
    case = Case()
    hidden = case.hidden.requires_grad_()
    bounds = torch.tensor(bad, dtype=torch.int32).cuda()
    value = case.call(op, cu_seqlens=bounds, shift=True)
    assert value.isnan().all()
    assert torch.autograd.grad(value.sum(), hidden)[0].isnan().any()
    with set_debug(True), pytest.raises(ValueError, match="cu_seqlens must start at 0"):
        case.call(op, cu_seqlens=bounds)


@OPS
def test_shift__a_masked_first_token_makes_nan_of_its_own(op):
    case = Case()
    want = case.call(op, shift=True)
    for place, sequence in ((0, 0), (7, 2), (400, 4)):
        case = Case()
        case.masked[place] = True
        got = case.call(op, shift=True)
        bad = place if op is token_logps else sequence
        others = torch.arange(len(want), device="cuda") != bad
        assert got[bad].isnan()
        testing.assert_bitwise_equal(got[others], want[others])
        with set_debug(True), pytest.raises(ValueError, match="first token"):
            case.call(op, shift=True)


def test_segment_sum__offsets_that_are_none_make_nan():
    value = torch.ones(100, device="cuda", requires_grad=True)
    for bad in ([0, 60, 50, 100], [0, 99], [1, 100], [0, 2**40, 100], [-5, 100]):
        total = segment_sum(value, torch.tensor(bad).cuda())
        assert total.isnan().all()
        assert torch.autograd.grad(total.sum(), value)[0].isnan().all()
