"""Index arguments out of range on the CPU: the same ValueError from every op and backend, never a number."""

import pytest
import torch
from backends import both_backends

from vrpo_kernels import (
    cross_entropy,
    elbo_from_hidden,
    elbo_from_logits,
    gather_rows,
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
    token_logps,
)

N, D, V = 4, 8, 9
HIDDEN, WEIGHT = torch.randn(N, D), torch.randn(V, D)
ALL = torch.ones(2, 2, dtype=torch.bool)


def _elbo_from_hidden(y, **options):
    return elbo_from_hidden(HIDDEN.view(2, 2, D), WEIGHT, y.view(2, 2), ALL, torch.ones(2), **options)


def _elbo_from_logits(y, **options):
    logits = (HIDDEN @ WEIGHT.T).view(2, 2, V)
    return elbo_from_logits(logits, y.view(2, 2), ALL, torch.ones(2), **options)


def _replay(y, **options):
    known = linear_cross_entropy_statistics(HIDDEN, WEIGHT, y.clamp(0, V - 1), **options)
    return linear_cross_entropy_replay(HIDDEN, WEIGHT, y, *known, **options)


OPS = {
    "linear_cross_entropy": lambda y, **o: linear_cross_entropy(HIDDEN, WEIGHT, y, **o),
    "statistics": lambda y, **o: linear_cross_entropy_statistics(HIDDEN, WEIGHT, y, **o),
    "replay": _replay,
    "cross_entropy": lambda y, **o: cross_entropy(HIDDEN @ WEIGHT.T, y, **o),
    "cross_entropy-rows": lambda y, **o: cross_entropy(HIDDEN @ WEIGHT.T, y, torch.arange(N), **o),
    "elbo_from_hidden": _elbo_from_hidden,
    "elbo_from_logits": _elbo_from_logits,
    "token_logps": lambda y, **o: token_logps(HIDDEN.view(2, 2, D), WEIGHT, y.view(2, 2), ALL, **o),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@both_backends
@every_op
@pytest.mark.parametrize("wrong", [-(2**63), -100, -1, V, 2**40, 2**63 - 1])
def test_targets__out_of_range_are_named_in_one_wording(op, backend, wrong):
    message = rf"targets must lie in \[0, {V}\), got {wrong} in row 2; leave rows without a target out"
    with pytest.raises(ValueError, match=message):
        op(torch.tensor([0, 8, wrong, -5]), backend=backend)


@both_backends
@every_op
def test_targets__every_class_is_accepted(op, backend):
    op(torch.tensor([0, V - 1, 3, 3]), backend=backend)


@both_backends
@pytest.mark.parametrize("name", ["linear_cross_entropy", "replay", "cross_entropy"])
def test_targets__are_looked_at_in_compiled_code_too(name, backend):
    compiled = torch.compile(OPS[name], fullgraph=True, backend="aot_eager")
    compiled(torch.tensor([0, 1, 2, 3]), backend=backend)
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, {V}\), got -100 in row 1"):
        compiled(torch.tensor([0, -100, 2, 3]), backend=backend)


@both_backends
@pytest.mark.parametrize("name", ["linear_cross_entropy", "cross_entropy"])
def test_targets__are_looked_at_under_vmap_too(name, backend):
    several = torch.tensor([[0, 1, 2, 3], [0, 1, -1, 3]])
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, {V}\), got -1 in row 2"):
        torch.func.vmap(lambda y: OPS[name](y, backend=backend))(several)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([0, 4], r"row_N must lie in \[0, 4\), got 4 at index 1"),
        ([-1, 0], r"row_N must lie in \[0, 4\), got -1 at index 0"),
        ([2, 0, 2], "row_N must be all different, got 2 more than once"),
    ],
)
def test_gather_rows__names_a_bad_row(rows, message):
    with pytest.raises(ValueError, match=message):
        gather_rows(HIDDEN, torch.tensor(rows))


@both_backends
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nll, s: (nll.double(), s), "nll and the first pass's results must have the same dtype"),
        (lambda nll, s: (nll, s.bfloat16()), "statistics and the first pass's results .* same dtype"),
        (lambda nll, s: (nll, s.to("meta")), "statistics and hidden must have the same device"),
    ],
)
def test_replay__names_what_the_first_pass_did_not_return(backend, change, message):
    head = (HIDDEN, WEIGHT, torch.tensor([0, 1, 2, 3]))
    known = linear_cross_entropy_statistics(*head, backend=backend)
    with pytest.raises(ValueError, match=message):
        linear_cross_entropy_replay(*head, *change(*known), backend=backend)
