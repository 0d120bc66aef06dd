"""`python -m benchmarks kernels` runs a tiny case: gated, and with a reason wherever a rival is missing."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_cross_entropy, bench_linear_cross_entropy, record
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS, Provider

ROOT = Path(__file__).resolve().parents[2]


def run_benchmark(name, output, *options):
    """The rows that `python -m benchmarks NAME` writes for one small fp32 case."""
    command = [sys.executable, "-m", "benchmarks", name, "--output", str(output), *options]
    command += ["--repeats", "1", "--threads", "1", "--dtypes", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    with output.open() as stream:
        return list(csv.DictReader(stream))


def test_benchmark__tiny_case_writes_gated_rows_with_provenance(tmp_path):
    output = tmp_path / "kernels.csv"
    sizes = ["--rows", "20", "--size", "16", "--classes", "300"]
    rows = run_benchmark("kernels", output, *sizes, "--providers", "vrpo", "torch eager", "quack, sum only")
    assert tuple(rows[0]) == bench_linear_cross_entropy.FIELDS
    assert all(row["date"] and row["git"] and row["device"] for row in rows)
    ours = [row for row in rows if row["provider"] == "vrpo"]
    assert [row["column"] for row in ours] == ["no gradient", "frozen head", "trained head"]
    assert all(float(row["policy_ratio"]) <= 1 and float(row["ms_p50"]) > 0 for row in ours)
    if importlib.util.find_spec("quack") is None:
        missing = [row for row in rows if row["provider"] == "quack, sum only"]
        assert missing[0]["note"] == "package quack is not installed" and not missing[0]["ms_p50"]


def test_benchmark__a_wrong_kernel_gets_no_figure(monkeypatch):
    wrong = Provider(lambda case: lambda x, w, y: (x @ w.T).logsumexp(1) * 1.01)
    monkeypatch.setitem(PROVIDERS, "vrpo", wrong)
    case = Case(20, 16, 300, torch.float32, "cpu")
    rows = bench_linear_cross_entropy.bench(case, threads=torch.get_num_threads(), repeats=1, wanted=["vrpo"])
    assert rows[0]["note"] == "outside the tolerance policy" and "ms_p50" not in rows[0]


def test_cross_entropy_benchmark__tiny_case_is_gated_and_saved(tmp_path):
    output = tmp_path / "cross_entropy.csv"
    rows = run_benchmark("cross-entropy", output, "--positions", "12", "--classes", "300")
    ours = [row for row in rows if row["provider"] == "vrpo"]
    assert [row["column"] for row in ours] == ["no gradient", "forward and backward", "in place"]
    assert all(float(row["policy_ratio"]) <= 1 and float(row["units_p50"]) > 0 for row in ours)
    assert {row["provider"] for row in rows} >= {"torch eager, .float()", "torch.compile, .float()"}


def test_cross_entropy_benchmark__a_wrong_kernel_gets_no_figure(monkeypatch):
    def wrong(device):
        return {"vrpo": lambda logits, targets, rows: logits[rows].float().logsumexp(1) * 1.01}

    monkeypatch.setattr(bench_cross_entropy, "providers", wrong)
    inputs = bench_cross_entropy.make_inputs(12, 300, torch.float32, "cpu")
    rows = bench_cross_entropy.bench(inputs, threads=torch.get_num_threads(), repeats=1)
    assert rows[0]["note"] == "outside the tolerance policy" and "ms_p50" not in rows[0]


def test_record__refuses_to_mix_columns(tmp_path):
    path = tmp_path / "figures.csv"
    record.append([{"a": 1}], path, ["a", "b"])
    record.append([{"b": 2}], path, ["a", "b"])
    assert path.read_text().split() == ["a,b", "1,", ",2"]
    with pytest.raises(ValueError, match="has the columns"):
        record.append([{"c": 3}], path, ["a", "c"])
