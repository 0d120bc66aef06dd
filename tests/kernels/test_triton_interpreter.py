"""Runs `interpreted.py` in a child process: TRITON_INTERPRET must be set before Triton is first imported."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


def reason_to_skip() -> str:
    if importlib.util.find_spec("triton") is None:
        return "the package `triton` is not installed"
    versions = [importlib.metadata.version(name).split(".") for name in ("triton", "numpy")]
    triton, numpy = (tuple(int(part) for part in version[:2]) for version in versions)
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of Triton 3.6 cannot run loops with NumPy >= 2.4 (TypeError in range)"
    return ""


def run_interpreted(name: str) -> None:
    """The tests of one file in a child process."""
    here = Path(__file__).parent
    # Triton 3.6 converts arrays to scalars in a way that NumPy deprecates.
    options = ["-q", "-p", "no:cacheprovider", "--noconftest", "-W", "ignore::DeprecationWarning"]
    child = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(here / name)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=here.parents[1],
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stdout[-6000:] + child.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.skipif(bool(reason_to_skip()), reason=reason_to_skip() or "it runs")
@pytest.mark.parametrize("name", ["interpreted.py", "interpreted_heads.py", "interpreted_shards.py"])
def test_triton_kernels__have_the_right_values_in_the_interpreter(name):
    run_interpreted(name)
