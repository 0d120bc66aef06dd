"""`python -m benchmarks memory`: what it measures, its gate, and what was committed."""

import csv

import pytest
import torch

from benchmarks import bench_memory
from benchmarks.memory_steps import SIZES, Training, make_packs, peak_of_tensors


def test_peak_of_tensors__counts_what_lives_at_once():
    def run():
        first = torch.zeros(1000)
        second = first * 2
        del first
        return second, torch.zeros(1000)

    assert 8000 <= peak_of_tensors(run, "cpu") < 9000


def training(weights="full", checkpointing=False):
    return Training(SIZES["tiny"], "cpu", torch.float32, weights=weights, checkpointing=checkpointing)


@pytest.mark.parametrize("weights", bench_memory.WEIGHTS)
def test_training__every_mode_has_the_joint_gradient(weights):
    model, packs = training(weights), make_packs(SIZES["tiny"], 3)
    assert len(packs.cut) == 3
    for mode in bench_memory.MODES[1:]:
        assert model.gradient_error(mode, packs) < 1e-5


def test_training__gate_sees_a_wrong_gradient(monkeypatch):
    model, packs = training(), make_packs(SIZES["tiny"], 2)
    step = model.step

    def off(mode, packs):
        step(mode, packs)
        if mode == "replay":
            model.trained()[3].grad.mul_(1.1)

    monkeypatch.setattr(model, "step", off)
    assert model.gradient_error("replay", packs) > 1e-3


def test_bench__writes_rows_that_can_be_drawn(tmp_path):
    output = tmp_path / "memory.csv"
    flags = ["--size", "tiny", "--samples", "2", "4", "--repeats", "0", "--output", str(output)]
    args = bench_memory.parse(flags)
    bench = bench_memory.Bench(args)
    case = {"weights": "full", "checkpointing": False}
    model = bench.open("tiny", case)
    for num_samples in args.samples:
        for mode in ("joint", "replay"):
            bench.memory(model, "tiny", case, num_samples, mode)
    peak = {(row["mode"], row["K"]): float(row["peak_MiB"]) for row in bench_memory.read(output, "memory")}
    assert peak["joint", "4"] > 1.3 * peak["joint", "2"]
    assert peak["replay", "4"] < 1.05 * peak["replay", "2"]
    lines = bench_memory.draw(output).axes[0].get_lines()
    drawn = {line.get_label(): list(line.get_ydata()) for line in lines}
    assert drawn["full, replay"] == [peak["replay", "2"], peak["replay", "4"]]
    with pytest.raises(ValueError, match="no rows of 'time'"):
        bench_memory.read(output, "time")


def committed(what):
    with bench_memory.OUTPUT.open(newline="") as stream:
        return [row for row in csv.DictReader(stream) if row["what"] == what]


@pytest.mark.parametrize("checkpointing", ["False", "True"])
@pytest.mark.parametrize("weights", bench_memory.WEIGHTS)
def test_results__replay_is_flat_and_joint_is_not(weights, checkpointing):
    case = {"weights": weights, "checkpointing": checkpointing}
    rows = [row for row in committed("memory") if case.items() <= row.items() and int(row["K"]) >= 2]
    peaks = {mode: [float(r["peak_MiB"]) for r in rows if r["mode"] == mode] for mode in ("joint", "replay")}
    assert len(peaks["replay"]) == 6
    assert max(peaks["replay"]) <= 1.05 * min(peaks["replay"])
    assert peaks["joint"][-1] > 15 * peaks["joint"][0]
