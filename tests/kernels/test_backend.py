"""backend.choose decides from facts alone, and refuses with every reason."""

import contextlib
import importlib
import importlib.util
import subprocess
import sys

import pytest
import torch

from vrpo_kernels import backend
from vrpo_kernels.backend import Availability, choose

ALL = Availability(triton=None, cpu=None, interpreted=False)
NOTHING = Availability(triton="no triton here", cpu="no compiler here", interpreted=False)
INTERPRETED = Availability(triton=None, cpu=None, interpreted=True)


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "facts", "expected"),
    [
        ("cpu", torch.float32, "auto", ALL, "cpu"),
        ("cpu", torch.bfloat16, "auto", ALL, "cpu"),
        ("cuda", torch.bfloat16, "auto", ALL, "triton"),
        ("cpu", torch.float32, "auto", NOTHING, "reference"),
        ("cpu", torch.float64, "auto", ALL, "reference"),
        ("cuda", torch.float64, "auto", ALL, "reference"),
        ("cpu", None, "auto", ALL, "cpu"),
        ("cuda", None, "auto", ALL, "triton"),
        ("cuda", torch.float32, "reference", NOTHING, "reference"),
        ("cpu", torch.float32, "triton", INTERPRETED, "triton"),
        ("cpu", torch.float32, "auto", INTERPRETED, "cpu"),
    ],
)
def test_choose__table(device, dtype, requested, facts, expected):
    assert choose("op", device=device, dtype=dtype, requested=requested, available=facts) == expected


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "facts", "messages"),
    [
        ("cuda", torch.float32, "auto", NOTHING, ["no triton here"]),
        ("cpu", torch.float64, "triton", NOTHING, ["no triton here", "float64", "not on cpu"]),
        ("cuda", torch.float64, "cpu", NOTHING, ["no compiler here", "float64", "not on cuda"]),
        ("cpu", torch.bfloat16, "triton", INTERPRETED, ["interpreter multiplies bfloat16 wrongly"]),
        ("cpu", torch.float32, "cuda", ALL, ["backend must be one of", "'cuda'"]),
    ],
)
def test_choose__impossible_requests_list_every_reason(device, dtype, requested, facts, messages):
    with pytest.raises(ValueError, match="op: ") as raised:
        choose("op", device=device, dtype=dtype, requested=requested, available=facts)
    for message in messages:
        assert message in str(raised.value)


def test_describe__has_one_line_per_backend():
    assert set(backend.describe()) == set(backend.BACKENDS)


def test_describe__says_what_is_lost_without_the_extension(monkeypatch):
    monkeypatch.setattr(backend, "_AVAILABLE", NOTHING)
    assert "no compiler here" in backend.describe()["cpu"]
    assert "reference" in backend.describe()["cpu"]


def test_package__imports_without_extension_and_without_triton():
    """A machine without a compiler and without Triton still imports, computes and explains itself."""
    script = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    None if name in ("triton", "vrpo_kernels._C") else find(name, *rest)
)
import torch, vrpo_kernels
assert vrpo_kernels.describe()["cpu"].startswith("the C++ extension vrpo_kernels._C was not built")
nll = vrpo_kernels.linear_cross_entropy(torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1]))
assert torch.allclose(nll, torch.full((2,), 4.0).log())
assert "triton" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


KERNEL_MODULES = ("linear_cross_entropy", "cross_entropy", "mask_select", "pack_masked", "rotary")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no package `triton`")
@pytest.mark.parametrize("name", KERNEL_MODULES)
def test_on_device__guards_every_function_that_launches(name, monkeypatch):
    # Triton launches on the current device; a tensor on another one would fault.
    module = importlib.import_module(f"vrpo_kernels.{name}.kernel")
    entered = []

    class Recorded:
        def __init__(self, tensor):
            entered.append(tensor)

        __enter__ = __exit__ = lambda self, *args: None

    monkeypatch.setattr(torch.cuda, "device_of", Recorded)
    public = [
        value
        for key, value in vars(module).items()
        if callable(value) and not key.startswith("_") and getattr(value, "__module__", "") == module.__name__
    ]
    pure = ("resolve_gemm", "kept_shapes", "block_heads")
    launchers = [function for function in public if function.__name__ not in pure]
    assert launchers
    marker = torch.zeros(1)
    for function in launchers:
        entered.clear()
        with contextlib.suppress(Exception):  # the arguments are nonsense; the guard comes first
            function(marker)
        with contextlib.suppress(Exception):
            function(named=marker)
        assert len(entered) == 2 and entered.pop() is marker, function.__name__
        assert len(entered) == 1 and entered[0] is marker, function.__name__
