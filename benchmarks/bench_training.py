"""Does a design with less variance train better? Same model, pairs, K and steps; only the mask draw differs.

    python benchmarks/bench_training.py runs/variance/arithmetic --seeds 1 2 3

Needs a model directory of benchmarks/variance_models.py. Scores the held-out pairs with 16 forwards of the
default design, the same masks for all, and appends rows to benchmarks/results/variance_training.jsonl.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch
from bench_variance import RESULTS, stamp
from datasets import load_dataset
from variance_models import TASKS, common

from vrpo import VRPOTrainer, data
from vrpo.evaluation import variance
from vrpo.evaluation.variance import Scheme
from vrpo.models import load_model, load_tokenizer
from vrpo.objectives import preference
from vrpo.training.config import VRPOConfig

DRAWS = {
    "paper": ("paper", "independent"),
    "balanced": ("balanced", "independent"),
    "balanced-positions": ("balanced", "positions"),
    "ratio-positions": ("ratio", "positions"),
}


def held_out(policy, reference, tokenizer, args) -> dict[str, float]:
    """Margin, accuracy and loss on the held-out pairs at a low-variance score."""
    rows = load_dataset("json", data_files=str(args.models / "pairs.jsonl"), split="train")
    prepared, _ = data.prepare_pairs(
        rows.select(range(args.pairs)),
        tokenizer,
        max_length=TASKS[args.models.name].max_length,
        max_prompt_length=TASKS[args.models.name].max_length // 4,
        vocab_size=reference.config.vocab_size,
    )
    sampled = variance.sample(
        policy.eval(),
        reference,
        data.PairCollator()(list(prepared))["responses"],
        Scheme("balanced", 16, pair_masks="positions"),
        mask_token_id=reference.config.mask_token_id,
        beta=args.beta,
        num_repeats=1,
        seed=99,
    )
    score_B = sampled.score_BQ[:, 0]
    return {
        "accuracy": float((score_B > 0).double().mean()),
        "margin": float(score_B.mean()),
        "margin_error": float(score_B.std() / len(score_B) ** 0.5),
        "loss": float(preference.dpo_loss(score_B).mean()),
    }


def train(name: str, seed: int, args: argparse.Namespace) -> dict:
    task = TASKS[args.models.name]
    _, pairs, _ = task.rows(args.data)
    design, pair_masks = DRAWS[name]
    tokenizer = load_tokenizer(str(args.models / "reference"))
    with tempfile.TemporaryDirectory() as out:
        settings = common(Path(out), task.max_length) | {"seed": seed}
        trainer = VRPOTrainer(
            load_model(str(args.models / "reference")),
            args=VRPOConfig(
                **settings,
                beta=args.beta,
                mask_design=design,
                pair_masks=pair_masks,
                num_samples=args.num_samples,
                per_device_train_batch_size=8,
                gradient_accumulation_steps=1,
                learning_rate=args.learning_rate,
                lr_scheduler_type="constant_with_warmup",
                max_steps=args.steps,
            ),
            train_dataset=pairs,
            processing_class=tokenizer,
        )
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
    outcome = held_out(trainer.model, trainer.ref_model, tokenizer, args)
    return (
        {"design": name, "num_samples": args.num_samples, "steps": args.steps}
        | outcome
        | {"training_seconds": round(seconds, 1)}
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", type=Path)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--designs", nargs="+", choices=DRAWS, default=list(DRAWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--num-samples", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=0.2)
    parser.add_argument("--pairs", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    args.dtype = "float32"
    torch.set_num_threads(args.threads)
    RESULTS.mkdir(exist_ok=True)
    for seed in args.seeds:
        args.seed = seed
        for design in args.designs:
            row = stamp(args, "trained") | train(design, seed, args)
            with (RESULTS / "variance_training.jsonl").open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
