"""Train the small models on which the estimators are compared: a reference and policies at three drifts.

    python -m benchmarks.variance.models arithmetic --seed 1 --out runs/variance/arithmetic-1
    python -m benchmarks.variance.models gsm8k-long --seed 1 --out runs/variance/gsm8k-long-1 \
        --start runs/variance/gsm8k-1/reference

GSM8K comes from `--data` (default ../shared/data/gsm8k). Writes <out>/reference (masked-diffusion SFT) and,
on the way to it, <out>/random (0 steps) and <out>/sft-early (a tenth of them); <out>/small, <out>/early and
<out>/late (VRPO checkpoints), <out>/pairs.jsonl (held-out pairs) and <out>/training.json (what was done, and
how long it took). Lengths of training are steps, so that another machine makes like models. `--seed` moves
weights, order of the data and masks.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import TrainerCallback, set_seed

from benchmarks.record import provenance
from examples.arithmetic import all_problems, write_corpus
from vrpo import DiffusionSFTTrainer, VRPOTrainer
from vrpo.commands.new_model import NewModel, build_model, train_tokenizer
from vrpo.models import load_model, load_tokenizer
from vrpo.training.config import DiffusionSFTConfig, VRPOConfig


def gsm8k(data: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Completions, training pairs and held-out pairs of GSM8K text."""
    names = ("sft.jsonl", "preferences_train.jsonl", "preferences_test.jsonl")
    missing = [name for name in names if not (data / name).exists()]
    if missing:
        raise SystemExit(f"skipped: {data} lacks {', '.join(missing)}")
    return tuple(load_dataset("json", data_files=str(data / name), split="train") for name in names)


def arithmetic(_: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Sums written out term by term; the rejected answer makes one wrong step and goes on from it."""

    def row(index: int) -> dict[str, str]:
        # An odd multiplier permutes the 10**6 six-digit numbers: no row occurs twice.
        digits = [int(d) for d in f"{(index * 387_413 + 271_828) % 10**6:06d}"]
        right, wrong, slip = [], [], index % 4 + 1
        for step in range(1, 6):
            right.append(sum(digits[: step + 1]))
            wrong.append(right[-1] + (1 + index % 3 if step >= slip else 0))

        def text(partials: list[int]) -> str:
            before = [digits[0], *partials]
            steps = [f"{before[i]}+{digits[i + 1]}={partials[i]}" for i in range(5)]
            return "; ".join(steps) + f". A: {partials[-1]}"

        return {"prompt": "+".join(map(str, digits)), "chosen": text(right), "rejected": text(wrong)}

    rows = [row(index) for index in range(12_000)]
    completions = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in rows[:8_000]]
    # Both ways of answering must be in the model, or preference training has nothing to move.
    completions += [{"prompt": r["prompt"], "completion": r["rejected"]} for r in rows[8_000:10_000]]
    return tuple(map(Dataset.from_list, (completions, rows[10_000:11_600], rows[11_600:11_800])))


def gsm8k_long(data: Path) -> tuple[Dataset, Dataset, Dataset]:
    """Five GSM8K problems in one prompt, their five solutions in one response: 500 tokens and more."""

    def join(rows: Dataset) -> Dataset:
        starts = range(0, len(rows) - 4, 5)
        return Dataset.from_list(
            [{name: "\n\n".join(rows[i : i + 5][name]) for name in rows.column_names} for i in starts]
        )

    return tuple(join(rows) for rows in gsm8k(data))


def carrying(_: Path) -> tuple[Dataset, Dataset, Dataset]:
    """The quickstart's sums: half of the corpus forgets to carry, and pairs prefer the half that does not."""
    problems = all_problems(seed=0)
    pairs = [
        {"prompt": p.prompt, "chosen": p.working(carries=True), "rejected": p.working(carries=False)}
        for p in problems[4000:5700]
    ]
    completions = write_corpus(problems[:4000], careful_share=0.5, seed=0)
    return tuple(map(Dataset.from_list, (completions, pairs[:1500], pairs[1500:])))


@dataclass(frozen=True)
class Task:
    """Data and sizes of a model. batch_size counts rows of SFT; VRPO always takes 8 pairs a step.

    start: the task whose reference the SFT goes on from; None: from random weights.
    """

    rows: Callable[[Path], tuple[Dataset, Dataset, Dataset]]
    vocab_size: int
    d_model: int
    n_layers: int
    mlp_hidden_size: int
    max_length: int
    batch_size: int
    sft_steps: int
    vrpo_steps: int
    sft_learning_rate: float = 2e-3
    vrpo_learning_rate: float = 5e-4
    start: str | None = None

    def new_model(self) -> NewModel:
        names = ("vocab_size", "d_model", "n_layers", "mlp_hidden_size")
        return NewModel(n_heads=4, **{name: getattr(self, name) for name in names})


TASKS = {
    "arithmetic": Task(
        arithmetic, 300, 96, 3, 256, max_length=160, batch_size=8, sft_steps=4000, vrpo_steps=100
    ),
    "carrying": Task(
        carrying,
        *(265, 64, 4, 128),
        max_length=64,
        batch_size=64,
        sft_steps=800,
        vrpo_steps=40,
        vrpo_learning_rate=1e-4,
    ),
    "gsm8k": Task(gsm8k, 1024, 160, 2, 432, max_length=160, batch_size=8, sft_steps=2000, vrpo_steps=75),
    "gsm8k-long": Task(
        gsm8k_long,
        *(1024, 160, 2, 432),
        max_length=1024,
        batch_size=4,
        sft_steps=400,
        vrpo_steps=40,
        start="gsm8k",
    ),
    "gsm8k-10m": Task(
        gsm8k,
        *(1024, 320, 8, 864),
        max_length=160,
        batch_size=8,
        sft_steps=600,
        vrpo_steps=75,
        sft_learning_rate=1e-3,
        vrpo_learning_rate=2e-4,
    ),
}


class SaveAt(TrainerCallback):
    """Saves the model as <out>/<drift> at given steps."""

    def __init__(self, out: Path, step_of_drift: dict[int, str]):
        self.out, self.step_of_drift = out, step_of_drift

    def on_step_end(self, args, state, control, model=None, **kwargs):
        drift = self.step_of_drift.get(state.global_step)
        if drift:
            model.save_pretrained(self.out / drift)


def check_device(device: str) -> None:
    """Before any work is lost."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("--device cuda: torch sees no CUDA device")


def settings(out: Path, seed: int, max_length: int, device: str = "cpu") -> dict:
    """What every training here has in common. In float32 on a GPU, too."""
    return dict(
        output_dir=str(out / "runs"),
        max_length=max_length,
        max_prompt_length=max_length // 4,
        report_to=[],
        save_strategy="no",
        seed=seed,
        use_cpu=device == "cpu",
        bf16=False,
        disable_tqdm=True,
        logging_steps=50,
        max_tokens_per_pack=12_000,
    )


def train_reference(args: argparse.Namespace) -> dict:
    task = TASKS[args.task]
    completions, _, held_out = task.rows(args.data)
    if args.start is None:
        texts = [text for row in completions for text in (row["prompt"], row["completion"])]
        tokenizer = train_tokenizer(texts, task.vocab_size)
        model = build_model(task.new_model(), tokenizer, max_length=task.max_length, seed=args.seed)
    else:
        model, tokenizer = load_model(str(args.start)), load_tokenizer(str(args.start))
        # Rotary positions know no length: a model of short texts goes on with longer ones.
        model.config.max_sequence_length = task.max_length
    model.save_pretrained(args.out / "random")
    started = time.monotonic()
    trainer = DiffusionSFTTrainer(
        model,
        DiffusionSFTConfig(
            **settings(args.out, args.seed, task.max_length, args.device),
            mask_design="coupled",
            num_samples=2,
            per_device_train_batch_size=task.batch_size,
            learning_rate=task.sft_learning_rate,
            lr_scheduler_type="constant_with_warmup",
            max_steps=task.sft_steps,
            max_eos_fill=0,  # the committed figures are of models that end where their answers do
        ),
        train_dataset=completions,
        processing_class=tokenizer,
        callbacks=[SaveAt(args.out, {max(task.sft_steps // 10, 1): "sft-early"})],
    )
    trainer.train()
    trainer.model.save_pretrained(args.out / "reference")
    tokenizer.save_pretrained(args.out / "reference")
    held_out.to_json(args.out / "pairs.jsonl")
    return {
        "max_length": task.max_length,
        "device": provenance(args.device)["device"],
        "sft_start": args.start and str(args.start),
        "seed": args.seed,
        "sft_steps": trainer.state.global_step,
        "sft_seconds": round(time.monotonic() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sft_log": trainer.state.log_history[-3:],
    }


def train_policies(args: argparse.Namespace) -> dict:
    task, out = TASKS[args.task], args.out
    steps = task.vrpo_steps
    _, pairs, _ = task.rows(args.data)
    started = time.monotonic()
    trainer = VRPOTrainer(
        load_model(str(out / "reference")),
        args=VRPOConfig(
            **settings(args.out, args.seed, task.max_length, args.device),
            mask_design="paper",
            num_samples=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=task.vrpo_learning_rate,
            lr_scheduler_type="constant_with_warmup",
            max_steps=steps,
        ),
        train_dataset=pairs,
        processing_class=load_tokenizer(str(out / "reference")),
        callbacks=[SaveAt(out, {max(steps // 20, 1): "small", steps // 5: "early", steps: "late"})],
    )
    trainer.train()
    return {
        "vrpo_steps": steps,
        "vrpo_seconds": round(time.monotonic() - started),
        "vrpo_log": trainer.state.log_history,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--start", type=Path, help="checkpoint to go on from in the SFT stage")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    args = parser.parse_args()
    check_device(args.device)
    set_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    log = train_reference(args) | train_policies(args)
    (args.out / "training.json").write_text(json.dumps(log, indent=1))
    print(json.dumps({key: value for key, value in log.items() if key != "vrpo_log"}, indent=1))


if __name__ == "__main__":
    main()
