"""What the GPU tests share: inputs, the op in its forms, reports of measured ratios. No tests here."""

import contextlib
import gc
import importlib.util
import itertools
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import filelock
import pytest
import torch

from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import (
    linear_cross_entropy,
    linear_cross_entropy_replay,
    linear_cross_entropy_statistics,
)
from vrpo_kernels.linear_cross_entropy.tiles import Tiles, tiles_for

MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no package `triton`"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),  # "a prototype feature"
]
KEEP, RECOMPUTE = 2**40, 0
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
HALF_FORMS = [("cublas", torch.bfloat16), ("fused", torch.bfloat16)]
FORMS = [*HALF_FORMS, ("cublas", torch.float16), ("fused", torch.float16), ("cublas", torch.float32)]


def name_of(value) -> str:
    return str(value).removeprefix("torch.")


def make_inputs(N, V, D, dtype, *, scale=1.0, peak=0.0):
    """Random inputs; peak lifts the target's logit of every second row, in nats."""
    generator = torch.Generator().manual_seed(N + V + D)
    hidden = torch.randn(N, D, generator=generator).mul_(scale * D**-0.5)
    weight = torch.randn(V, D, generator=generator)
    targets = torch.randint(V, (N,), generator=generator)
    hidden[::2] += weight[targets[::2]] * (peak / D)
    upstream = testing.wide_range_upstream(N, generator)
    return hidden.to("cuda", dtype), weight.to("cuda", dtype), targets.cuda(), upstream.cuda()


def make_op(gemm="auto", kept_tile_bytes=KEEP):
    def op(hidden, weight, targets):
        return linear_cross_entropy(hidden, weight, targets, gemm=gemm, kept_tile_bytes=kept_tile_bytes)

    return op


def make_replay(gemm):
    """Both passes of a replay as one op; the second must see the first one's logits bit for bit."""

    def op(hidden, weight, targets):
        known = linear_cross_entropy_statistics(hidden, weight, targets, gemm=gemm)
        value, drift = linear_cross_entropy_replay(hidden, weight, targets, *known, gemm=gemm)
        assert drift.item() == 0.0
        return value

    return op


def make_modes(gemm) -> dict[str, Callable]:
    """Every way to the gradients of one GEMM form."""
    return {
        f"{gemm} kept": make_op(gemm, KEEP),
        f"{gemm} recomputed": make_op(gemm, RECOMPUTE),
        f"{gemm} replay": make_replay(gemm),
    }


def gradients(op, hidden, weight, targets, upstream):
    """(nll, dhidden, dweight)."""
    leaves = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    nll = op(*leaves, targets)
    nll.backward(upstream)
    return nll.detach(), leaves[0].grad, leaves[1].grad


def small_tiles(gemm: str, itemsize: int = 2, **changes) -> Tiles:
    """Tiles of 1024 x 8192 (sweep 1024 x 4096), so that moderate sizes already have several of them."""
    sizes = {"rows": 1024, "cols": 8192, "sweep_rows": 1024, "sweep_cols": 4096, "max_cols": 8192}
    return replace(tiles_for(torch.cuda.get_device_capability(), itemsize, gemm), **{**sizes, **changes})


def use_small_tiles(monkeypatch, **changes) -> None:
    """Until the test ends, calls take `small_tiles`."""
    from vrpo_kernels.linear_cross_entropy import kernel

    monkeypatch.setattr(
        kernel, "_tiles", lambda hidden, gemm: small_tiles(gemm, hidden.element_size(), **changes)
    )


def hold(ratios: dict[str, float], record: Callable[[str, object], None]) -> None:
    """Hold all ratios to the policy; record and print every one, in the message of a failure too."""
    for name, ratio in ratios.items():
        record(name, f"{ratio:.4g}")
    listed = ", ".join(f"{name} {ratio:.3g}" for name, ratio in ratios.items())
    print(f"error over what the policy allows: {listed}")
    wrong = [name for name, ratio in ratios.items() if not ratio <= 1.0]  # NaN fails
    assert not wrong, f"outside the tolerance policy: {', '.join(wrong)}; all ratios: {listed}"


@contextlib.contextmanager
def room_on_the_device(gibibytes: int):
    """Room for a large test beside those of other test processes: three at a time up to 16 GiB, above it one.

    Skips if the device has not that much free memory; what was used goes back afterwards.
    """
    with _one_of(("16",) * 3 if gibibytes <= 16 else ("80",)):
        if torch.cuda.mem_get_info()[0] < gibibytes * 2**30:
            pytest.skip(f"needs {gibibytes} GiB of free device memory")
        try:
            yield
        finally:
            gc.collect()
            torch.cuda.empty_cache()


@contextlib.contextmanager
def _one_of(names: tuple[str, ...]):
    """Holds the first of these locks that comes free."""
    folder = Path(tempfile.gettempdir())
    locks = [
        filelock.FileLock(folder / f"vrpo_gpu_tests_{name}_{index}.lock") for index, name in enumerate(names)
    ]
    for lock in itertools.cycle(locks):
        try:
            lock.acquire(timeout=0.05)
        except filelock.Timeout:
            continue
        try:
            yield
        finally:
            lock.release()
        return
