"""Runs of two processes by DDP and FSDP2 that are stopped and started again, compared with runs left alone.

Run by test_faults.py: `python fault_two_processes.py OUT --kills 8 --seed 0` prints a JSON report on its last
line. All is imported once, and each process is a fork. FSDP2 keeps its checkpoints in shards
(torch.distributed.checkpoint). A stop is in one of the two processes or in both; the other one then fails at
its next collective, or is killed as a launcher would.
"""

import argparse
import functools
import json
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import engines
import torch
from datasets import Dataset, disable_progress_bars
from fault_kinds import curve, differing
from fault_stops import HANGS, LONGEST, Stop, Watch, draw, fork, prepare_to_fork
from forked import free_port
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from vrpo import VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model
from vrpo.training.checkpoints import checkpoints, fault_of, step_of

ROWS = [{"prompt": f"{n}?", "chosen": "one " * (1 + n % 7), "rejected": f"two {n}"} for n in range(8)]
MAX_STEPS = 6
GRACE = 3.0  # seconds that the process which is left has to notice


class TermAtStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def build(engine: str, output_dir: Path, callbacks: list[TrainerCallback]) -> VRPOTrainer:
    arguments = engines.use(engine, **({} if engine == "ddp" else {"state_dict_type": "SHARDED_STATE_DICT"}))
    tokenizer = train_tokenizer([text for row in ROWS for text in row.values()], vocab_size=300)
    return VRPOTrainer(
        create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.2, seed=3),
        args=VRPOConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            max_steps=MAX_STEPS,
            save_steps=2,
            save_total_limit=2,
            logging_steps=5,
            num_samples=2,
            learning_rate=1e-2,
            warmup_steps=0,
            report_to="none",
            training_report=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            bf16=False,
            **arguments,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def local(value: Any) -> Any:
    """This process's parts of the tensors in it."""
    if isinstance(value, dict):
        return {name: local(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [local(part) for part in value]
    return value.to_local() if isinstance(value, DTensor) else value


def train(engine: str, folder: Path, rank: int, port: int, stop: Stop | str | None) -> None:
    """What each process does; its end is saved beside the run's folder."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    save = torch.save
    watch = Watch(stop if isinstance(stop, Stop) else None, folder / "out")
    watch.begin()
    trainer = build(engine, folder / "out", [watch])
    if stop == "term":
        trainer.add_callback(TermAtStep())

    def save_or_die(*args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **kwargs)

    if stop == "kill":
        torch.save = save_or_die
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(str(folder / "out"))
    end = {
        "weights": local(trainer.model.state_dict()),
        "optimizer": local(trainer.optimizer.state_dict()),
        "log": curve(trainer) if rank == 0 else None,
        "saved": (folder / "out/model.safetensors").read_bytes() if rank == 0 else None,
    }
    save(end | {"seen": watch.seen}, folder / f"end-{rank}.pt")
    trainer.accelerator.wait_for_everyone()


def start(engine: str, folder: Path, stops: dict[int, Stop | str]) -> list[int]:
    """The exit codes of two processes, negative for a signal; one that is left goes after GRACE seconds."""
    port, running = free_port(), {}
    for rank in range(2):
        work = functools.partial(train, engine, folder, rank, port, stops.get(rank))
        running[fork(work, folder / f"said-{rank}")] = rank
    codes, until = [HANGS, HANGS], time.monotonic() + LONGEST
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            rank = running.pop(pid)
            codes[rank] = os.waitstatus_to_exitcode(status)
            if codes[rank]:
                until = min(until, time.monotonic() + GRACE)
        elif time.monotonic() > until:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
            until = float("inf")
        else:
            time.sleep(0.005)
    return codes


def said(folder: Path) -> str:
    return "".join((folder / f"said-{rank}").read_text()[-1500:] for rank in range(2))


def ends(folder: Path) -> list[dict]:
    return [torch.load(folder / f"end-{rank}.pt", weights_only=False) for rank in range(2)]


def without_seen(found: list[dict]) -> list[dict]:
    return [{name: value for name, value in end.items() if name != "seen"} for end in found]


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder / "out")]


def seen_of(found: list[dict], rank: int) -> Counter:
    """What a stop can be placed at; processes start too unevenly for one after a time."""
    return Counter({key: count for key, count in found[rank]["seen"].items() if key[1] in PHASES})


PHASES = ("checkpoint", "deletion", "model", "step")


def chain(engine: str, folder: Path, straight: list[dict], numbers: random.Random, report: dict) -> None:
    """Starts a run, kills it, starts it again ... at most four times, and then to its end."""
    told: list[dict] = []
    while True:
        done = checkpoints(folder / "out")
        left = 1 - step_of(done[0]) / MAX_STEPS if done else 1.0
        stops: dict[int, Stop | str] = {}
        # A run that finds itself finished writes its model in the first process only.
        choice = numbers.choice([[0], [1], [0, 1]]) if left else [0]
        for rank in choice if len(told) < 4 else []:
            seen = seen_of(straight, rank)
            while (stop := draw(numbers, seen, 1.0, left, 9)).place not in ("call", "file", "event"):
                pass
            stops[rank] = stop
        codes = start(engine, folder, stops)
        told.append(stops)
        is_fsdp = engine != "ddp"
        broken = [
            f"{path.name} {fault}"
            for path in checkpoints(folder / "out")
            if (fault := fault_of(path, is_plain=None if is_fsdp else True))
        ]
        if broken:
            report["failures"].append(f"{engine} {told}: visible, but {broken}")
        if codes == [0, 0]:
            break
        killed = [rank for rank in stops if codes[rank] == -signal.SIGKILL]
        if not killed or HANGS in codes:
            report["failures"].append(f"{engine} {told}: exit codes {codes}: {said(folder)}")
            return
        report["kills"][engine] += 1
        report["phases"][stops[killed[0]].phase] += 1
    if found := differing(without_seen(straight), without_seen(ends(folder))):
        report["failures"].append(f"{engine} {told}: another end than the straight run's: {found[:9]}")


def stopped(folder: Path, straight: list[dict], report: dict) -> None:
    """One of two is told to stop, and at the next start killed while it writes a checkpoint."""
    for stop, code in (("term", 128 + signal.SIGTERM), ("kill", -signal.SIGKILL)):
        codes = start("ddp", folder, {1: stop})
        is_right = codes[1] == code and (stop == "kill" or codes[0] == code) and codes[0] != 0
        if not is_right or names(folder) != ["checkpoint-3", "checkpoint-2"]:
            report["failures"].append(f"{stop}: exit codes {codes}, {names(folder)}: {said(folder)}")
    codes = start("ddp", folder, {})
    found = differing(without_seen(straight), without_seen(ends(folder))) if codes == [0, 0] else codes
    if found:
        report["failures"].append(f"stopped, then killed: {found}: {said(folder)}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=Path)
    parser.add_argument("--kills", type=int, default=8, help="of each engine")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    disable_progress_bars()
    prepare_to_fork()
    began = time.perf_counter()
    report: dict[str, Any] = {"kills": Counter(ddp=0, fsdp2=0), "phases": Counter(), "failures": []}
    for engine in ("ddp", "fsdp2"):
        folder = options.output / engine
        folder.mkdir()
        codes = start(engine, folder, {})
        assert codes == [0, 0], (codes, said(folder))
        straight = ends(folder)
        if engine == "ddp":
            (options.output / "stopped").mkdir()
            stopped(options.output / "stopped", straight, report)
        number = 0
        while report["kills"][engine] < options.kills and len(report["failures"]) < 4:
            folder = options.output / f"{engine}-{number}"
            folder.mkdir()
            chain(engine, folder, straight, random.Random(f"{options.seed} {number} {engine}"), report)
            shutil.rmtree(folder)
            number += 1
    report["seconds"] = time.perf_counter() - began
    print(json.dumps(report))


if __name__ == "__main__":
    main()
