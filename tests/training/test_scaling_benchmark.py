"""`python -m benchmarks scaling` at a tiny size: its gates, its rows, its figure, and what it refuses."""

import csv
from dataclasses import replace

import pytest
import torch

from benchmarks import bench_scaling, scaling_h100
from benchmarks.bare_products import BareProducts
from benchmarks.memory_steps import peak_of_tensors
from benchmarks.scaling_processes import measure_processes
from benchmarks.scaling_steps import AXES, Point, Step, modelled
from benchmarks.step_setup import step_flops

TINY = Point(bench_scaling._size(2, 32, 60, 3, 4), num_samples=2, pairs=2)
VALUES = {"samples": (1, 2, 4), "depth": (1, 2), "processes": (1, 2)}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(bench_scaling, "CENTRE", TINY)
    monkeypatch.setattr(bench_scaling, "VALUES", VALUES)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


@pytest.mark.parametrize("axis", AXES)
def test_point__changes_one_size(axis):
    value = 2 * TINY.value(axis)
    changed = TINY.at(axis, value)
    assert changed.value(axis) == value
    assert [changed.value(other) for other in AXES if other != axis] == [
        TINY.value(other) for other in AXES if other != axis
    ]
    assert changed.size.mask_token_id == changed.size.classes - 1
    assert changed.size.mlp == 3 * changed.size.hidden


def test_step__has_the_gradient_of_the_plain_objective():
    error = Step(TINY, "cpu", torch.float32).gradient_error()
    assert 0 < error < 1e-5
    assert Step(TINY, "cpu", torch.float64).gradient_error() < 1e-6  # nll is float32


def scaled(index, factor):
    """Step.__call__ with one wrong gradient."""
    call = Step.__call__

    def wrong(self):
        call(self)
        self.training.trained()[index].grad.mul_(factor)

    return wrong


@pytest.mark.parametrize("index", [0, 5, -1])
def test_main__measures_nothing_where_the_gradient_is_another(index, tmp_path, monkeypatch):
    monkeypatch.setattr(Step, "__call__", scaled(index, 1.01))
    monkeypatch.setattr(bench_scaling.Bench, "axis", lambda *_: pytest.fail("measured"))
    output = tmp_path / "scaling.csv"
    with pytest.raises(RuntimeError, match=r"the gradient at the centre is .* nothing is measured"):
        bench_scaling.main(["--axes", "samples", "--output", str(output)])
    assert not output.exists()


def test_main__writes_measured_and_modelled_rows(tmp_path, capsys):
    output = tmp_path / "scaling.csv"
    flags = ["--axes", "samples", "depth", "--rounds", "2", "--output", str(output)]
    assert bench_scaling.main(flags) == 0
    rows = rows_of(output)
    assert tuple(rows[0]) == bench_scaling.FIELDS
    measured = [row for row in rows if row["kind"] == "measured"]
    assert [(row["axis"], row["value"]) for row in measured] == [
        *(("samples", str(value)) for value in VALUES["samples"]),
        *(("depth", str(value)) for value in VALUES["depth"]),
    ]
    for row in measured:
        tokens = int(row["pairs"]) * 2 * int(row["K"]) * (int(row["prompt"]) + int(row["response"]))
        assert int(row["tokens"]) == tokens and 0 < int(row["rows"]) < tokens
        floor = 1e3 * float(row["gflop"]) / float(row["gemm_gflops"])
        assert float(row["floor_ms"]) == pytest.approx(floor, rel=1e-3)
        assert float(row["pct_of_floor"]) == pytest.approx(100 * floor / float(row["ms"]), rel=1e-3)
        assert row["rounds"] == "2" and row["clock"] == "cpu time" and row["model_ms_least"] == ""
        assert row["dtype"] == "float32" and row["threads"] == "1" and row["note"] == ""
        assert bool(row["gradient_error"]) == (row["K"] == "2" and row["layers"] == "2")
        assert float(row["peak_MiB"]) == pytest.approx(float(row["model_MiB"]), rel=0.5)
    peaks = [float(row["peak_MiB"]) for row in measured[:3]]
    assert peaks == sorted(peaks) and peaks[2] > 1.5 * peaks[0]
    rest = [row for row in rows if row["kind"] == "modelled"]
    assert len(measured) + len(rest) == len(rows)
    assert len(rest) == 2 * sum(len(scaling_h100.VALUES[axis]) for axis in ("samples", "depth"))
    assert {row["device"] for row in rest} == {"H100, modelled"}
    assert all(row[name] == "" for row in rest for name in ("ms", "floor_ms", "peak_MiB", "torch"))
    for row in rest:
        fits = "does not fit" not in row["note"]
        assert bool(row["model_ms_least"]) == fits == (float(row["model_MiB"]) < 74 * 1024)
    assert "[depth 2]" in capsys.readouterr().out


@pytest.mark.slow
def test_main__two_processes_share_the_pairs(tmp_path):
    output = tmp_path / "scaling.csv"
    assert bench_scaling.main(["--axes", "processes", "--rounds", "2", "--output", str(output)]) == 0
    one, two = (row for row in rows_of(output) if row["kind"] == "measured")
    assert (one["processes"], two["processes"]) == ("1", "2")
    assert one["tokens"] == two["tokens"] and one["rows"] == two["rows"]
    assert float(two["gflop"]) == pytest.approx(float(one["gflop"]) / 2, rel=1e-3)
    assert one["clock"] == two["clock"] == "wall" and one["rounds"] == two["rounds"] == "2"
    assert 0 < float(two["gradient_error"]) < 1e-5 and one["gradient_error"] == ""


def test_main__writes_no_row_of_processes_whose_gradient_is_another(tmp_path, monkeypatch):
    found = {"1": {}, "2": {"gradient_error": 0.5}}
    monkeypatch.setattr(bench_scaling, "measure_processes", lambda *_: found)
    output = tmp_path / "scaling.csv"
    with pytest.raises(RuntimeError, match=r"two processes is 0\.5 of its norm .* off that of one"):
        bench_scaling.main(["--axes", "processes", "--output", str(output)])
    assert not output.exists()


def test_measure_processes__refuses_pairs_that_do_not_halve():
    with pytest.raises(ValueError, match="pairs must be divisible by 2, the processes, got 3"):
        measure_processes(replace(TINY, pairs=3), 1, 1)


def test_modelled__is_the_arithmetic_of_this_step():
    step = Step(TINY, "cpu", torch.float32)
    rows, lengths = len(step.pack.row_N), step.pack.cu_seqlens_S1.diff().long()
    model = modelled(TINY, rows, torch.float32, "cpu")
    counted = 1e-9 * step_flops(TINY.size, lengths, rows, full=True, checkpointing=False)
    assert 0.5 * counted < model.gflop <= 1.0001 * counted  # the last layer may skip rows that nobody reads
    more = modelled(TINY, rows + 5, torch.float32, "cpu").gflop - model.gflop
    assert more >= 0.999 * 1e-9 * 5 * 4 * 2 * 32 * 60  # a row meets the head four times
    twice = modelled(replace(TINY, num_samples=4), 2 * rows, torch.float32, "cpu")
    assert twice.gflop == pytest.approx(2 * model.gflop)
    half = modelled(replace(TINY, processes=2), rows, torch.float32, "cpu")
    assert half.gflop == pytest.approx(model.gflop / 2)


@pytest.mark.parametrize(("classes", "num_samples"), [(60, 64), (2000, 64), (20000, 16)])
def test_modelled__memory_is_that_of_the_step(classes, num_samples):
    """Where activations need most, and where the logits do that a trained head keeps."""
    step = Step(replace(TINY, num_samples=num_samples).at("vocabulary", classes), "cpu", torch.float32)
    step()
    step.forget()
    peak = peak_of_tensors(step, "cpu") / 2**20
    model = modelled(step.point, len(step.pack.row_N), torch.float32, "cpu")
    assert peak == pytest.approx(model.mib, rel=0.1)


def test_bare_products__rate_is_arithmetic_over_time():
    bare = BareProducts(TINY.size, 10, 7, "cpu", torch.float32)
    body = 2 * 10 * TINY.size.layers * (4 * 32 * 32 + 3 * 32 * 96)
    assert bare.gflops(2.0, 1.0) == pytest.approx((body + 2 * 7 * 32 * 60) / 5.0 * 1e-6)
    bare.layer()
    bare.head()
    for left, right, out in (*bare._layer, bare._head):
        torch.testing.assert_close(out, left @ right)


@pytest.mark.parametrize("axis", AXES)
def test_plans__change_one_size_of_llada_8b(axis):
    found = list(scaling_h100.plans(axis))
    assert {name for name, _, _ in found} == {"LoRA", "full"}
    for name, value, plan in found:
        setup, shape = plan.setup, plan.shape
        values = {"samples": setup.num_samples, "response": setup.response_length}
        values |= {"pairs": setup.pairs_per_step, "vocabulary": shape.vocab_size}
        values |= {"width": shape.hidden_size, "depth": shape.num_layers}
        values |= {"processes": plan.machine.num_gpus}
        centre = {"samples": 8, "response": 512, "pairs": 64, "vocabulary": 126464, "width": 4096}
        centre |= {"depth": 32, "processes": 1 if name == "LoRA" else 8}
        assert values == centre | {axis: value}
        assert shape.num_heads * shape.head_dim == shape.hidden_size


def test_figure__draws_the_last_rows(tmp_path):
    output = tmp_path / "scaling.csv"
    row = {"kind": "measured", "axis": "samples", "device": "here", "dtype": "float32"}
    row |= {"floor_ms": 1, "peak_MiB": 5, "model_MiB": 4}
    old = [row | {"date": "1", "value": value, "ms": 99} for value in (1, 2)]
    new = [row | {"date": "2", "value": value, "ms": 3 * value} for value in (1, 2, 4)]
    other = [row | {"date": "1", "axis": "depth", "value": 3, "ms": 7}]
    plan = {"kind": "modelled", "axis": "samples", "setup": "LoRA", "date": "2", "model_MiB": 2048}
    plan |= {"value": 8, "model_ms_least": 1000, "model_ms_most": 3000}
    bench_scaling.append([*old, *other, *new, plan], output, bench_scaling.FIELDS)
    found = bench_scaling.last_rows(output)
    assert [(row["axis"], row["ms"]) for row in found] == [
        *(("depth", "7"), ("samples", "3"), ("samples", "6"), ("samples", "12"), ("samples", ""))
    ]
    from benchmarks.scaling_figure import draw

    grid = draw(found).axes
    assert len(grid) == 4 * 2
    lines = {line.get_label(): line for line in grid[0].get_lines()}
    assert list(lines["measured"].get_xdata()) == [1, 2, 4]
    assert list(lines["measured"].get_ydata()) == [3, 6, 12]
    assert list(lines["cost model"].get_ydata()) == [1, 1, 1]
    (gib,) = (line for line in grid[6].get_lines() if line.get_label() == "LoRA")
    assert list(gib.get_ydata()) == [2]
    assert not [line for line in grid[6].get_lines() if line.get_label() == "measured"]
    figure = tmp_path / "figures" / "step_growth.png"
    assert bench_scaling.main(["--figure", str(figure), "--output", str(output)]) == 0
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_last_rows__of_an_empty_file_are_an_error(tmp_path):
    output = tmp_path / "scaling.csv"
    bench_scaling.append([], output, bench_scaling.FIELDS)
    with pytest.raises(ValueError, match="has no rows"):
        bench_scaling.last_rows(output)


def test_main__another_file_is_refused_before_any_work(tmp_path, monkeypatch):
    output = tmp_path / "other.csv"
    output.write_text("a,b\n1,2\n")
    monkeypatch.setattr(bench_scaling.Bench, "check", lambda *_: pytest.fail("measured"))
    with pytest.raises(ValueError, match="has the columns"):
        bench_scaling.main(["--output", str(output)])
    assert output.read_text() == "a,b\n1,2\n"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--axes", "colour"], "invalid choice: 'colour'"),
        (["--axes", "width"], "--axes width is not measured on cpu: samples, depth, processes are"),
        (["--rounds", "0"], "must be a whole number from 1, got '0'"),
        (["--seconds", "1.5"], "must be a whole number from 1, got '1.5'"),
    ],
)
def test_parse__refuses_what_it_does_not_know(flags, message, capsys):
    with pytest.raises(SystemExit):
        bench_scaling.parse(flags)
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_parse__refuses_a_gpu_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        bench_scaling.parse(["--device", "cuda"])
    assert "torch finds no CUDA device" in capsys.readouterr().err


def test_parse__quick_rows_are_kept_apart():
    assert bench_scaling.parse(["--quick"]).output == bench_scaling.QUICK_OUTPUT
    assert bench_scaling.parse([]).output == bench_scaling.OUTPUT
