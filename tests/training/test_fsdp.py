"""FSDP2: a sharded model gives the bits of the whole one, a sharded trainer ends where DDP ends."""

import os
import subprocess
import sys
from pathlib import Path

import engines
import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="each process is a fork")


def run_two_processes(script: str, output_dir: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    launch += ["--master_addr", "127.0.0.1", "--master_port", "0", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{HERE.parents[1]}{os.pathsep}{HERE.parent}"}
    done = subprocess.run([*launch, HERE / script, output_dir], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict:
    output_dir = tmp_path_factory.mktemp("sharded")
    run_two_processes("shard_two_processes.py", output_dir)
    return torch.load(output_dir / "sharded.pt")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["fp32", "bf16", "gradient_checkpointing", "frozen_head"])
def test_forward__sharded_with_fsdp2_equals_the_whole_model(case, models):
    sharded, whole = models[case]["sharded"], models[case]["whole"]
    assert max(sharded["held"].values()) < 1.0  # rank 0 holds a part of every parameter, and no more
    for found, expected in zip(sharded["nll"], whole["nll"], strict=True):
        assert torch.equal(found, expected)
    assert set(sharded["gradients"]) == set(whole["gradients"])
    assert ("lm_head.weight" in sharded["gradients"]) == (case != "frozen_head")
    for name, expected in whole["gradients"].items():
        # Equal here; another order of scaling and adding the two ranks' gradients may round once more.
        torch.testing.assert_close(sharded["gradients"][name], expected, rtol=1e-6, atol=1e-7, msg=name)


@pytest.mark.slow
def test_linear_cross_entropy__refuses_a_sharded_head_and_takes_the_gathered_one(models):
    head = models["head"]
    assert "weight is a sharded DTensor" in head["message"]
    assert "full_tensor()" in head["message"]
    assert torch.equal(*head["nll"])
    assert torch.equal(*head["gradients"])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, dict]:
    output_dir = tmp_path_factory.mktemp("trained")
    engines.launch((2, "train_sharded.py", output_dir))
    return output_dir, torch.load(output_dir / "trained.pt")


@pytest.mark.slow
@FORKS
def test_train__starts_at_margin_zero_in_bf16(trained):
    """The reference gets the mixed precision of the policy from FSDP2, and its autocast under DDP."""
    _, ends = trained
    for kind, log in ends["bf16"].items():
        for key in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
            assert log[0][key] == 0.0, (kind, key)


@pytest.mark.slow
@FORKS
@pytest.mark.parametrize("reference", ["frozen", "adapter"])
def test_train__sharded_equals_ddp(reference, trained):
    output_dir, ends = trained
    whole, sharded = ends[reference]["whole"], ends[reference]["sharded"]
    # accelerate keeps the last norm and the head gathered until a backward pass reaches them.
    kept = [name for name in sharded["whole_weights"] if not name.endswith(("norm.weight", "lm_head.weight"))]
    assert not kept and not any(".layers." in name for name in sharded["whole_weights"])
    assert set(whole["weights"]) == set(sharded["weights"])
    for name, weight in whole["weights"].items():
        torch.testing.assert_close(sharded["weights"][name], weight, rtol=1e-9, atol=1e-12, msg=name)
    for expected, found in zip(whole["log"], sharded["log"], strict=True):
        for key in (key for key in expected if not key.endswith(("runtime", "per_second", "memory_gb"))):
            assert found[key] == pytest.approx(expected[key], rel=1e-6, abs=1e-9), key
    assert sharded["log"][0]["rewards/margins"] == 0.0  # policy and reference are the same, bit for bit

    name = "model.safetensors" if reference == "frozen" else "adapter_model.safetensors"
    saved = [
        load_file(output_dir / f"{reference}-{kind}" / name) for kind in ("VRPOTrainer", "ShardedTrainer")
    ]
    assert set(saved[0]) == set(saved[1])
    for name, weight in saved[0].items():
        torch.testing.assert_close(saved[1][name], weight, rtol=1e-9, atol=1e-12, msg=name)
