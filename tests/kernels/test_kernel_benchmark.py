"""`python -m benchmarks kernels` runs a tiny case: gated, and with a reason wherever a rival is missing."""

import csv
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks import bench_linear_cross_entropy
from benchmarks.cases import Case
from benchmarks.providers import PROVIDERS, Provider

ROOT = Path(__file__).resolve().parents[2]


def test_benchmark__tiny_case_writes_gated_rows_with_provenance(tmp_path):
    output = tmp_path / "kernels.csv"
    command = [sys.executable, "-m", "benchmarks", "kernels", "--output", str(output)]
    sizes = {"--rows": "20", "--size": "16", "--classes": "300", "--repeats": "1", "--threads": "1"}
    command += [word for pair in sizes.items() for word in pair]
    command += ["--dtypes", "fp32", "--providers", "vrpo", "torch eager", "quack, sum only"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    with output.open() as stream:
        rows = list(csv.DictReader(stream))
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
