"""elbo_from_logits and elbo_from_hidden against literal loops in fp64 and a LLaDA-style loss."""

import pytest
import torch
import torch.nn.functional as F
from backends import both_backends

from vrpo_kernels import elbo_from_hidden, elbo_from_logits
from vrpo_kernels.testing import assert_bitwise_equal, poisoned_empty

B, L, V, D = 4, 9, 37, 16


class Case:
    """A padded batch; sequence 1 has nothing masked, and tokens contain the id a model masks with (0)."""

    def __init__(self, dtype=torch.float32):
        generator = torch.Generator().manual_seed(11)
        self.hidden = torch.randn(B, L, D, generator=generator, dtype=torch.float64).to(dtype)
        self.weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
        self.logits = (self.hidden.double() @ self.weight.double().T).to(dtype)
        self.tokens = torch.randint(0, V, (B, L), generator=generator)
        self.tokens[:, ::3] = 0
        self.masked = torch.rand(B, L, generator=generator) < 0.5
        self.masked[1] = False
        self.per_sequence = torch.rand(B, generator=generator) * 9 + 1
        self.per_token = torch.rand(B, L, generator=generator) * 9 + 1

    def arguments(self, *weights):
        return self.tokens, self.masked, *weights


def literal(logits, tokens, masked, weight):
    """The definition: one term per masked token, weight (B, L)."""
    log_p = F.log_softmax(logits.double(), dim=-1)
    totals = []
    for b in range(tokens.shape[0]):
        terms = [weight[b, i] * log_p[b, i, tokens[b, i]] for i in range(tokens.shape[1]) if masked[b, i]]
        totals.append(torch.stack(terms).sum() if terms else 0 * log_p[b].sum())
    return torch.stack(totals)


@both_backends
@pytest.mark.parametrize("which", ["per-sequence", "per-token"])
def test_elbo__equals_the_definition(backend, which):
    case = Case()
    weight = case.per_sequence if which == "per-sequence" else case.per_token
    weight_BL = weight[:, None].expand(B, L) if which == "per-sequence" else weight
    want = literal(case.logits, *case.arguments(weight_BL))
    with poisoned_empty():
        from_logits = elbo_from_logits(case.logits, *case.arguments(weight), backend=backend)
        from_hidden = elbo_from_hidden(case.hidden, case.weight, *case.arguments(weight), backend=backend)
    assert from_logits.dtype is torch.float32 and from_hidden.dtype is torch.float32
    torch.testing.assert_close(from_logits.double(), want, rtol=2e-6, atol=0)
    torch.testing.assert_close(from_hidden.double(), want, rtol=5e-6, atol=0)
    assert from_logits[1] == 0 and from_hidden[1] == 0


@both_backends
def test_elbo__gradients_equal_those_of_the_definition(backend):
    """A log-sigmoid of a difference of ELBOs: signed, non-uniform upstream gradients, as in VRPO."""
    case = Case()
    case.masked[1, 2] = True

    def objective(elbo):
        return F.softplus(-0.2 * (elbo[0] - elbo[1])) + F.softplus(0.05 * (elbo[2] - elbo[3]))

    weight_BL = case.per_sequence[:, None].expand(B, L)
    leaves = [t.double().requires_grad_() for t in (case.hidden, case.weight)]
    truth = literal(leaves[0] @ leaves[1].T, *case.arguments(weight_BL))
    want = torch.autograd.grad(objective(truth), leaves)

    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    elbo = elbo_from_hidden(hidden, weight, *case.arguments(case.per_sequence), backend=backend)
    got = torch.autograd.grad(objective(elbo), (hidden, weight))
    for candidate, expected in zip(got, want, strict=True):
        torch.testing.assert_close(candidate.double(), expected, rtol=1e-4, atol=1e-6 * expected.abs().max())

    logits = case.hidden.double() @ case.weight.double().T
    logits = logits.float().requires_grad_()
    for in_place in (False, True):
        elbo = elbo_from_logits(
            logits * 1, *case.arguments(case.per_sequence), in_place=in_place, backend=backend
        )
        (got,) = torch.autograd.grad(objective(elbo), logits)
        (want_logits,) = torch.autograd.grad(objective(literal(logits, *case.arguments(weight_BL))), logits)
        torch.testing.assert_close(got, want_logits, rtol=1e-4, atol=1e-6 * want_logits.abs().max().item())


@both_backends
def test_elbo_from_logits__drops_into_a_llada_style_loss(backend):
    """LLaDA's pre-training loss, as its guidelines print it, and the line that replaces it."""
    case = Case()
    p_mask = 1 / case.per_token
    token_loss = F.cross_entropy(case.logits[case.masked], case.tokens[case.masked], reduction="none")
    before = (token_loss / p_mask[case.masked]).sum() / (B * L)
    after = -elbo_from_logits(case.logits, *case.arguments(1 / p_mask), backend=backend).sum() / (B * L)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


@both_backends
def test_elbo__packed_equals_padded(backend):
    """Prompts and paddings cut off: sequences of different lengths, one of them empty."""
    case = Case()
    lengths = [9, 5, 0, 3]
    case.masked[2] = False
    valid = torch.arange(L) < torch.tensor(lengths)[:, None]
    case.masked &= valid
    cu_seqlens = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for weight, packed in (
        (case.per_sequence, case.per_sequence),
        (case.per_token, case.per_token[valid]),
    ):
        want = elbo_from_logits(case.logits, *case.arguments(weight), backend=backend)
        got = elbo_from_logits(
            case.logits[valid],
            case.tokens[valid],
            case.masked[valid],
            packed,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        assert_bitwise_equal(got, want)
        got = elbo_from_hidden(
            case.hidden[valid],
            case.weight,
            case.tokens[valid],
            case.masked[valid],
            packed,
            cu_seqlens=cu_seqlens,
            backend=backend,
        )
        torch.testing.assert_close(got, want, rtol=5e-6, atol=0)


@both_backends
def test_elbo__only_the_boolean_tensor_says_what_is_masked(backend):
    """Token ids at unmasked positions do not matter, equal to a mask id or not."""
    case = Case()
    other = torch.where(case.masked, case.tokens, torch.full_like(case.tokens, 0))
    want = elbo_from_logits(case.logits, *case.arguments(case.per_sequence), backend=backend)
    got = elbo_from_logits(case.logits, other, case.masked, case.per_sequence, backend=backend)
    assert_bitwise_equal(got, want)


@both_backends
def test_elbo__a_known_number_of_rows_changes_nothing(backend):
    case = Case()
    known = int(case.masked.sum())
    for op, data in ((elbo_from_logits, (case.logits,)), (elbo_from_hidden, (case.hidden, case.weight))):
        want = op(*data, *case.arguments(case.per_sequence), backend=backend)
        got = op(*data, *case.arguments(case.per_sequence), num_masked=known, backend=backend)
        assert_bitwise_equal(got, want)


@pytest.mark.parametrize("wrong", [-1, 1], ids=["too-few", "too-many"])
def test_elbo__a_wrong_number_of_rows_is_refused_on_the_cpu(wrong):
    case = Case()
    with pytest.raises(ValueError, match="num_masked"):
        elbo_from_logits(
            case.logits, *case.arguments(case.per_sequence), num_masked=int(case.masked.sum()) + wrong
        )


@both_backends
def test_elbo__nothing_masked_gives_zero_with_zero_gradients(backend):
    case = Case()
    case.masked[:] = False
    hidden, weight = case.hidden.clone().requires_grad_(), case.weight.clone().requires_grad_()
    elbo = elbo_from_hidden(hidden, weight, *case.arguments(case.per_sequence), backend=backend)
    elbo.sum().backward()
    assert (elbo == 0).all() and (hidden.grad == 0).all() and (weight.grad == 0).all()


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_elbo_from_logits__sums_16_bit_logits_in_fp32(backend, dtype):
    case = Case(dtype)
    want = literal(case.logits, *case.arguments(case.per_token))
    got = elbo_from_logits(case.logits, *case.arguments(case.per_token), backend=backend)
    torch.testing.assert_close(got.double(), want, rtol=2e-6, atol=0)


def test_elbo__float64_stays_float64():
    case = Case(torch.float64)
    got = elbo_from_logits(case.logits, *case.arguments(case.per_token))
    assert got.dtype is torch.float64
    torch.testing.assert_close(got, literal(case.logits, *case.arguments(case.per_token)))


@both_backends
def test_elbo__compiles_without_a_graph_break(backend):
    case = Case()
    known = int(case.masked.sum())

    def loss(logits, tokens, masked, weight):
        return elbo_from_logits(2 * logits, tokens, masked, weight, num_masked=known, backend=backend).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        logits = case.logits.clone().requires_grad_()
        value = function(logits, *case.arguments(case.per_sequence))
        value.backward()
        results.append((value.detach(), logits.grad))
    assert_bitwise_equal(results[1][0], results[0][0])
    assert_bitwise_equal(results[1][1], results[0][1])


@both_backends
def test_elbo_from_hidden__compiles_without_a_graph_break(backend):
    case = Case()
    known = int(case.masked.sum())

    def loss(hidden, weight, tokens, masked, row_weights):
        arguments = (hidden, weight, tokens, masked, row_weights)
        return elbo_from_hidden(*arguments, num_masked=known, backend=backend).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        hidden = case.hidden.clone().requires_grad_()
        value = function(hidden, case.weight, *case.arguments(case.per_sequence))
        value.backward()
        results.append((value.detach(), hidden.grad))
    assert_bitwise_equal(results[1][0], results[0][0])
    assert_bitwise_equal(results[1][1], results[0][1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"masked": torch.ones(B, L).long()}, "masked must be a boolean tensor"),
        ({"masked": torch.ones(B, L - 1).bool()}, "masked"),
        ({"tokens": torch.zeros(B, L)}, "tokens must be int64"),
        ({"row_weights": torch.ones(B + 1)}, "one weight per sequence"),
        ({"row_weights": torch.ones(B).long()}, "row_weights must be floating"),
        ({"cu_seqlens": torch.tensor([0, L])}, "packed"),
        (
            {"logits": torch.zeros(L, V), "tokens": torch.zeros(L).long(), "masked": torch.ones(L).bool()},
            "without cu_seqlens",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_elbo__says_what_is_wrong(change, message):
    case = Case()
    arguments = {
        "logits": case.logits,
        "tokens": case.tokens,
        "masked": case.masked,
        "row_weights": case.per_sequence,
    }
    with pytest.raises(ValueError, match=message):
        elbo_from_logits(**(arguments | change))
