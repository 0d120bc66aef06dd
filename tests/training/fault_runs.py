"""Tiny training runs that are killed at seeded points and started again, compared with runs left alone.

Run by test_faults.py in a process of its own, which imports everything once and forks for each run:
`python fault_runs.py OUT --kills 200 --seed 0` prints a JSON report. The command line of every start is the
same, with resume_from_checkpoint="auto".

A kill is SIGKILL at the n-th file-system call on the run's folder, in the middle of the n-th file that is
written (which is then cut at a byte), at the n-th event of the training loop, or after some milliseconds;
some stops are a SIGTERM at an event instead.
"""

import argparse
import dataclasses
import gc
import importlib.metadata
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from datasets import Dataset, disable_progress_bars
from peft import LoraConfig
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model
from vrpo.training import report as training_report
from vrpo.training.checkpoints import checkpoints, fault_of

PAIRS = [
    {"prompt": f"{n}?", "chosen": "one " * (1 + n % 3), "rejected": f"two {n}", "completion": f" {2 * n}."}
    for n in range(10)
]
KINDS = ("sft", "vrpo", "lora")
# Killed; SIGTERM in training; SIGTERM while the trainer is built, when there is nothing to save.
ENDS = (-signal.SIGKILL, 128 + signal.SIGTERM, -signal.SIGTERM)
# Where the stops of a chain are, and how often. Most fall into the writing of a checkpoint.
PLACES = {"call": 8, "file": 7, "event": 3, "time": 2, "SIGTERM": 3}


@dataclasses.dataclass(frozen=True)
class Stop:
    """Where a run is stopped: at the count-th occurrence, in a file at this fraction of its bytes."""

    place: str
    count: int = 0
    fraction: float = 0.0
    seconds: float = 0.0


class Run:
    """One kind of training: how its trainer is made, from the same start every time."""

    def __init__(self, kind: str):
        self.kind = kind
        texts = [text for row in PAIRS for text in row.values()]
        self.tokenizer = train_tokenizer(texts, vocab_size=300)
        self.rows = Dataset.from_list(PAIRS)
        trainer = self.trainer("unused", [])
        self.rows, self.evaluation = trainer.train_dataset, trainer.eval_dataset  # tokenised once

    def trainer(self, output_dir: str, callbacks: list[TrainerCallback]) -> VRPOTrainer | DiffusionSFTTrainer:
        is_sft, is_lora = self.kind == "sft", self.kind == "lora"
        fields: dict[str, Any] = {
            "output_dir": output_dir,
            "num_samples": 2,
            "max_length": 32,
            "learning_rate": 1e-2,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
            "max_steps": 7,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "logging_steps": 4,  # not a multiple of what is saved: sums are carried over
            "save_strategy": "steps",
            "save_steps": 2,
            "save_total_limit": 2,
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "resume_from_checkpoint": "auto",
        }
        if self.kind == "vrpo":
            fields |= {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
            fields |= {"save_total_limit": 1, "max_tokens_per_pack": 120}
        if is_lora:
            # An epoch is three steps: the evaluation at its end and every second checkpoint meet.
            fields |= {"eval_strategy": "epoch", "disable_dropout": False, "save_steps": 3}
        model = create_model(self.tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.2, seed=3)
        lora = LoraConfig(r=2, lora_dropout=0.5, target_modules=["q_proj", "v_proj"]) if is_lora else None
        trainer_class = DiffusionSFTTrainer if is_sft else VRPOTrainer
        evaluation = getattr(self, "evaluation", self.rows.select(range(4)))
        return trainer_class(
            model,
            args=(DiffusionSFTConfig if is_sft else VRPOConfig)(**fields),
            train_dataset=self.rows,
            eval_dataset=None if is_sft else evaluation,
            processing_class=self.tokenizer,
            peft_config=lora,
            callbacks=callbacks,
        )

    def train(self, output_dir: Path, callbacks: list[TrainerCallback]) -> dict[str, Any]:
        """The curve and the weights at the end, in memory and in the saved file."""
        trainer = self.trainer(str(output_dir), callbacks)
        trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
        trainer.save_model(str(output_dir))
        saved = output_dir / ("adapter_model.safetensors" if self.kind == "lora" else "model.safetensors")
        weights = {name: weight.detach().clone() for name, weight in trainer.model.state_dict().items()}
        return {"log": curve(trainer), "weights": weights, "saved": saved.read_bytes()}


def curve(trainer) -> list[dict[str, float]]:
    """What was logged at steps, without what was measured of the process: times and memory.

    The summary of one call of train() is not of the run.
    """
    measured = ("runtime", "per_second", "peak_memory_gb")
    return [
        {key: value for key, value in entry.items() if not key.endswith(measured)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


class Counter(TrainerCallback):
    """Counts what a stop can be placed at, and stops there. One for each child."""

    def __init__(self, stop: Stop | None, folder: Path):
        self.stop, self.folder = stop, str(folder)
        self.seen = {"call": 0, "file": 0, "event": 0}

    def watch(self) -> None:
        sys.addaudithook(self._hook)
        torch.save = self._cut(torch.save, of=lambda args, kwargs: args[1])
        safetensors.torch.serialize_file = self._cut(
            safetensors.torch.serialize_file, of=lambda args, kwargs: args[1]
        )
        Path.write_text = self._cut(Path.write_text, of=lambda args, kwargs: args[0])
        for name in dir(TrainerCallback):
            if name.startswith("on_"):
                setattr(self, name, self._event)

    def _is_at(self, place: str) -> bool:
        self.seen[place] += 1
        if self.stop is None or self.seen[place] != self.stop.count:
            return False
        return place == ("event" if self.stop.place == "SIGTERM" else self.stop.place)

    def _hook(self, event: str, args: tuple) -> None:
        if event == "open" or event.startswith(("os.", "shutil.")):
            path = args[0] if args else None
            is_ours = isinstance(path, str | bytes | Path) and os.fsdecode(path).startswith(self.folder)
            if is_ours and self._is_at("call"):
                os.kill(os.getpid(), signal.SIGKILL)

    def _cut(self, write, of):
        def cut(*args, **kwargs):
            result = write(*args, **kwargs)
            path = of(args, kwargs)
            if isinstance(path, str | Path) and str(path).startswith(self.folder) and self._is_at("file"):
                os.truncate(path, int(os.path.getsize(path) * self.stop.fraction))
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return cut

    def _event(self, args, state, control, **kwargs) -> None:
        if self._is_at("event"):
            os.kill(os.getpid(), signal.SIGTERM if self.stop.place == "SIGTERM" else signal.SIGKILL)


def start(run: Run, folder: Path, stop: Stop | None) -> tuple[int, Path]:
    """Forks a child that trains in folder/out; (its exit status as `wait` gives it, where its result is)."""
    result = folder / "result.pt"
    child = os.fork()
    if child == 0:
        os._exit(_child(run, folder, stop, result))
    if stop is not None and stop.place == "time":
        time.sleep(stop.seconds)
        os.kill(child, signal.SIGKILL)  # not reaped yet: the number is still the child's
    return os.waitpid(child, 0)[1], result


def _child(run: Run, folder: Path, stop: Stop | None, result: Path) -> int:
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        counter = Counter(stop, folder / "out")
        save = torch.save
        counter.watch()
        end = run.train(folder / "out", [counter])
        save(end | {"seen": counter.seen}, result)
        return 0
    except SystemExit as error:
        return error.code
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        return 1


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    weights = [(left["weights"][name], right["weights"].get(name)) for name in left["weights"]]
    return (
        left["log"] == right["log"]
        and left["saved"] == right["saved"]
        and left["weights"].keys() == right["weights"].keys()
        and all(torch.equal(one, other) for one, other in weights)
    )


def draw(random_numbers: random.Random, seen: dict[str, int], seconds: float) -> Stop:
    place = random_numbers.choices(list(PLACES), weights=list(PLACES.values()))[0]
    # Up to half of a whole run's: a chain is then about four stops long, and gets to the end by steps.
    most = seen.get("event" if place == "SIGTERM" else place, 2)
    count = random_numbers.randint(1, most // 2)
    return Stop(place, count, random_numbers.random(), random_numbers.uniform(0, seconds / 2))


def chain(
    run: Run, folder: Path, straight: dict[str, Any], random_numbers: random.Random, report: dict
) -> None:
    """Starts a run, stops it, starts it again ... at most five times, and then to its end."""
    stops: list[Stop] = []
    while True:
        stop = draw(random_numbers, straight["seen"], straight["seconds"]) if len(stops) < 5 else None
        status, result = start(run, folder, stop)
        broken = [
            f"{path.name} {fault}"
            for path in checkpoints(folder / "out")
            if (fault := fault_of(path, is_plain=True))
        ]
        if broken:
            report["failures"].append(f"{run.kind} {[*stops, stop]}: visible, but {broken}")
        code = os.waitstatus_to_exitcode(status)
        if code == 0:
            break
        if code not in ENDS:
            text = (folder / "output.txt").read_text()[-1500:]
            report["failures"].append(f"{run.kind} {[*stops, stop]}: exit code {code}: {text}")
            return
        stops.append(stop)
        report["stops"][stop.place] += 1
    if not same(torch.load(result), straight):
        report["failures"].append(f"{run.kind} {stops}: another end than the straight run's")
    report["chains"] += 1


def straight_run(run: Run, folder: Path) -> dict[str, Any]:
    began = time.perf_counter()
    status, result = start(run, folder, None)
    assert status == 0, (folder / "output.txt").read_text()[-3000:]
    return torch.load(result) | {"seconds": time.perf_counter() - began}


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
    options = parser.parse_args()
    _make_children_quick()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    began = time.perf_counter()
    report: dict[str, Any] = {"stops": dict.fromkeys(PLACES, 0), "chains": 0, "failures": [], "straight": {}}
    runs, straights = {}, {}
    for kind in KINDS:
        runs[kind] = Run(kind)
        folder = options.output / kind
        folder.mkdir()
        gc.freeze()
        straights[kind] = straight_run(runs[kind], folder)
        report["straight"][kind] = straights[kind]["seen"] | {"seconds": straights[kind]["seconds"]}
    gc.freeze()  # the collections of a child are of its own objects
    number = 0
    while sum(report["stops"].values()) - report["stops"]["SIGTERM"] < options.kills:
        kind = KINDS[number % len(KINDS)]
        folder = options.output / f"{kind}-{number}"
        folder.mkdir()
        chain(runs[kind], folder, straights[kind], random.Random(f"{options.seed} {number}"), report)
        shutil.rmtree(folder)
        number += 1
        if len(report["failures"]) > 5:
            break
    report["seconds"] = time.perf_counter() - began
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
