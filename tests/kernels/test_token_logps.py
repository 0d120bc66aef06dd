"""token_logps against a full log-softmax in fp64: values, gradients, determinism, torch.compile."""

import pytest
import torch
import torch.nn.functional as F
from backends import both_backends

from vrpo_kernels import elbo_from_hidden, testing, token_logps
from vrpo_kernels.testing import assert_bitwise_equal, poisoned_empty

B, L, V, D = 3, 8, 41, 16


class Case:
    """A padded batch; row 1 wants nothing."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(5)
        self.hidden = torch.randn(B, L, D, generator=generator, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
        self.tokens = torch.randint(0, V, (B, L), generator=generator)
        self.wanted = torch.rand(B, L, generator=generator) < 0.6
        self.wanted[1] = False
        self.advantage = torch.randn(B, L, generator=generator, dtype=torch.float64)

    def leaves(self):
        return self.hidden.clone().requires_grad_(), self.weight.clone().requires_grad_()


def dense(hidden, weight, tokens, wanted):
    """The formula with all logits."""
    log_p = F.log_softmax(hidden @ weight.T, dim=-1)
    picked = log_p.gather(-1, tokens[..., None])[..., 0]
    return torch.where(wanted, picked, torch.zeros_like(picked))


def clipped(logp, advantage):
    """A PPO-like objective: ratios to other log-probabilities, clipped, with signed advantages."""
    ratio = (logp - 0.9 * logp.detach()).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(0.7, 1.3) * advantage).sum()


@both_backends
def test_token_logps__equals_a_full_log_softmax(backend):
    case = Case()
    with poisoned_empty():
        got = token_logps(case.hidden, case.weight, case.tokens, case.wanted, backend=backend)
    want = dense(case.hidden.double(), case.weight.double(), case.tokens, case.wanted)
    assert got.dtype is torch.float32 and got.shape == (B, L)
    assert (got[~case.wanted] == 0).all()
    torch.testing.assert_close(got.double(), want, rtol=5e-6, atol=0)


@both_backends
def test_token_logps__gradients_of_a_clipped_objective_equal_those_of_all_logits(backend):
    case = Case()
    leaves = [t.double().requires_grad_() for t in (case.hidden, case.weight)]
    truth = clipped(dense(*leaves, case.tokens, case.wanted), case.advantage)
    want = torch.autograd.grad(truth, leaves)
    hidden, weight = case.leaves()
    logp = token_logps(hidden, weight, case.tokens, case.wanted, backend=backend)
    got = torch.autograd.grad(clipped(logp, case.advantage.float()), (hidden, weight))
    for candidate, expected in zip(got, want, strict=True):
        torch.testing.assert_close(candidate.double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max())
    assert (got[0][~case.wanted] == 0).all()


def test_token_logps__float64_is_the_formula():
    case = Case(torch.float64)
    got = token_logps(case.hidden, case.weight, case.tokens, case.wanted)
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, dense(case.hidden, case.weight, case.tokens, case.wanted))
    assert torch.autograd.gradcheck(lambda h, w: token_logps(h, w, case.tokens, case.wanted), case.leaves())


@both_backends
def test_token_logps__weighted_sums_are_the_elbo(backend):
    case = Case()
    weights = case.advantage.float()
    logp = token_logps(case.hidden, case.weight, case.tokens, case.wanted, backend=backend)
    elbo = elbo_from_hidden(case.hidden, case.weight, case.tokens, case.wanted, weights, backend=backend)
    torch.testing.assert_close((weights * logp).double().sum(1), elbo.double(), rtol=1e-6, atol=1e-6)


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_token_logps__is_fp32_for_16_bit_inputs(backend, dtype):
    case = Case(dtype)
    got = token_logps(case.hidden, case.weight, case.tokens, case.wanted, backend=backend)
    truth = dense(case.hidden.double(), case.weight.double(), case.tokens, case.wanted)
    base = dense(case.hidden.float(), case.weight.float(), case.tokens, case.wanted)
    assert testing.fp32_error_ratio(got, truth, base) <= 1


@both_backends
def test_token_logps__packed_equals_padded(backend):
    case = Case()
    want = token_logps(case.hidden, case.weight, case.tokens, case.wanted, backend=backend)
    packed = [t.flatten(0, 1) for t in (case.hidden, case.tokens, case.wanted)]
    for cu_seqlens in (None, torch.tensor([0, 5, 5, B * L], dtype=torch.int32)):
        hidden, tokens, wanted = packed
        got = token_logps(hidden, case.weight, tokens, wanted, cu_seqlens=cu_seqlens, backend=backend)
        assert_bitwise_equal(got, want.flatten())


@both_backends
def test_token_logps__nothing_wanted_gives_zeros_with_zero_gradients(backend):
    case = Case()
    hidden, weight = case.leaves()
    logp = token_logps(hidden, weight, case.tokens, torch.zeros_like(case.wanted), backend=backend)
    logp.sum().backward()
    assert (logp == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.parametrize("shape", [(0, L), (B, 0)], ids=["B0", "L0"])
def test_token_logps__an_empty_batch_stays_empty(shape):
    none = torch.zeros(shape, dtype=torch.int64)
    for shift in (False, True):
        logp = token_logps(torch.zeros(*shape, D), torch.ones(V, D), none, none.bool(), shift=shift)
        assert logp.shape == shape


@both_backends
def test_token_logps__compiles_without_a_graph_break(backend):
    case = Case()
    known = int(case.wanted.sum())

    def loss(hidden, weight, tokens, wanted):
        logp = token_logps(hidden, weight, tokens, wanted, num_wanted=known, backend=backend)
        return clipped(logp, case.advantage.float())

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = case.leaves()
        value = function(*leaves, case.tokens, case.wanted)
        results.append((value.detach(), *torch.autograd.grad(value, leaves)))
    for got, want in zip(*results, strict=True):
        assert_bitwise_equal(got, want)


@both_backends
def test_token_logps__twice_gives_the_same_bits(backend):
    case = Case()
    results = []
    for _ in range(2):
        leaves = case.leaves()
        logp = token_logps(*leaves, case.tokens, case.wanted, backend=backend)
        results.append((logp.detach(), *torch.autograd.grad(clipped(logp, case.advantage.float()), leaves)))
    for got, want in zip(*results, strict=True):
        assert_bitwise_equal(got, want)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"wanted": torch.ones(B, L).long()}, "wanted must be a boolean tensor"),
        ({"wanted": torch.ones(B, L - 1).bool()}, "wanted"),
        ({"tokens": torch.zeros(B, L)}, "tokens must be int64"),
        ({"weight": torch.zeros(V, D + 1)}, "size D"),
        ({"num_wanted": 1}, "num_wanted"),
        ({"num_wanted": 5.0}, "num_wanted must be an integer, got 5.0"),
        ({"cu_seqlens": torch.tensor([0, L])}, "packed"),
        ({"tokens": torch.full((B, L), V)}, "targets"),
    ],
    ids=["ids", "shape", "float-tokens", "weight", "count", "float", "padded-with-cu", "token-outside"],
)
def test_token_logps__says_what_is_wrong(change, message):
    case = Case()
    arguments = {"hidden": case.hidden, "weight": case.weight, "tokens": case.tokens, "wanted": case.wanted}
    with pytest.raises(ValueError, match=message):
        token_logps(**(arguments | change))


HEADS = {
    "bias": {"bias": 0.7},
    "softcap": {"softcap": 2.0},
    "temperature": {"scale": 1 / 0.6},
    "all": {"bias": -0.4, "softcap": 3.0, "scale": 0.8},
}


def head_of(spec, dtype):
    """The options of a spec, with a (V,) bias of the given size."""
    options = dict(spec)
    if "bias" in spec:
        generator = torch.Generator().manual_seed(2)
        options["bias"] = (spec["bias"] * torch.randn(V, generator=generator, dtype=torch.float64)).to(dtype)
    return options


def all_logits(hidden, weight, bias=None, softcap=None, scale=1.0):
    logits = hidden @ weight.T
    logits = scale * (logits if bias is None else logits + bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("spec", HEADS.values(), ids=HEADS.keys())
def test_token_logps_and_elbo__take_every_head(spec, shift):
    """Values and gradients of hidden, weight and bias against all logits, in fp64."""
    case = Case(torch.float64)
    case.wanted[:, 0] = False
    options = head_of(spec, torch.float64)
    leaves = list(case.leaves())
    if "bias" in options:
        options["bias"].requires_grad_()
        leaves.append(options["bias"])
    logits = all_logits(*leaves[:2], **options)
    logits = logits.roll(1, dims=1) if shift else logits
    picked = F.log_softmax(logits, dim=-1).gather(-1, case.tokens[..., None])[..., 0]
    want = torch.where(case.wanted, picked, 0)
    logp = token_logps(*leaves[:2], case.tokens, case.wanted, shift=shift, **options)
    torch.testing.assert_close(logp, want)
    elbo = elbo_from_hidden(*leaves[:2], case.tokens, case.wanted, case.advantage, shift=shift, **options)
    torch.testing.assert_close(elbo, (case.advantage * want).sum(1))
    wanted = torch.autograd.grad(clipped(want, case.advantage), leaves, retain_graph=True)
    got = torch.autograd.grad(clipped(logp, case.advantage), leaves)
    torch.testing.assert_close(got, wanted)
    got = torch.autograd.grad(elbo.square().sum(), leaves)
    torch.testing.assert_close(
        got, torch.autograd.grad((case.advantage * want).sum(1).square().sum(), leaves)
    )


@both_backends
@pytest.mark.parametrize("spec", HEADS.values(), ids=HEADS.keys())
def test_token_logps__every_head_in_fp32(spec, backend):
    case = Case()
    options, truth_options = head_of(spec, torch.float32), head_of(spec, torch.float64)
    leaves, truth_leaves = list(case.leaves()), [leaf.detach().double() for leaf in case.leaves()]
    if "bias" in spec:
        leaves.append(options["bias"].requires_grad_())
        truth_leaves.append(truth_options["bias"])
    truth_leaves = [leaf.requires_grad_() for leaf in truth_leaves]
    if "bias" in spec:
        truth_options["bias"] = truth_leaves[2]
    log_p = F.log_softmax(all_logits(*truth_leaves[:2], **truth_options), dim=-1)
    want = torch.where(case.wanted, log_p.gather(-1, case.tokens[..., None])[..., 0], 0)
    got = token_logps(*leaves[:2], case.tokens, case.wanted, backend=backend, **options)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(clipped(want, case.advantage), truth_leaves)
    found = torch.autograd.grad(clipped(got, case.advantage.float()), leaves)
    for candidate, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(candidate.double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max())


@both_backends
def test_token_logps__metrics_stand_where_the_log_probabilities_do(backend):
    case = Case()
    options = {"softcap": 4.0, "scale": 1.5, "backend": backend}
    case.tokens[0] = (case.hidden[0] @ case.weight.T).argmax(-1)  # hits; the other sequences have misses
    leaves = case.leaves()
    logp, metrics = token_logps(*leaves, case.tokens, case.wanted, return_metrics=True, **options)
    assert_bitwise_equal(logp, token_logps(*leaves, case.tokens, case.wanted, **options))
    logits = all_logits(case.hidden.double(), case.weight.double(), softcap=4.0, scale=1.5)
    log_p = F.log_softmax(logits, dim=-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    top1 = logits.argmax(-1) == case.tokens
    for got, want in (
        (metrics.entropy, entropy),
        (metrics.log_sum_exp, logits.logsumexp(-1)),
        (metrics.top1, top1),
    ):
        assert got.shape == (B, L) and not got.requires_grad
        want = torch.where(case.wanted, want, torch.zeros_like(want))
        torch.testing.assert_close(got, want.to(got.dtype), rtol=1e-5, atol=1e-5)
    assert metrics.top1.dtype is torch.bool and logp.requires_grad
    assert metrics.top1.any() and not metrics.top1[case.wanted].all()


@both_backends
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_token_logps_and_elbo__work_under_torch_func_grad(backend, shift):
    case = Case()
    case.wanted[:, 0] = False
    options = {"shift": shift, "backend": backend}

    def logps(hidden, weight):
        logp = token_logps(hidden, weight, case.tokens, case.wanted, **options)
        return clipped(logp, case.advantage.float())

    def elbos(hidden, weight):
        weights = case.advantage.float()
        return elbo_from_hidden(hidden, weight, case.tokens, case.wanted, weights, **options).square().sum()

    for function in (logps, elbos):
        want = torch.autograd.grad(function(*(leaves := case.leaves())), leaves)
        got = torch.func.grad(function, argnums=(0, 1))(case.hidden, case.weight)
        for candidate, expected in zip(got, want, strict=True):
            torch.testing.assert_close(candidate, expected, rtol=1e-5, atol=1e-6)
