"""`pytest benchmarks/micro`: every public operation, a gate that wrong results fail, saved baselines."""

import importlib.util
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vrpo_kernels
from benchmarks.micro.micro import SIZES, Where
from benchmarks.micro.registry import MICROS, NOT_TIMED

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--benchmark-only", "--device", "cpu", "--sizes", "tiny"]
QUICK = ["--benchmark-max-time", "0.001", "--benchmark-min-rounds", "2"]


def run_suite(*options):
    found = importlib.util.find_spec("pytest_benchmark")
    assert found, "pytest-benchmark is not installed: pip install -e .[test]"
    command = [sys.executable, "-m", "pytest", "benchmarks/micro", "-q", *TINY, *QUICK, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The JSON file of one run of the whole suite."""
    path = tmp_path_factory.mktemp("micro") / "all.json"
    done = run_suite("--benchmark-json", str(path))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    return json.loads(path.read_text())


def test_registry__has_a_benchmark_of_every_public_operation():
    public = set(vrpo_kernels.__all__)
    timed = {micro.op for micro in MICROS}
    untimed = public - timed - set(NOT_TIMED)
    assert not untimed, f"no micro benchmark of {sorted(untimed)} (benchmarks/micro)"
    assert timed <= public and not timed & set(NOT_TIMED)
    differentiable = {op for op in timed if "ifferentiable in" in (inspect.getdoc(getattr(vrpo_kernels, op)))}
    for op in differentiable:
        modes = {micro.mode for micro in MICROS if micro.op == op}
        assert len(modes) > 1 or "backward" in modes.pop(), op


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_suite__says_that_there_is_no_gpu():
    done = run_suite("--device", "cuda")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda needs a GPU" in done.stderr


def test_suite__saves_every_benchmark_with_machine_and_commit(saved):
    found = {(one["extra_info"]["op"], one["extra_info"]["mode"]) for one in saved["benchmarks"]}
    assert found == {(micro.op, micro.mode) for micro in MICROS}
    for one in saved["benchmarks"]:
        assert one["group"].startswith(f"{one['extra_info']['op']}: ") and one["stats"]["min"] > 0
        assert one["options"]["timer"] == "process_time"
    dtypes = {one["extra_info"]["dtype"] for one in saved["benchmarks"]}
    assert dtypes == {"fp32", "bf16", ""}
    machine = saved["machine_info"]
    assert machine["device"] and machine["torch"] == torch.__version__ and machine["clock"] == "cpu time"
    assert set(machine) == {"device", "torch", "triton", "threads", "clock"}
    assert saved["commit_info"]["git"] and saved["commit_info"]["date"]


def test_suite__compares_with_a_saved_baseline_and_fails_beyond_the_limit(saved, tmp_path):
    """Against figures ten times smaller it fails, against figures ten times larger it does not."""
    from pytest_benchmark.utils import get_machine_id  # the name of the folder that it looks into

    results = {}
    for factor in (0.1, 10.0):
        storage = tmp_path / f"storage{factor}"
        folder = storage / get_machine_id()
        folder.mkdir(parents=True)
        baseline = json.loads(json.dumps(saved))
        for one in baseline["benchmarks"]:
            one["stats"]["min"] *= factor
        (folder / "0001_base.json").write_text(json.dumps(baseline))
        options = [f"--benchmark-storage=file://{storage}", "--benchmark-compare=0001"]
        results[factor] = run_suite("-k", "philox4x32", *options, "--benchmark-compare-fail=min:100%")
    assert results[10.0].returncode == 0, results[10.0].stdout[-3000:]
    assert results[0.1].returncode != 0 and "Performance has regressed" in results[0.1].stderr


def spoil(result):
    """The result with its first tensor changed: by a hundredth, or the first integer by one."""
    if isinstance(result, torch.Tensor):
        if result.is_floating_point():
            return result * 1.01
        wrong = result.clone()
        wrong[0] += 1
        return wrong
    first, *others = result
    return (spoil(first), *others)


@pytest.mark.parametrize("micro", MICROS, ids=lambda micro: micro.name)
def test_check__tells_right_results_from_wrong_ones(micro, monkeypatch):
    where = Where("cpu", torch.float32, SIZES["tiny"])
    prepared = micro.prepare(where)
    prepared.check()
    right = getattr(vrpo_kernels, micro.op)

    def wrong(*args, **kwargs):
        result = right(*args, **kwargs)
        return result if kwargs.get("backend") == "reference" else spoil(result)

    monkeypatch.setattr(vrpo_kernels, micro.op, wrong)
    with pytest.raises(AssertionError):
        prepared.check()
