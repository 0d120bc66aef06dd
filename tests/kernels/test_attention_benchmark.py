"""`python -m benchmarks attention`: its gate, its layouts, its rows."""

import csv

import pytest
import torch

from benchmarks import bench_attention
from vrpo.models.attention import Segments

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(bench_attention, "CASES", {"small": ([3, 5, 5, 1], 2, 8), "equal": ([4, 4], 2, 8)})


def run(tmp_path):
    output, threads = tmp_path / "attention.csv", torch.get_num_threads()
    status = bench_attention.main(["--cases", "small", "equal", "--rounds", "2", "--output", str(output)])
    torch.set_num_threads(threads)
    assert status == 0
    with output.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_attention__every_layout_is_a_row_beside_ours(small, tmp_path):
    rows = run(tmp_path)
    assert [row["provider"] for row in rows] == 2 * list(bench_attention.PROVIDERS)
    ours = {row["case"]: float(row["ms"]) for row in rows if row["provider"] == bench_attention.OURS}
    for row in rows:
        assert (row["tokens"], row["longest"]) == {"small": ("14", "5"), "equal": ("8", "4")}[row["case"]]
        if row["note"]:
            continue
        assert float(row["gradient_error"]) < 1e-5 and row["rounds"] == "2"
        assert float(row["slower"]) == pytest.approx(float(row["ms"]) / ours[row["case"]], rel=1e-2)
    assert sum(not row["note"] for row in rows) >= 6


def test_problem__counts_two_products_forward_and_four_backward():
    assert bench_attention.Problem([3, 5], 2, 8).gflop == pytest.approx(1e-9 * 12 * 2 * 8 * (9 + 25))


def test_padded__is_attention_in_each_segment():
    problem = bench_attention.Problem([2, 5, 1], 2, 4)
    query, key, value = (part.detach() for part in problem.inputs)
    out = bench_attention.padded(query, key, value, Segments(problem.cu_seqlens, 5))
    for start, end in ((0, 2), (2, 7), (7, 8)):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        expected = (q @ k.mT / 2).softmax(-1) @ v
        torch.testing.assert_close(out[start:end], expected.transpose(0, 1))


def test_gate__a_wrong_gradient_ends_the_case(small, tmp_path, monkeypatch):
    wrong = {
        **bench_attention.PROVIDERS,
        "wrong": lambda q, k, v, s: bench_attention.padded(1.001 * q, k, v, s),
    }
    monkeypatch.setattr(bench_attention, "PROVIDERS", wrong)
    with pytest.raises(RuntimeError, match="the gradient of 'wrong' differs from ours"):
        run(tmp_path)
    assert not (tmp_path / "attention.csv").exists()


def test_gate__a_layout_that_torch_lacks_is_a_row_with_a_note(small, tmp_path, monkeypatch):
    def missing(*_):
        raise NotImplementedError("no such layout")

    monkeypatch.setattr(bench_attention, "PROVIDERS", {**bench_attention.PROVIDERS, "missing": missing})
    row = next(row for row in run(tmp_path) if row["provider"] == "missing")
    assert row["note"] == "NotImplementedError: no such layout" and not row["ms"]


def test_quick__is_short_and_stays_out_of_the_committed_file(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench_attention, "QUICK", ("equal",))
    threads = torch.get_num_threads()
    assert bench_attention.main(["--quick"]) == 0
    torch.set_num_threads(threads)
    with (tmp_path / bench_attention.QUICK_OUTPUT).open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert {row["case"] for row in rows} == {"equal"} and rows[0]["rounds"] == "3"
