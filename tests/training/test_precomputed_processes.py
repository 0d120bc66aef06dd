"""Precomputed references on two processes, whole and sharded: the files of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vrpo.training.precomputed import FOLDER

SCRIPT = Path(__file__).parent / "precompute_two_processes.py"
ENV = os.environ | {
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": f"{SCRIPT.parents[2]}{os.pathsep}{SCRIPT.parents[1]}{os.pathsep}{SCRIPT.parent}",
}


def run(output_dir: Path, num_processes: int, batch_size: int) -> dict:
    output_dir.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(num_processes)]
    launch += ["--master_addr", "127.0.0.1", "--master_port", "0", "--standalone"]
    done = subprocess.run(
        [*launch, SCRIPT, output_dir, str(batch_size)], env=ENV, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(output_dir / "end.pt")


def stored(output_dir: Path) -> dict[str, bytes]:
    folder = output_dir / FOLDER
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.glob("**/*"))
        if path.is_file() and path.name != ".lock"
    }


@pytest.fixture(scope="module")
def ends(tmp_path_factory) -> tuple[Path, dict, dict]:
    folder = tmp_path_factory.mktemp("processes")
    return folder, run(folder / "one", 1, 4), run(folder / "two", 2, 2)


@pytest.mark.slow
def test_sync__two_processes_whole_and_sharded_equal_one(ends):
    _, one, two = ends
    expected = one["follows-VRPOTrainer"]["end"]
    for found in (one["follows-VRPOTrainer"], two["follows-VRPOTrainer"], two["follows-ShardedTrainer"]):
        for name, weight in expected.items():
            torch.testing.assert_close(found["end"][name], weight, rtol=1e-7, atol=1e-10, msg=name)
            assert torch.equal(found["loaded"][name], found["end"][name]), name


@pytest.mark.slow
def test_precompute__two_processes_whole_and_sharded_equal_one(ends):
    tmp_path, one, two = ends
    for kind in ("full", "adapter"):
        expected = stored(tmp_path / "one" / f"{kind}-known")
        assert len([file for file in expected if file.endswith(".arrow")]) == 9
        for name in (f"{kind}-known", f"{kind}-sharded"):
            assert stored(tmp_path / "two" / name) == expected, name  # every bit of every file
        plain = one[f"{kind}-plain"]
        for end in (one[f"{kind}-known"], two[f"{kind}-known"], two[f"{kind}-sharded"]):
            assert end["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-9)
            for weight, value in plain["weights"].items():
                torch.testing.assert_close(end["weights"][weight], value, rtol=1e-7, atol=1e-10, msg=weight)
