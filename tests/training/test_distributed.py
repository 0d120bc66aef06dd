"""Two processes train exactly as one: the process count appears nowhere in the mathematics."""

import os

import engines
import pytest
import torch


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each process is a fork")
def test_train__two_processes_equal_one(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    script = "train_two_processes.py"
    engines.launch((1, script, tmp_path / "one", 4), (2, script, tmp_path / "two", 2))
    one, two = (torch.load(tmp_path / name / "end.pt", weights_only=False) for name in ("one", "two"))
    speeds = ("runtime", "per_second", "preparation_time", "memory_gb")
    for kind in ("frozen", "adapter", "sft", "kto"):
        for name, weight in one[kind]["weights"].items():
            torch.testing.assert_close(two[kind]["weights"][name], weight, rtol=1e-8, atol=1e-11, msg=name)
        for alone, both in zip(one[kind]["log"], two[kind]["log"], strict=True):
            for key in (key for key in alone if not key.endswith(speeds)):
                assert both[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-9), (kind, key, alone["step"])
