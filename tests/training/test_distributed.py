"""Two processes train exactly as one: the process count appears nowhere in the mathematics."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parent / "train_two_processes.py"


def train(output_dir: Path, num_processes: int, batch_size: int) -> dict:
    output_dir.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    launch += ["--master_addr", "127.0.0.1", "--master_port", "0", "--standalone"]
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{SCRIPT.parents[2]}{os.pathsep}{SCRIPT.parents[1]}",
    }
    done = subprocess.run(
        [*launch, SCRIPT, output_dir, str(batch_size)], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output_dir / "end.pt", weights_only=False)


@pytest.mark.slow
def test_train__two_processes_equal_one(tmp_path):
    one, two = train(tmp_path / "one", 1, 4), train(tmp_path / "two", 2, 2)
    speeds = ("runtime", "per_second", "preparation_time", "memory_gb")
    for kind in ("frozen", "adapter", "sft", "kto"):
        for name, weight in one[kind]["weights"].items():
            torch.testing.assert_close(two[kind]["weights"][name], weight, rtol=1e-8, atol=1e-11, msg=name)
        for alone, both in zip(one[kind]["log"], two[kind]["log"], strict=True):
            for key in (key for key in alone if not key.endswith(speeds)):
                assert both[key] == pytest.approx(alone[key], rel=1e-5, abs=1e-9), (kind, key, alone["step"])
