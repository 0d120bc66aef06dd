"""Every public operation: checked, then timed."""

import pytest
import torch

from benchmarks.cases import DTYPES
from benchmarks.micro.micro import SIZES, Micro, Where, synchronised
from benchmarks.micro.registry import MICROS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """One test per benchmark and dtype; what does not depend on the dtype runs once."""
    device = metafunc.config.getoption("device")
    dtypes = metafunc.config.getoption("dtypes") or (["bf16"] if device == "cuda" else ["fp32", "bf16"])
    cases = [
        pytest.param(micro, dtype, id=f"{micro.name}, {dtype}" if micro.floating else micro.name)
        for micro in MICROS
        for dtype in (dtypes if micro.floating else dtypes[:1])
    ]
    metafunc.parametrize(("micro", "dtype"), cases)


def test_micro__is_right_and_timed(benchmark, request, micro: Micro, dtype: str) -> None:
    device = request.config.getoption("device")
    sizes = SIZES[request.config.getoption("sizes") or device]
    prepared = micro.prepare(Where(device, DTYPES[dtype], sizes))
    prepared.check()
    shown = f", {dtype}" if micro.floating else ""
    benchmark.group = f"{micro.op}: {micro.shape(sizes)}{shown}"
    benchmark.extra_info.update(op=micro.op, mode=micro.mode, dtype=dtype if micro.floating else "")
    run = synchronised(prepared.run, device)
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    benchmark(run)
