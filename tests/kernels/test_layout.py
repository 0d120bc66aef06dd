"""shift=True against hidden states that are shifted by hand, and cu_seqlens that are no boundaries.

Values are looked at on the CPU. What happens where nobody looks (CUDA, torch.compile) is tried here by
saying so to the ops, and once inside a compiled function.
"""

import functools
import itertools

import pytest
import torch
from backends import both_backends

from vrpo_kernels import checks, elbo_from_hidden, elbo_from_logits, segment_sum, token_logps
from vrpo_kernels.testing import assert_bitwise_equal

B, L, V, D = 3, 7, 29, 8
CU = torch.tensor([0, 7, 7, 12, 21], dtype=torch.int32)  # the second of four sequences is empty


class Case:
    """Padded, and the same numbers as a pack of four sequences whose first tokens are not masked."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        self.hidden = torch.randn(B, L, D, generator=generator)
        self.weight = torch.randn(V, D, generator=generator)
        self.tokens = torch.randint(0, V, (B, L), generator=generator)
        self.masked = torch.rand(B, L, generator=generator) < 0.6
        self.masked[:, 0] = False
        self.masked[1, 5] = False  # the first of the last packed sequence, 7 + 5 = 12
        self.masked[:, 1] = True  # predicted by a first position
        self.weights = torch.rand(B, L, generator=generator) * 4 - 1

    def packed(self):
        return {
            "hidden": self.hidden.flatten(0, 1),
            "tokens": self.tokens.flatten(),
            "masked": self.masked.flatten(),
            "weights": self.weights.flatten(),
            "cu_seqlens": CU,
        }

    def padded(self):
        names = ("hidden", "tokens", "masked", "weights")
        return {name: getattr(self, name) for name in names} | {"cu_seqlens": None}


def from_logits(case, data, **options):
    logits = data["hidden"] @ case.weight.T
    return elbo_from_logits(
        logits, data["tokens"], data["masked"], data["weights"], cu_seqlens=data["cu_seqlens"], **options
    )


def from_hidden(case, data, **options):
    return elbo_from_hidden(
        data["hidden"],
        case.weight,
        data["tokens"],
        data["masked"],
        data["weights"],
        cu_seqlens=data["cu_seqlens"],
        **options,
    )


def logps(case, data, **options):
    if "num_masked" in options:
        options["num_wanted"] = options.pop("num_masked")
    tokens, wanted = data["tokens"], data["masked"]
    return token_logps(data["hidden"], case.weight, tokens, wanted, cu_seqlens=data["cu_seqlens"], **options)


OPS = pytest.mark.parametrize("op", [from_logits, from_hidden, logps], ids=lambda op: op.__name__)
LAYOUTS = pytest.mark.parametrize("layout", ["padded", "packed"])


@pytest.fixture
def nobody_looks(monkeypatch):
    monkeypatch.setattr(checks, "values_are_checked", lambda device: False)


def by_hand(hidden):
    """Position i holds what position i - 1 held; the first holds itself, which nothing reads."""
    return torch.cat([hidden[..., :1, :], hidden[..., :-1, :]], dim=-2)


# shift


@both_backends
@OPS
@LAYOUTS
def test_shift__equals_shifted_hidden_states(op, layout, backend):
    case = Case()
    data = getattr(case, layout)()
    want = op(case, data | {"hidden": by_hand(data["hidden"])}, backend=backend)
    got = op(case, data, shift=True, backend=backend)
    assert_bitwise_equal(got, want)
    assert not torch.equal(got, op(case, data, backend=backend))
    known = int(case.masked.sum())
    assert_bitwise_equal(op(case, data, shift=True, num_masked=known, backend=backend), want)


@both_backends
@OPS
@LAYOUTS
def test_shift__gradients_equal_those_of_shifted_hidden_states(op, layout, backend):
    case = Case()
    gradients = []
    for move, shift in ((by_hand, False), (lambda hidden: hidden, True)):
        data = getattr(case, layout)()
        leaf = data["hidden"].clone().requires_grad_()
        case.weight = case.weight.detach().requires_grad_()
        value = op(case, data | {"hidden": move(leaf)}, shift=shift, backend=backend)
        upstream = torch.arange(1.0, 1 + value.numel()).view(value.shape)
        gradients.append(torch.autograd.grad(value, (leaf, case.weight), upstream))
    for got, want in zip(*reversed(gradients), strict=True):
        assert_bitwise_equal(got, want)


def test_shift__in_place_writes_the_gradient_one_row_earlier():
    case = Case()
    data = case.padded()
    gradients = []
    for in_place in (False, True):
        logits = (data["hidden"] @ case.weight.T).requires_grad_()
        elbo = elbo_from_logits(
            logits * 1, data["tokens"], data["masked"], data["weights"], shift=True, in_place=in_place
        )
        gradients.append(torch.autograd.grad(elbo.sum(), logits)[0])
    assert_bitwise_equal(*gradients)
    assert (gradients[0][:, -1] == 0).all()  # the last position predicts nothing


@OPS
@pytest.mark.parametrize(("layout", "place"), [("padded", 7), ("packed", 7), ("packed", 12), ("packed", 0)])
def test_shift__a_masked_first_token_is_refused(op, layout, place):
    case = Case()
    case.masked.view(-1)[place] = True
    sequence = {("padded", 7): 1, ("packed", 7): 2, ("packed", 12): 3, ("packed", 0): 0}[layout, place]
    with pytest.raises(ValueError, match=f"first token.*sequence {sequence}"):
        op(case, getattr(case, layout)(), shift=True)
    op(case, getattr(case, layout)())  # without shift it is a token like any other


@OPS
@pytest.mark.parametrize("place", [0, 7, 12])
def test_shift__a_masked_first_token_is_nan_where_nobody_looks(op, place, nobody_looks):
    """Exactly that element or sequence; the others keep their bits."""
    case = Case()
    want = op(case, case.packed(), shift=True)
    case.masked.view(-1)[place] = True
    data = case.packed()
    data["hidden"].requires_grad_()
    got = op(case, data, shift=True)
    bad = place if op is logps else {0: 0, 7: 2, 12: 3}[place]
    expected = want.clone()
    expected[bad] = torch.nan
    assert got[bad].isnan()
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.autograd.grad(got[bad], data["hidden"])[0].isnan().any()


def test_shift__metrics_of_a_masked_first_token_are_nan_where_nobody_looks(nobody_looks):
    case = Case()
    case.masked[1, 0] = True
    data = case.padded()
    options = {"shift": True, "return_metrics": True, "backend": "reference"}
    logp, metrics = token_logps(data["hidden"], case.weight, data["tokens"], data["masked"], **options)
    for values in (logp, metrics.entropy, metrics.log_sum_exp):
        assert values[1, 0].isnan() and values.isnan().sum() == 1


def test_shift__packed_tokens_need_boundaries():
    case = Case()
    data = case.packed() | {"cu_seqlens": None}
    with pytest.raises(ValueError, match="cu_seqlens"):
        logps(case, data, shift=True)


@OPS
def test_shift__compiles_without_a_graph_break(op):
    case = Case()
    known = int(case.masked.sum())
    function = functools.partial(op, case, shift=True, num_masked=known)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(case.packed()), function(case.packed()))
    case.masked[0, 0], case.masked[0, 1] = True, False  # a first token instead of another one
    assert compiled(case.packed()).isnan().any()


# cu_seqlens and offsets

BAD = {
    "starts-at-1": [1, 7, 12, 21],
    "starts-below-0": [-3, 7, 12, 21],
    "descends": [0, 12, 7, 21],
    "ends-early": [0, 7, 12, 20],
    "ends-late": [0, 7, 12, 22],
    "far-out": [0, 7, 2**31 - 1, 21],
    "one-sequence": [0, 20],
}
bad_offsets = pytest.mark.parametrize("offsets", BAD.values(), ids=BAD.keys())


def with_offsets(case, offsets):
    data = case.packed()
    data["cu_seqlens"] = torch.tensor(offsets, dtype=torch.int32)
    return data


@OPS
@bad_offsets
def test_cu_seqlens__that_are_no_boundaries_are_refused(op, offsets):
    case = Case()
    with pytest.raises(ValueError, match="cu_seqlens must start at 0, never descend and end at 21"):
        op(case, with_offsets(case, offsets))


@OPS
@bad_offsets
@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
def test_cu_seqlens__that_are_no_boundaries_make_nan_of_everything_where_nobody_looks(
    op, offsets, shift, nobody_looks
):
    case = Case()
    data = with_offsets(case, offsets)
    if op is not logps:
        data["weights"] = torch.ones(len(offsets) - 1)  # per sequence, so that boundaries are searched too
    data["hidden"].requires_grad_()
    got = op(case, data, shift=shift)
    assert got.isnan().all()
    assert torch.autograd.grad(got.sum(), data["hidden"])[0].isnan().any()


@OPS
def test_cu_seqlens__that_are_boundaries_change_no_bit_where_nobody_looks(op, monkeypatch):
    case = Case()
    results = []
    for looks in (True, False):
        monkeypatch.setattr(checks, "values_are_checked", lambda device, looks=looks: looks)
        case.weight = case.weight.detach().requires_grad_()
        value = op(case, case.packed())
        results.append((value.detach(), *torch.autograd.grad(value.square().sum(), case.weight)))
    for got, want in zip(*results, strict=True):
        assert_bitwise_equal(got, want)


@OPS
def test_cu_seqlens__are_nan_inside_a_compiled_function(op):
    case = Case()
    known = int(case.masked.sum())
    function = functools.partial(op, case, num_masked=known)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(case.packed()), function(case.packed()))
    bad = case.packed() | {"cu_seqlens": torch.tensor([0, 7, 6, 12, 21], dtype=torch.int32)}
    assert compiled(bad).isnan().all()


@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        (torch.tensor([], dtype=torch.int32), "one element more"),
        (torch.tensor([0], dtype=torch.int32), "one element more"),
        (torch.tensor([0.0, 21.0]), "int32 or int64"),
        (torch.tensor([[0, 21]]), "must have shape"),
    ],
    ids=["none", "no-sequence", "float", "2-D"],
)
@OPS
def test_cu_seqlens__of_a_wrong_form_are_refused_even_where_nobody_looks(
    op, cu_seqlens, message, nobody_looks
):
    case = Case()
    with pytest.raises(ValueError, match=message):
        op(case, case.packed() | {"cu_seqlens": cu_seqlens})


@bad_offsets
def test_segment_sum__offsets_that_are_none_are_refused(offsets):
    with pytest.raises(ValueError, match="offsets_S1 must start at 0, never descend and end at 21"):
        segment_sum(torch.ones(21), torch.tensor(offsets))


def test_segment_sum__says_where_long_offsets_descend():
    offsets = torch.arange(40)
    offsets[20] = 3
    with pytest.raises(ValueError, match="got 19, 3 at 19, 20"):
        segment_sum(torch.ones(39), offsets)


@bad_offsets
def test_segment_sum__offsets_that_are_none_make_nan_where_nobody_looks(offsets, nobody_looks):
    value = torch.ones(21, requires_grad=True)
    total = segment_sum(value, torch.tensor(offsets))
    total.sum().backward()
    assert total.isnan().all() and value.grad.isnan().all()


def test_segment_sum__sound_offsets_change_no_bit_where_nobody_looks(nobody_looks):
    value = torch.randn(21, requires_grad=True)
    total = segment_sum(value, CU.long())
    want = torch.stack([value[a:b].double().sum().float() for a, b in itertools.pairwise(CU)])
    torch.testing.assert_close(total, want, rtol=1e-6, atol=0)
    assert total[1] == 0
