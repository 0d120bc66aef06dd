"""The backends that the tests of the ops run on: those of this machine's processor. No tests here."""

import pytest
import torch

from vrpo_kernels.backend import availability
from vrpo_kernels.linear_cross_entropy import cpu

needs_extension = pytest.mark.skipif(availability().cpu is not None, reason=str(availability().cpu))
both_backends = pytest.mark.parametrize("backend", ["reference", pytest.param("cpu", marks=needs_extension)])

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROUTES = [(gemm, dtype) for dtype in DTYPES for gemm in cpu.gemms(dtype)]
every_route = pytest.mark.parametrize(
    ("gemm", "dtype"), ROUTES, ids=lambda value: str(value).removeprefix("torch.")
)
"""Every way in which the C++ backend multiplies matrices on this processor."""
