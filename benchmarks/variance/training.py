"""Does a design with less variance train better? Same start, pairs and steps; only the mask draw differs.

Every seed has a model of its own, trained from random weights, and one order of the pairs for all draws, so
differences are paired. Held-out pairs are scored with 16 samples, the same masks for all.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from benchmarks.record import RESULTS, provenance
from benchmarks.variance.measure import BETA
from benchmarks.variance.models import TASKS, settings
from benchmarks.variance.run import append_rows, load_pairs, read_rows, train
from vrpo import VRPOConfig, VRPOTrainer
from vrpo.evaluation import variance
from vrpo.evaluation.variance import Scheme
from vrpo.models import load_model, load_tokenizer
from vrpo.objectives import preference

FILE = RESULTS / "variance_outcome.jsonl"
HELD_OUT = Scheme("graded-balanced", 16, pair_masks="positions")

ARMS = {
    "paper, K = 4": Scheme("paper", 4),
    "paper, K = 8": Scheme("paper", 8),
    "balanced, positions, K = 4": Scheme("balanced", 4, pair_masks="positions"),
    "graded-balanced, positions, K = 4": Scheme("graded-balanced", 4, pair_masks="positions"),
}

OURS = "graded-balanced, positions, K = 4"
LEARNING_RATE = {"arithmetic": 5e-4, "carrying": 1e-4}


def held_out(policy: nn.Module, reference: nn.Module, folder: Path, num_pairs: int) -> dict[str, float]:
    """Loss, accuracy and margin of the score on held-out pairs."""
    batch, mask_token_id = load_pairs(folder, num_pairs)
    sampled = variance.sample(
        policy.eval(),
        reference,
        batch,
        HELD_OUT,
        mask_token_id=mask_token_id,
        beta=BETA,
        num_repeats=1,
        seed=99,
    )
    score_B = sampled.score_BQ[:, 0]
    return {
        "loss": float(preference.dpo_loss(score_B).mean()),
        "accuracy": float((score_B > 0).double().mean()),
        "margin": float(score_B.mean()),
    }


def trained(task: str, number: int, scheme: Scheme, args: argparse.Namespace) -> dict:
    """Train from the task's reference for args.steps steps of 8 pairs, and score the held-out pairs."""
    folder = args.folder / f"{task}-{number}"
    _, pairs, _ = TASKS[task].rows(args.data)
    with tempfile.TemporaryDirectory() as out:
        trainer = VRPOTrainer(
            load_model(str(folder / "reference")),
            args=VRPOConfig(
                **settings(Path(out), number, TASKS[task].max_length),
                beta=BETA,
                mask_design=scheme.design,
                pair_masks=scheme.pair_masks,
                num_samples=scheme.num_samples,
                num_replicates=1,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=1,
                learning_rate=LEARNING_RATE[task],
                lr_scheduler_type="constant_with_warmup",
                max_steps=args.steps,
            ),
            train_dataset=pairs,
            processing_class=load_tokenizer(str(folder / "reference")),
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    found = held_out(trainer.model, trainer.ref_model, folder, args.pairs)
    return {name: round(value, 5) for name, value in found.items()} | {"seconds": round(seconds, 1)}


def run(args: argparse.Namespace) -> int:
    """Runs that the file has are not made again."""
    torch.set_num_threads(args.threads)
    known = {(row["task"], row["model"], row["arm"], row["steps"]) for row in read_rows(FILE)}
    for number in args.models:
        for task in args.tasks:
            for arm, scheme in ARMS.items():
                name = {"task": task, "model": number, "arm": arm, "steps": args.steps}
                if tuple(name.values()) in known:
                    continue
                train(args.folder / f"{task}-{number}", task, number, args.data, "cpu")
                row = provenance("cpu") | name | trained(task, number, scheme, args)
                append_rows(FILE, [row])
                print(row, flush=True)
    return 0


def paired_table(rows: list[dict]) -> str:
    """Held-out loss by arm; paired differences of ours to the others, with a 95 % interval over seeds."""
    lines = ["| | " + " | ".join(ARMS) + " |", "|---" * (len(ARMS) + 1) + "|"]
    told = {(row["task"], row["steps"], row["arm"], row["model"]): row for row in rows}
    for task, steps in sorted({name[:2] for name in told}):
        every = {name[3] for name in told if name[:2] == (task, steps)}
        seeds = [s for s in sorted(every) if all((task, steps, arm, s) in told for arm in ARMS)]
        if len(seeds) < 2:
            continue
        loss, right = (
            {arm: np.array([told[task, steps, arm, seed][name] for seed in seeds]) for arm in ARMS}
            for name in ("loss", "accuracy")
        )
        of = f"{task}, {steps} steps, mean of {len(seeds)}"
        lines.append(line(f"{of}: held-out loss", [f"{loss[arm].mean():.3f}" for arm in ARMS]))
        lines.append(line("reward accuracy", [f"{right[arm].mean():.3f}" for arm in ARMS]))
        lines.append(line("our loss minus it, paired", [paired(loss[OURS] - loss[arm]) for arm in ARMS]))
    return "\n".join(lines)


def line(name: str, cells: list[str]) -> str:
    return f"| {name} | " + " | ".join(cells) + " |"


def paired(difference: np.ndarray) -> str:
    """Mean of paired differences, its 95 % interval and how many are below 0."""
    if not difference.any():
        return "-"
    number, mean = len(difference), difference.mean()
    half = STUDENT[min(number, 10)] * difference.std(ddof=1) / number**0.5
    wins = int((difference < 0).sum())
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}], lower in {wins} of {number}"


STUDENT = {2: 12.71, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}
"""97.5 % point of Student's t by the number of values; of more than 10 that of 10, which is cautious."""
