"""`make gpu` rehearsed on the CPU: every stage, and what happens when one fails, hangs or dies."""

import argparse
import csv
import importlib.util
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_stages
from benchmarks.cases import HEADS
from benchmarks.gpu_bench import BESIDE, TIMES, Bench, Task
from benchmarks.gpu_process import Child, Log
from benchmarks.gpu_profile import summary
from benchmarks.gpu_reached import not_reached
from benchmarks.gpu_stages import Part, Stage, plan
from benchmarks.gpu_table import tables
from benchmarks.gpu_truth import Head, Size
from vrpo_kernels.linear_cross_entropy import reference

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="the package `triton` is not installed"
)
ROOT = Path(__file__).resolve().parents[2]
HANGS = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""


def rows_of(path):
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def session(folder, **changes):
    options = {"output": folder, "seconds": 60.0, "stages": list(gpu.STAGES), "revision": "abc123"}
    return gpu.Session(
        argparse.Namespace(
            **{
                **options,
                "rivals": [],
                "tests": ["tests/*/test_gpu*.py"],
                "tiny": True,
                "least": 0.1,
                **changes,
            }
        )
    )


def run_script(folder, script, seconds=30.0, **part):
    """Runs one stage made of this script; returns (its line of the table, the log)."""
    found = session(folder, seconds=seconds)
    stage = Stage("stage", 1, [Part("stage", ["-c", script], **part)])
    found.run(stage, [stage])
    (line,) = found.lines
    return line, (folder / "log.txt").read_text()


def tiny_bench(folder, **changes):
    fields = ("date", "git", "dirty", "device", "driver", "torch", "triton", "a", "b", "note")
    options = {"device": "cpu", "dtype": torch.float16, "tiny": True, "warm": False, "until": math.inf}
    return Bench(**{**options, "path": folder / "rows.csv", "fields": fields, **changes})


def test_run__logs_what_a_stage_says_with_its_name(tmp_path, capsys):
    script = "import sys; print('to one'); print('to the other', file=sys.stderr)"
    line, log = run_script(tmp_path, script)
    assert line.outcome == "ok" and not line.failed
    assert "[stage] to one\n" in log and "[stage] to the other\n" in log
    assert "[stage] to one\n" in capsys.readouterr().out


def test_run__a_failed_stage_is_reported_with_its_last_lines(tmp_path):
    line, log = run_script(tmp_path, "print('before'); raise SystemExit(3)")
    assert line.failed and line.outcome == "exit status 3"
    assert "[stage, last lines] before" in log


def test_run__whatever_a_stage_does_the_next_one_runs(tmp_path):
    found = session(tmp_path, seconds=40.0)
    scripts = {
        "raises": "raise RuntimeError('no such kernel')",
        "dies": "import os; os.kill(os.getpid(), 11)",
        "good": "print('ran')",
    }
    stages = [Stage(name, 1, [Part(name, ["-c", script])]) for name, script in scripts.items()]
    missing = Stage("missing", 1, [Part("missing", ["x"], program=[str(tmp_path / "no-such-program")])])
    stages.insert(2, missing)
    for index, stage in enumerate(stages):
        found.run(stage, stages[index:])
    assert [(line.name, line.failed) for line in found.lines] == [
        ("raises", True), ("dies", True), ("missing", True), ("good", False)
    ]  # fmt: skip
    assert found.lines[1].outcome == "exit status -11"
    assert found.lines[2].outcome.startswith("not run: FileNotFoundError")
    assert found.finish([]) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert all(f"\n{name} " in summary for name in (*scripts, "missing"))
    log = (tmp_path / "log.txt").read_text()
    assert "[raises, last lines] RuntimeError: no such kernel" in log and "[good] ran" in log


def test_run__a_stage_that_hangs_is_ended_with_its_children(tmp_path):
    start = time.monotonic()
    line, log = run_script(tmp_path, HANGS, seconds=2.0)
    assert line.failed and line.outcome == "stopped at its limit of 2 s"
    assert time.monotonic() - start < 20
    grandchild = int(log.split("[stage] ")[1].split()[0])
    for _ in range(100):
        status = Path(f"/proc/{grandchild}/stat")
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild outlived its stage")


def test_run__goes_on_behind_the_task_that_killed_or_silenced_a_stage(tmp_path):
    script = """
import os, sys, time
skip = int(sys.argv[sys.argv.index("--skip") + 1])
for number in range(skip, 5):
    print(f"task {number}: something", flush=True)
    if number == 1:
        os.kill(os.getpid(), 9)
    if number == 3:
        time.sleep(60)
print("done")
"""
    line, log = run_script(tmp_path, script, resumes=True, silence=1.0)
    assert line.failed and line.outcome == "ok, started again 2 times behind a task that ended it"
    assert log.count("[stage] task ") == 5 and "[stage] done" in log


def test_run__a_stage_without_a_task_is_not_started_again(tmp_path):
    line, log = run_script(
        tmp_path, "import os; print('x', flush=True); os.kill(os.getpid(), 9)", resumes=True
    )
    assert line.outcome == "exit status -9" and log.count("[stage] x\n") == 1


def test_run__parts_run_side_by_side_and_unused_time_is_passed_on(tmp_path):
    found = session(tmp_path, seconds=30.0)
    slow = [Part(name, ["-c", "import time; time.sleep(1)"]) for name in ("a", "b", "c")]
    stages = [Stage("first", 1, slow), Stage("second", 1, [Part("d", ["-c", ""])])]
    for index, stage in enumerate(stages):
        found.run(stage, stages[index:])
    assert [line.name for line in found.lines] == ["a", "b", "c", "d"]
    log = (tmp_path / "log.txt").read_text()
    assert "stage first: at most 15 s" in log
    assert int(log.split("stage second: at most ")[1].split()[0]) > 24


def test_run__an_optional_part_ends_with_the_others_and_is_no_failure(tmp_path):
    found = session(tmp_path, seconds=60.0)
    parts = [Part("a", ["-c", ""]), Part("b", ["-c", "import time; time.sleep(50)"], optional=True)]
    stage = Stage("stage", 1, parts)
    found.run(stage, [stage])
    assert [line.name for line in found.lines] == ["a", "b"] and found.finish([]) == 0
    assert found.lines[1].seconds < 20 and found.lines[1].outcome == "exit status -15"


def test_run__no_stage_starts_without_time(tmp_path):
    found = session(tmp_path, seconds=0.0)
    stage = Stage("stage", 1, [Part("stage", ["-c", "print('ran')"])])
    found.run(stage, [stage])
    assert found.lines[0].outcome == "skipped: no time left (0 s, it needs 0)" and found.finish([]) == 0


def test_run__a_stage_is_not_started_below_the_time_it_needs(tmp_path):
    found = session(tmp_path, seconds=30.0, tiny=False)
    small = Stage("small", 10, [Part("small", ["-c", "print('ran')"])], least=25.0)
    other = Stage("other", 20, [Part("other", ["-c", ""])])
    found.run(small, [small, other])
    assert found.lines[0].outcome == "skipped: no time left (10 s, it needs 25)"
    found.run(small, [small])
    assert found.lines[1].outcome == "ok"


def test_run__tells_a_stage_the_time_at_which_it_has_to_end(tmp_path):
    script = "import sys; print('until', sys.argv[sys.argv.index('--until') + 1])"
    end = time.time() + 20.0
    for margin, kind in ((gpu.TASK_MARGIN, {"resumes": True}), (gpu.ITEM_MARGIN, {"takes_until": True})):
        _, log = run_script(tmp_path / str(margin), script, seconds=20.0, **kind)
        told = float(log.split("[stage] until ")[1].split()[0])
        assert end - margin - 1 < told < end - margin + 5


def test_run__a_stopped_stage_shows_what_it_did_not_reach(tmp_path):
    script = "import time; print('plan: a | b, c | d'); print('done: a', flush=True); time.sleep(60)"
    found = session(tmp_path, seconds=3.0)
    stage = Stage("stage", 1, [Part("stage", ["-c", script], keep=not_reached)])
    found.run(stage, [stage])
    found.finish([])
    assert "not reached, 2 of 3: b, c; d\n" in (tmp_path / "summary.txt").read_text()


def test_close__ends_what_runs_and_starts_nothing_again(tmp_path):
    child = Child("x", [sys.executable, "-c", HANGS], dict(os.environ), ROOT, Log(tmp_path / "log.txt"))
    child.start()
    child.end()
    outcome = child.wait(time.monotonic() + 5)
    assert outcome.code < 0 and outcome.seconds < 10


def test_plan__names_files_that_exist_and_the_revision_reaches_every_stage(tmp_path):
    found = session(tmp_path)
    stages = plan(found.options)
    assert [stage.name for stage in stages][1:] == ["kernels", "tiles", "memory", "step", "rivals", "compile"]
    assert set(gpu_stages.STAGES) - set(gpu_stages.DEFAULT) == {"compile"}
    for stage in stages:
        for part in stage.parts:
            assert found.environment(part)["VRPO_REVISION"] == "abc123"
            module = part.arguments[part.arguments.index("-m") + 1]
            assert importlib.util.find_spec(module), module
            named = [word for word in part.arguments if word.startswith("tests/")]
            assert all((ROOT / word).exists() for word in named)
    assert sum(stage.weight for stage in stages) <= gpu._options([]).seconds
    assert {stage.name for stage in stages if stage.least} == {"memory", "step"}
    assert all(stage.least < stage.weight for stage in stages if stage.least)
    limited = plan(session(tmp_path, stages=["memory"]).options)
    assert [stage.name for stage in limited] == ["memory"]


def test_gpu__without_transformers_the_step_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "describe_machine", lambda log: [])
    monkeypatch.setattr(gpu, "watch_clocks", lambda log, stop: None)
    monkeypatch.setattr(gpu.signal, "signal", lambda number, handler: None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    options = ["--tiny", "--stages", "step", "--revision", "abc123", "--output", str(tmp_path)]
    assert gpu.main(options) == 0
    assert "skipped: the package transformers is not installed" in (tmp_path / "summary.txt").read_text()


def test_bench__a_task_that_raises_is_a_row_and_the_next_one_runs(tmp_path, capfd):
    bench = tiny_bench(tmp_path)

    def wrong():
        raise RuntimeError("a first line\nand a second")

    tasks = [Task("one", {"a": 1}, lambda: {"b": 2}), Task("two", {"a": 3}, wrong), Task("three", {}, list)]
    tasks.append(Task("four", {"a": 4}, lambda: [{"b": 5}, {"b": 6}]))
    assert bench.run(tasks) == 1
    found = [(row["a"], row["b"], row["note"]) for row in rows_of(bench.path)]
    message = "RuntimeError: a first line"
    assert found == [("1", "2", ""), ("3", "", message), ("4", "5", ""), ("4", "6", "")]
    assert "task 3: four" in capfd.readouterr().out


def test_bench__skips_tasks_and_begins_none_when_time_is_out(tmp_path):
    tasks = [Task(str(n), {"a": n}, lambda: {"b": 0}) for n in range(4)]
    tiny_bench(tmp_path, skip=2).run(tasks)
    assert [row["a"] for row in rows_of(tmp_path / "rows.csv")] == ["2", "3"]
    tiny_bench(tmp_path, until=time.time() - 1).run(tasks)
    assert len(rows_of(tmp_path / "rows.csv")) == 2


def test_bench__says_what_it_plans_and_what_is_done(tmp_path, capsys):
    def last():
        bench.until = 0.0
        return {"b": 0}

    tasks = [Task("a", {}, last), Task("b, c", {}, last), Task("d", {}, list)]
    bench = tiny_bench(tmp_path, skip=1)
    bench.run(tasks, iter(tasks))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "plan: b, c | d" and not_reached(lines) == ["not reached, 1 of 2: d"]
    bench = tiny_bench(tmp_path)
    bench.run(tasks[2:], tasks[2:])
    assert not_reached(capsys.readouterr().out.splitlines()) == []


def test_bench__rows_survive_a_kill(tmp_path):
    script = f"""
import os, math, pathlib, torch
from benchmarks.gpu_bench import PROVENANCE, Bench, Task
bench = Bench("cpu", torch.float16, True, False, pathlib.Path({str(tmp_path)!r}) / "rows.csv",
              (*PROVENANCE, "a", "note"), math.inf)
bench.run([Task("one", {{}}, lambda: {{"a": 1}}), Task("two", {{}}, lambda: os.kill(os.getpid(), 9))])
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == -9
    (row,) = rows_of(tmp_path / "rows.csv")
    assert row["a"] == "1" and row["date"] and row["git"] and row["device"]


@pytest.mark.parametrize("kind", list(HEADS))
def test_head__tells_right_results_from_wrong_ones(tmp_path, kind):
    bench = tiny_bench(tmp_path)
    head = Head(bench, Size(40, 32, 500, peaked=kind == "softcap", head=kind))
    leaves = [head.hidden, head.weight, *([] if head.bias is None else [head.bias])]
    leaves = [leaf.double().requires_grad_() for leaf in leaves]
    bias = leaves[2] if kind == "bias" else None
    nll = reference.linear_cross_entropy(*leaves[:2], head.targets, bias, head.softcap or 0.0)
    dhidden, dweight, *dbias = torch.autograd.grad(nll, leaves, head.dnll.double())
    nll = nll.detach()
    with torch.device("meta"):  # what is made without a device would be on a GPU's host, and raises here
        right = head.errors(nll.float(), dhidden.half(), dweight.half(), *(part.half() for part in dbias))
    assert right["verdict"] == "ok" and float(right["nll_err"]) < 1e-6
    assert float(right["dX_err"]) < 4e-4 and float(right["dW_err"]) < 4e-4
    assert ("db_err" in right) == (kind == "bias")
    scaled = dweight.clone()
    scaled[head.target_classes] *= 1.01
    for wrong in (
        (nll.float() + 2e-4, None, None),
        (nll.float() * math.nan, None, None),
        (None, dhidden * 1.01, None),
        (None, None, dweight * 1.01),
        (None, None, scaled),
        *((None, None, None, part * 1.01) for part in dbias),
    ):
        assert head.errors(*wrong)["verdict"] == "RED"


@needs_triton
def test_kernels__heads_come_behind_all_plain_sizes_in_the_default_form(tmp_path, monkeypatch):
    from benchmarks import gpu_kernels

    monkeypatch.setattr(gpu_kernels, "default_form", lambda bench: "fused")
    bench = tiny_bench(tmp_path, tiny=False)
    names = [task.name for task in gpu_kernels.tasks(bench)]
    capped = [name for name in names if "softcap" in name]
    assert [name.split(": ")[1].rpartition(", ")[0] for name in capped] == list(
        gpu_kernels.MODES_OF_OTHER_HEADS
    )
    assert all("N=4096 D=4096" in name for name in capped)
    first, last = (
        names.index(capped[0]),
        max(names.index(n) for n in names if "N=16384" in n and "fused" in n),
    )
    assert last < first
    assert sum("bias" in name for name in names) == len(capped)


def test_profile_summary__counts_overlapping_kernels_once():
    found = [("a", 0.0, 10.0), ("b", 5.0, 15.0), ("a", 25.0, 30.0)]
    lines = summary(found)
    assert "0.030 ms, idle 33.3 %, 3 launches" in lines[0]
    assert [line.split()[0] for line in lines[1:]] == ["0.015", "0.010"]
    assert "saw nothing" in summary([])[0]


def test_measure_beside__takes_the_ratio_repeat_by_repeat_and_of_the_medians(tmp_path, monkeypatch):
    bench = tiny_bench(tmp_path, tiny=False)
    clock = {"unit": iter([2.0, 4.0, 2.0, 2.0, 1.0, 2.0, 2.0]), "run": iter([8.0] * 7)}

    def time_once(run, ahead):
        assert ahead is False
        return next(clock[run()]), 0.5

    monkeypatch.setattr(bench, "_time_once", time_once)
    options = {"seconds": 0.0, "ahead": False}
    found = bench.measure_beside(lambda: "run", lambda: "unit", 3, **options)
    assert set(found) == {*TIMES, *BESIDE}
    assert (found["ms_p50"], found["unit_ms"], found["reps"], found["units"]) == ("8.0000", "2.0000", 7, 3)
    assert (found["pct_of_gemm"], found["pct_p20"], found["pct_p80"]) == ("75.0", "75.0", "75.0")
    warm = tiny_bench(tmp_path, warm=True).measure_beside(lambda: None, lambda: 1 / 0, 3)
    assert set(warm.values()) == {""}


def test_sustained__divides_energy_and_time_by_the_calls(tmp_path, monkeypatch):
    millijoule = iter([5_000_000, 5_600_000])
    nvml = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=lambda uuid: uuid,
        nvmlDeviceGetTotalEnergyConsumption=lambda device: next(millijoule),
        nvmlDeviceGetClockInfo=lambda device, kind: 1500,
        NVML_CLOCK_SM=1,
        NVMLError=ZeroDivisionError,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(uuid="1-2"))
    bench = tiny_bench(tmp_path)
    monkeypatch.setattr(bench, "_repeat", lambda run, seconds, at_end=lambda: None: at_end() or 40)
    found = bench.sustained(lambda: None)
    assert (found["joule"], found["sm_mhz"], found["reps"]) == ("15.000", 1500, 40)
    assert int(found["watt"]) > 0
    nvml.nvmlDeviceGetHandleByUUID = lambda uuid: 1 / 0  # a slice of a GPU
    for note in ("division by zero", "nvidia-ml-py"):
        found = bench.sustained(lambda: None)
        assert note in found["note"] and "joule" not in found and found["reps"] == 40
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@needs_triton
def test_tiles__differ_and_name_every_shape(tmp_path):
    from benchmarks import gpu_tiles

    bench = tiny_bench(tmp_path)
    sweep, base = gpu_tiles.Sweep(bench), gpu_tiles.base_tiles(bench)
    for rows in (512, 4096, 16384):
        found = gpu_tiles.cases(base, rows)
        columns = [sweep.columns(Size(rows, 16, 150), mode, tiles) for mode, tiles in found]
        assert len({tuple(sorted(row.items())) for row in columns}) == len(found) >= 17
        assert {(row["mode"], row["provider"]) for row in columns} == {
            ("frozen head", "vrpo fused"),
            ("frozen head", "vrpo cublas"),
            ("no gradient", "vrpo fused"),
            ("sweep", "vrpo cublas"),
            ("sweep", "vrpo fused"),
        }
        assert all(set(row) <= set(gpu_tiles.FIELDS) for row in columns)
    for rows in gpu_tiles.ROWS[3:]:
        found = {(mode, tiles.stages(rows)) for mode, tiles in gpu_tiles.cases(base, rows)}
        assert found == {(mode, stages) for mode in ("no gradient", "frozen head") for stages in (3, 4)}


@pytest.mark.slow
@needs_triton
def test_gpu__the_timed_stages_run_on_a_cpu_from_end_to_end(tmp_path):
    options = ["--tiny", "--seconds", "300", "--stages", "kernels,tiles,memory", "--revision", "abc123"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--output", str(tmp_path), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:]
    assert {path.name for path in tmp_path.iterdir()} == {
        "log.txt", "summary.txt", "kernels.csv", "tiles.csv", "memory.csv", "profile.txt"
    }  # fmt: skip
    for path in tmp_path.iterdir():
        assert path.name == "log.txt" or not any(str(place) in path.read_text() for place in (ROOT, tmp_path))
    found = rows_of(tmp_path / "kernels.csv")
    assert sum(row["provider"] == "vrpo, host included" for row in found) == 5
    kernels = [row for row in found if row["provider"] == "vrpo"]
    assert sum("softcap" in row["case"] for row in kernels) == 3
    assert len(kernels) == 16 and {row["verdict"] for row in kernels} == {"ok"}
    assert {row["repeats"] for row in kernels} == {"same bits"} and {row["git"] for row in kernels} == {
        "abc123"
    }
    tiles = rows_of(tmp_path / "tiles.csv")
    assert {"sweep", "frozen head", "no gradient"} == {row["mode"] for row in tiles}
    assert not any(row["note"] for row in (*kernels, *tiles, *rows_of(tmp_path / "memory.csv")))
    assert len(rows_of(tmp_path / "memory.csv")) == 10
    assert "[digest] N=9 D=16 peaked cublas: no gradient" in done.stdout
    assert "| `mask_select`, by rank | 8 segments of 20 |" in "\n".join(tables(tmp_path))
