"""`python -m benchmarks.gpu_sanitize`, written for compute-sanitizer on a GPU, in the interpreter instead."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_stages import SANITIZED

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="no package `triton`")


def run(*parts):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "benchmarks.gpu_sanitize", *parts]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)


def test_gpu_sanitize__every_part_is_right_in_the_interpreter():
    done = run()
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [line.split(":")[0] for line in done.stdout.splitlines() if ": ok;" in line]
    assert tuple(parts) == SANITIZED


def test_gpu_sanitize__a_wrong_value_is_an_exit_status(monkeypatch, capsys):
    from benchmarks import gpu_sanitize

    wrong = {"right": lambda: {"nll": 0.5}, "wrong": lambda: {"nll": 0.5, "dweight": float("nan")}}
    monkeypatch.setattr(gpu_sanitize, "PARTS", wrong)
    assert gpu_sanitize.main(["right"]) == 0
    assert gpu_sanitize.main([]) == 1
    assert "wrong: WRONG; error over what is allowed: nll 0.5, dweight nan" in capsys.readouterr().out
