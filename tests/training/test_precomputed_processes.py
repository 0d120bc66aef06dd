"""Precomputed references on two processes, whole and sharded: the files of one process."""

import os
from pathlib import Path

import engines
import pytest
import torch

from vrpo.training.precomputed import FOLDER

SCRIPT = Path(__file__).parent / "precompute_two_processes.py"
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="each process is a fork")


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
    for name in ("one", "two"):
        (folder / name).mkdir()
    engines.launch((1, SCRIPT.name, folder / "one", 4), (2, SCRIPT.name, folder / "two", 2))
    one, two = (torch.load(folder / name / "end.pt") for name in ("one", "two"))
    return folder, one, two


@pytest.mark.slow
@FORKS
def test_sync__two_processes_whole_and_sharded_equal_one(ends):
    _, one, two = ends
    expected = one["follows-VRPOTrainer"]["end"]
    for found in (one["follows-VRPOTrainer"], two["follows-VRPOTrainer"], two["follows-ShardedTrainer"]):
        for name, weight in expected.items():
            torch.testing.assert_close(found["end"][name], weight, rtol=1e-7, atol=1e-10, msg=name)
            assert torch.equal(found["loaded"][name], found["end"][name]), name


@pytest.mark.slow
@FORKS
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
