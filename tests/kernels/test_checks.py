"""When the values of index arguments are looked at, and in which words a bad one is refused."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vrpo_kernels import checks, set_debug

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def no_capture(monkeypatch):
    """Whether a stream is being captured can only be asked where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_values_are_checked__on_the_cpu_always_and_elsewhere_in_debug_mode():
    assert checks.values_are_checked(CPU) and not checks.values_are_checked(CUDA)
    set_debug(True)
    try:
        assert checks.values_are_checked(CPU) and checks.values_are_checked(CUDA)
        assert not checks.values_are_checked(torch.device("meta"))
    finally:
        set_debug(False)
    assert not checks.values_are_checked(CUDA)


def test_set_debug__as_a_context_restores_what_was_set_before():
    with set_debug(True):
        with set_debug(False):
            assert not checks.values_are_checked(CUDA)
        assert checks.values_are_checked(CUDA)
    assert not checks.values_are_checked(CUDA)


def test_values_are_checked__not_where_a_tensor_stands_for_values():
    seen = []

    def look(x):
        seen.append(checks.values_are_checked(x.device))
        return x.sum()

    x = torch.ones(3, 2)
    torch.func.vmap(look)(x)
    torch.func.jacrev(torch.func.vmap(look))(x)
    with FakeTensorMode():
        look(torch.empty(2))
    torch.fx.experimental.proxy_tensor.make_fx(look)(x)
    assert seen == [False] * len(seen) and len(seen) == 4
    torch.func.grad(look)(x)  # one level of gradients hides nothing
    assert seen[-1]


def test_values_are_checked__not_while_torch_compile_traces():
    @torch.compile(fullgraph=True, backend="eager")
    def checked(x):
        return x + (1 if checks.values_are_checked(x.device) else 0)

    assert checked(torch.zeros(2)).tolist() == [0, 0]


def test_values_are_checked__not_while_a_graph_is_captured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with set_debug(True):
        assert not checks.values_are_checked(CUDA)


@pytest.mark.parametrize("wrong", [-(2**63), -100, -1, 9, 2**63 - 1])
def test_require_targets__names_the_first_bad_row_and_its_value(wrong):
    targets = torch.tensor([0, 8, wrong, 3, -5])
    with pytest.raises(ValueError, match=rf"targets must lie in \[0, 9\), got {wrong} in row 2; leave"):
        checks.require_targets(targets, 9)


def test_require_targets__accepts_what_is_right_and_nothing_at_all():
    checks.require_targets(torch.tensor([0, 8]), 9)
    checks.require_targets(torch.zeros(0, dtype=torch.int64), 9)
