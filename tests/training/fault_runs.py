"""Tiny training runs that are stopped at seeded points and started again, compared with runs left alone.

Run by test_faults.py in a process of its own, which imports everything once and forks for each run:
`python fault_runs.py OUT --kills 200 --seed 0` prints a JSON report on its last line. The command line of
every start is the same, with resume_from_checkpoint="auto".
"""

import argparse
import importlib.metadata
import json
import logging
import random
import shutil
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from datasets import disable_progress_bars
from fault_kinds import COMMON, KINDS, Run, differing
from fault_stops import ENDS, KILLS, NO_ROOM, PHASES, PLACES, Stop, draw, prepare_to_fork, start
from transformers.utils import logging as transformers_logging

from vrpo.training import report as training_report
from vrpo.training.checkpoints import checkpoints, fault_of, step_of


def straight_run(run: Run, folder: Path) -> dict[str, Any]:
    """The end of a run that nothing stops; what was seen in it, and in one that finds it finished."""
    began = time.perf_counter()
    code, result = start(run.train, folder, None)
    assert code == 0, (folder / "output.txt").read_text()[-3000:]
    straight = torch.load(result, weights_only=False)
    straight["seconds"] = time.perf_counter() - began
    code, result = start(run.train, folder, None)
    assert code == 0, (folder / "output.txt").read_text()[-3000:]
    again = torch.load(result, weights_only=False)
    seen = straight["seen"] | again.pop("seen")
    assert not (found := differing({name: straight[name] for name in again}, again)), found
    return straight | {"seen": seen}


def chain(run: Run, folder: Path, straight: dict, random_numbers: random.Random, report: dict) -> None:
    """Starts a run, stops it, starts it again ... at most six times, and then to its end."""
    stops: list[Stop] = []
    while True:
        done = checkpoints(folder / "out")
        left = 1 - step_of(done[0]) / COMMON["max_steps"] if done else 1.0
        stop = None
        if len(stops) < 6:
            stop = draw(random_numbers, straight["seen"], straight["seconds"], left, len(stops))
        code, result = start(run.train, folder, stop)
        broken = [
            f"{path.name} {fault}"
            for path in checkpoints(folder / "out")
            if (fault := fault_of(path, is_plain=True))
        ]
        for path in folder.glob("out/reference_elbos/**/*.arrow"):
            if path.read_bytes() != straight["saved"][str(path.relative_to(folder / "out"))]:
                broken.append(f"{path.name} is not the straight run's")
        if broken:
            report["failures"].append(f"{run.kind} {[*stops, stop]}: visible, but {broken}")
        if code == 0:
            break
        if code not in ENDS or (code == NO_ROOM and stop.place != "full"):
            text = (folder / "output.txt").read_text()[-1500:]
            report["failures"].append(f"{run.kind} {[*stops, stop]}: exit code {code}: {text}")
            return
        stops.append(stop)
        report["stops"][stop.place] += 1
        if stop.place in KILLS:
            report["kills"][run.kind] += 1
            report["phases"]["time" if stop.place == "time" else stop.phase] += 1
    end = torch.load(result, weights_only=False)
    expected = {name: straight[name] for name in end if name != "seen"}
    if found := differing(expected, {name: end[name] for name in expected}):
        report["failures"].append(f"{run.kind} {stops}: another end than the straight run's: {found[:9]}")
    report["chains"] += 1


def _make_children_quick() -> None:
    logging.disable(logging.INFO)
    # The model card lists the versions of what is installed: half of a child's time goes into that.
    importlib.metadata.distributions = lambda: []
    training_report._figure = lambda panels: b""  # drawing takes longer than training


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS))
    options = parser.parse_args()
    _make_children_quick()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    began = time.perf_counter()
    runs = {kind: Run(kind, options.output / "unused") for kind in options.kinds}
    # Trainers import some things late: here once for all children.
    Run("lora", options.output / "unused").train(options.output / "first", [])
    prepare_to_fork()
    straights: dict[str, dict] = {}
    for kind, run in runs.items():
        (options.output / kind).mkdir()
        straights[kind] = straight_run(run, options.output / kind)
    report: dict[str, Any] = {
        "stops": dict.fromkeys(PLACES, 0),
        "kills": dict.fromkeys(runs, 0),
        "phases": Counter(dict.fromkeys((*PHASES, "time"), 0)),
        "chains": 0,
        "failures": [],
        "straight": {kind: straight["seconds"] for kind, straight in straights.items()},
        "before": time.perf_counter() - began,
    }
    number = 0
    while sum(report["kills"].values()) < options.kills and len(report["failures"]) < 6:
        kind = options.kinds[number % len(runs)]
        folder = options.output / f"{kind}-{number}"
        folder.mkdir()
        chain(runs[kind], folder, straights[kind], random.Random(f"{options.seed} {number}"), report)
        shutil.rmtree(folder)
        number += 1
    report["seconds"] = time.perf_counter() - began
    print(json.dumps(report))


if __name__ == "__main__":
    main()
