"""`python -m benchmarks kernels` runs a tiny case: gated, and with a reason wherever a rival is missing."""

import csv
import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import bench_cross_entropy, bench_linear_cross_entropy, gate, kernels_plan, record
from benchmarks.__main__ import BENCHMARKS, main
from benchmarks.cases import COLUMNS, HEADS, MODELS, Case, make_inputs
from benchmarks.providers import PROVIDERS, Provider, stages
from benchmarks.timing import Timing, interleaved
from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy import reference

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
    assert [(row["head"], row["column"]) for row in ours] == [
        (head, column) for head in HEADS for column in COLUMNS
    ]
    assert all(float(row["policy_ratio"]) <= 1 and float(row["ms_p50"]) > 0 for row in ours)
    assert all(row["units_p20"] == row["units_p50"] == row["units_p80"] for row in ours)  # of one round
    if importlib.util.find_spec("quack") is None:
        missing = [row for row in rows if row["provider"] == "quack, sum only"]
        assert missing[0]["note"] == "package quack is not installed" and not missing[0]["ms_p50"]


def test_benchmark__a_wrong_kernel_gets_no_figure(monkeypatch):
    wrong = Provider(lambda case: lambda x, w, y: (x @ w.T).logsumexp(1) * 1.01)
    monkeypatch.setitem(PROVIDERS, "vrpo", wrong)
    case = Case(20, 16, 300, torch.float32, "cpu")
    rows = bench_linear_cross_entropy.bench(case, threads=torch.get_num_threads(), repeats=1, wanted=["vrpo"])
    assert rows[0]["note"].startswith("outside the tolerance policy: nll ") and "ms_p50" not in rows[0]


def test_benchmark__a_rival_that_fails_is_a_row_and_stops_nobody(monkeypatch):
    def runs_out_of_memory(hidden, weight, targets):
        raise torch.OutOfMemoryError("out of\nmemory")

    monkeypatch.setitem(PROVIDERS, "Liger", Provider(lambda case: runs_out_of_memory))
    case = Case(20, 16, 300, torch.float32, "cpu")
    wanted = ["Liger", "torch eager"]
    rows = bench_linear_cross_entropy.bench(case, threads=torch.get_num_threads(), repeats=1, wanted=wanted)
    assert rows[0]["note"] == "fails: OutOfMemoryError: out of memory" and "ms_p50" not in rows[0]
    assert [row["column"] for row in rows if "ms_p50" in row][:3] == list(COLUMNS)


def test_benchmark__after_a_lost_device_nothing_is_timed(monkeypatch):
    def asserts(hidden, weight, targets):
        raise RuntimeError("device-side assert")

    def gone():
        raise RuntimeError("the context is lost")

    monkeypatch.setattr(torch.cuda, "synchronize", gone)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 0)
    monkeypatch.setitem(PROVIDERS, "Liger", Provider(lambda case: asserts))
    run = bench_linear_cross_entropy.Bench(Case(20, 16, 300, torch.float32, "cpu"))
    run.on_gpu = True
    for name in ("torch eager", "Liger", "vrpo"):
        run.prepare(name, "plain")
    rows = run.measure(threads=torch.get_num_threads(), repeats=1)
    assert [row["column"] for row in rows] == [*COLUMNS, "", ""]
    assert not any("ms_p50" in row for row in rows)
    lost = f"not run: {bench_linear_cross_entropy.LOST}, RuntimeError: the context is lost"
    assert [row["note"] for row in rows] == [*[lost] * 3, "fails: RuntimeError: device-side assert", lost]


def test_benchmark__begins_nothing_after_its_time(tmp_path):
    output = tmp_path / "kernels.csv"
    options = ["--rows", "20", "--size", "16", "--classes", "300", "--dtypes", "fp32", "--threads", "1"]
    options += ["--revision", "abc1234", "--output", str(output)]
    for limit in (["--seconds", "0"], ["--until", str(time.time() - 1)]):
        assert bench_linear_cross_entropy.main([*options, *limit]) == 0
        assert not output.exists()


def test_starts__are_those_of_another_size_or_of_the_others():
    starts = bench_linear_cross_entropy.Starts()
    slow = PROVIDERS["torch.compile"].start_seconds
    starts.taken |= {"vrpo": 0.5, "Liger": 3.0}
    assert (starts.expected("vrpo"), starts.expected("torch.compile")) == (0.5, slow)
    starts.compiled = True
    assert (starts.expected("vrpo"), starts.expected("torch.compile")) == (0.5, 3.0)
    assert bench_linear_cross_entropy.Starts(compiled=True).expected("torch.compile") == slow


def test_benchmark__spends_what_is_left_on_the_first_size(monkeypatch, capsys, tmp_path):
    prepared = []

    def prepare(self, name, head):
        expected = self.starts.expected(name)
        prepared.append((self.case.num_rows, name, expected))
        self.starts.taken[name] = 1.0

    monkeypatch.setattr(bench_linear_cross_entropy.Bench, "prepare", prepare)
    monkeypatch.setattr(kernels_plan, "stages", lambda wanted, _: stages(wanted, "cuda"))
    options = ["--rows", "20", "10", "--size", "16", "--classes", "300", "--dtypes", "fp32"]
    options += [
        "--heads",
        "plain",
        "--threads",
        "1",
        "2",
        "--repeats",
        "1",
        "--compiled",
        "--until",
        str(time.time() + 60),
    ]
    options += ["--providers", "torch.compile", "vrpo", "--output", str(tmp_path / "kernels.csv")]
    assert bench_linear_cross_entropy.main(options) == 0
    first = [(20, "vrpo", 5.0), (20, "torch.compile", 1.0)]
    again, second = [(20, name, 1.0) for _, name, _ in first], [(10, name, 1.0) for _, name, _ in first]
    assert prepared == [*first, *again, *second, *second]
    lines = capsys.readouterr().out.splitlines()
    threads = [1, 1, 2, 2, 1, 1, 2, 2]
    names = [f"{row[1]}, N={row[0]}, {many} threads" for row, many in zip(prepared, threads, strict=True)]
    assert [line for line in lines if line.startswith("plan: ")] == ["plan: " + " | ".join(names)]
    assert [line[len("done: ") :] for line in lines if line.startswith("done: ")] == names


def test_gate__judges_the_whole_problem_by_its_first_rows():
    inputs = make_inputs(Case(gate.ROWS + 9, 16, 300, torch.float32, "cpu"))
    judge = gate.Gate(inputs)
    assert judge.judge(reference.linear_cross_entropy).note == ""

    def weights_swapped(hidden, weight, targets):  # of the gradients of rows 3 and 4
        return _SwapUpstream.apply(reference.linear_cross_entropy(hidden, weight, targets))

    verdict = judge.judge(weights_swapped)
    assert verdict.ratios["nll"] <= 1 < min(verdict.ratios["dhidden"], verdict.ratios["dweight"])


def test_gate__allows_what_the_policy_allows_of_a_wide_head():
    inputs = make_inputs(Case(5, 8192, 40, torch.bfloat16, "cpu"))

    def op(hidden, weight, targets):
        return reference.linear_cross_entropy(hidden.float(), weight.float(), targets) * (1 + 1e-5)

    nll, dhidden, dweight, _ = gate.full_pass(op, inputs, "trained head")
    expected = testing.linear_cross_entropy_ratios(
        nll, dhidden, dweight, inputs.hidden, inputs.weight, inputs.targets, inputs.upstream
    )
    assert gate.Gate(inputs).judge(op).ratios == pytest.approx(expected)


def test_gate__of_a_large_head_checks_the_targets_and_others(monkeypatch):
    monkeypatch.setattr(gate, "LARGE_HEAD", 16 * 299)
    monkeypatch.setattr(gate, "CLASSES", 30)
    inputs = make_inputs(Case(20, 16, 300, torch.float32, "cpu", head="bias"))
    judge = gate.Gate(inputs)
    checked = set(judge._classes.tolist())
    assert set(inputs.targets.tolist()) <= checked and 30 <= len(checked) <= 50
    assert judge.judge(reference.linear_cross_entropy).note == ""

    def wrong(classes):
        def op(hidden, weight, targets, bias):
            keep = torch.ones(len(weight), 1)
            keep[classes] = 0.0
            half = weight * keep + (weight * (1 - keep)).detach()  # no gradient of these classes
            return reference.linear_cross_entropy(hidden, half, targets, bias)

        return judge.judge(op).ratios["dweight"]

    assert wrong(inputs.targets[3:4]) > 1 and wrong(torch.tensor([0])) > 1
    assert wrong(torch.tensor([next(n for n in range(300) if n not in checked)])) <= 1


class _SwapUpstream(torch.autograd.Function):
    @staticmethod
    def forward(ctx, nll):
        return nll.clone()

    @staticmethod
    def backward(ctx, dnll):
        swapped = dnll.clone()
        swapped[3], swapped[4] = dnll[4], dnll[3]
        return swapped


def test_interleaved__notes_failures_where_asked_and_stops_at_the_deadline():
    def fails():
        raise ValueError("no")

    options = {"device": "cpu", "threads": 1, "repeats": 3}
    found = interleaved({"a": fails, "b": lambda: None}, **options, deadline=0.0, keep_going=True)
    assert (found["a"].failure, found["a"].samples) == ("ValueError: no", [])
    assert len(found["b"].samples) == 1
    with pytest.raises(ValueError, match="no"):
        interleaved({"a": fails}, **options)


def _formula(case):
    """Any head, by the reference."""

    def op(hidden, weight, targets, bias=None):
        return reference.linear_cross_entropy(hidden, weight, targets, bias, case.softcap or 0.0)

    return op


def _without_derivative(case):
    """Like `_formula`, but the gradient does not know of the soft-cap."""

    def op(hidden, weight, targets, bias=None):
        true = _formula(case)(hidden, weight, targets, bias)
        plain = reference.linear_cross_entropy(hidden, weight, targets, bias)
        return plain + (true - plain).detach()

    return op


def _frozen_bias(case):
    """Like `_formula`, but the bias gets no gradient from half of the classes."""

    def op(hidden, weight, targets, bias=None):
        if bias is not None:
            half = torch.arange(len(bias)) % 2 == 0
            bias = torch.where(half, bias, bias.detach())
        return _formula(case)(hidden, weight, targets, bias)

    return op


def test_benchmark__times_all_heads_in_one_run_with_a_gate_each(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "vrpo", Provider(_formula))
    case = Case(20, 16, 300, torch.float32, "cpu", logits="peaked")
    wanted = ["vrpo", "torch eager", "F.linear_cross_entropy"]
    threads = torch.get_num_threads()
    rows = bench_linear_cross_entropy.bench(case, list(HEADS), threads=threads, repeats=1, wanted=wanted)
    timed = [(row["provider"], row["head"], row["column"]) for row in rows if "ms_p50" in row]
    for name in ("vrpo", "torch eager"):
        assert [found[1:] for found in timed if found[0] == name] == [
            (head, column) for head in HEADS for column in COLUMNS
        ]
    assert all(float(row["policy_ratio"]) <= 1 for row in rows if row["provider"] == "vrpo")
    notes = {row["note"] for row in rows if row["provider"] == wanted[2] and row["head"] == "softcap"}
    assert len(notes) == 1 and notes.pop()  # absent from this torch, or without a soft-cap
    assert sum(row["column"] == "unit" for row in rows) == 1 + torch.backends.mkldnn.is_available()


def test_benchmark__times_other_heads_where_the_plain_one_fails_its_gate(monkeypatch):
    def make(case):
        return lambda *inputs: _formula(case)(*inputs) * (2 if case.head == "plain" else 1)

    monkeypatch.setitem(PROVIDERS, "vrpo", Provider(make))
    case, threads = Case(20, 16, 300, torch.float32, "cpu"), torch.get_num_threads()
    rows = bench_linear_cross_entropy.bench(
        case, ["plain", "bias"], threads=threads, repeats=1, wanted=["vrpo"]
    )
    plain, *others = [row for row in rows if row["provider"] == "vrpo"]
    assert plain["note"].startswith("outside the tolerance policy") and "ms_p50" not in plain
    assert [row["column"] for row in others if "ms_p50" in row and not row["note"]] == list(COLUMNS)


def test_heads_against_plain__are_differences_round_by_round():
    one, plain = Timing([30.0, 44.0, 30.0]), Timing([10.0, 20.0, 10.0])
    note = bench_linear_cross_entropy.above_plain(one, plain, Timing([10.0, 20.0, 40.0]))
    assert note == "+1.20 units above the plain head"  # of +2.00, +1.20, +0.50
    rows = [
        {"provider": "vrpo", "head": head, "column": column, "note": note if head == "bias" else ""}
        for head in ("plain", "bias")
        for column in COLUMNS
    ]
    rows.append({"provider": "torch eager", "head": "bias", "column": "", "note": "fails: no memory"})
    (line,) = bench_linear_cross_entropy.heads_against_plain(rows)
    cells = ", ".join(f"{column} +1.20 units" for column in COLUMNS)
    assert line == f"vrpo, bias above the plain head: {cells}"


def test_above_plain__has_an_interval_from_six_rounds_on():
    more = [0.0, 0.1, -0.1, 0.3, 0.2, 0.05]
    units, plain = Timing([2.0] * 6), Timing([5.0] * 6)
    costs = [5.0 + 2.0 * one for one in more]
    note = bench_linear_cross_entropy.above_plain(Timing(costs), plain, units)
    assert note == "+0.10 [-0.10, +0.30] units above the plain head"
    fewer = bench_linear_cross_entropy.above_plain(Timing(costs[:5]), plain, units)
    assert fewer == "+0.10 units above the plain head"


@pytest.mark.parametrize("count", [5, 6, 20, 41])
def test_median_interval__covers_the_median(count):
    interval = Timing([float(one) for one in range(1, count + 1)]).median_interval()
    expected = {5: None, 6: (1, 6), 20: (6, 15), 41: (14, 28)}  # tables of the sign test, e.g. Conover, A3
    assert interval == expected[count]


@pytest.mark.parametrize(
    ("make", "head", "wrong"),
    [(_without_derivative, "softcap", "dhidden"), (_frozen_bias, "bias", "dbias")],
)
def test_gate__sees_a_wrong_gradient_of_a_head(make, head, wrong):
    case = Case(20, 16, 300, torch.float32, "cpu", logits="peaked", head=head)
    judge = gate.Gate(make_inputs(case))
    assert judge.judge(_formula(case)).note == ""
    verdict = judge.judge(make(case))
    assert verdict.ratios["nll"] <= 1 < verdict.ratios[wrong]


def plan_of(device, *options):
    return list(kernels_plan.turns(kernels_plan.parse("", list(options), device), device))


def test_turns__heads_share_a_run_on_a_cpu_and_come_last_on_a_gpu():
    (turn, *_) = plan_of("cpu", "--threads", "1")
    assert turn.heads == tuple(HEADS) and turn.case.head == "plain"
    turns = plan_of("cuda", "--heads", "plain", "softcap", "bias", "--rows", "4096", "512")
    order = [(turn.heads, turn.case.num_rows) for turn in turns]
    assert list(dict.fromkeys(order)) == [
        (("plain",), 4096), (("plain",), 512), (("softcap",), 4096), (("bias",), 4096)
    ]  # fmt: skip
    assert {turn.case.softcap for turn in turns if turn.heads == ("softcap",)} == {30.0}
    assert {turn.heads for turn in plan_of("cuda")} == {("plain",)}


def test_turns__models_bring_their_own_shapes_and_heads():
    turns = plan_of("cpu", "--model", *MODELS, "--dtypes", "bf16", "--threads", "1", "--rows", "64")
    found = {turn.model: (turn.case.size, turn.case.num_classes, turn.heads) for turn in turns}
    gemma = found.pop("diffusion-gemma")
    assert gemma[1:] == (262144, ("softcap",)) and gemma[0] > 1000
    assert found == {
        "llada": (4096, 126464, ("plain",)),
        "dream": (3584, 152064, ("plain",)),
        "llada2-mini": (2048, 157184, ("plain",)),
    }
    names = kernels_plan.labels(turns)
    assert names[0][0] == "vrpo, N=64, llada, plain" and len(names) == 4
    (turn,) = plan_of("cpu", "--model", "llada", "--heads", "bias", "--dtypes", "bf16", "--threads", "1")
    assert (turn.heads, turn.case.head) == (("bias",), "bias")


def test_committed_figures__have_a_head(tmp_path):
    with (record.RESULTS / "kernels.csv").open(newline="") as stream:
        reader = csv.DictReader(stream)
        assert tuple(reader.fieldnames) == bench_linear_cross_entropy.FIELDS
        assert {row["head"] for row in reader} <= set(HEADS)


def test_stages__on_a_gpu_what_may_hang_or_compile_for_long_comes_last():
    wanted = ["torch.compile", "CCE, exact", "Liger", "torch eager", "vrpo"]
    assert stages(wanted, "cpu") == [wanted]
    assert stages(wanted, "cuda") == [["Liger", "vrpo"], ["CCE, exact"], ["torch eager"], ["torch.compile"]]


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


def test_commands__that_the_pages_name_exist():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"python3? -m benchmarks ([a-z-]+)", text))
    assert named <= set(BENCHMARKS) and {"compare", "kernels", "model", "liger-view"} <= named
    for module, _ in BENCHMARKS.values():
        assert importlib.util.find_spec(module), module


def test_main__names_what_it_does_not_have(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "kernel"])
    assert main() == 2
    printed = capsys.readouterr()
    assert "no benchmark is called 'kernel'" in printed.err and "kernels" in printed.out
