"""Train the small models on which the estimators are compared: a reference and policies at three drifts.

    python benchmarks/variance_models.py gsm8k --data ../shared/data/gsm8k --out runs/variance/gsm8k
    python benchmarks/variance_models.py arithmetic --out runs/variance/arithmetic

Writes <out>/reference (masked-diffusion SFT), <out>/small, <out>/early and <out>/late (VRPO checkpoints),
<out>/pairs.jsonl (held-out pairs) and <out>/training.json (what was done, and how long it took).
`--stage sft` and `--stage vrpo` run the two halves one at a time.
"""

import argparse
import json
import time
from pathlib import Path

from datasets import Dataset, load_dataset
from transformers import TrainerCallback, set_seed

from vrpo.config import DiffusionSFTConfig, VRPOConfig
from vrpo.models import load_model, load_tokenizer
from vrpo.new_model import NewModel, build_model, train_tokenizer
from vrpo.trainer import DiffusionSFTTrainer, VRPOTrainer

DRIFTS = ("small", "early", "late")


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


TASKS = {
    "gsm8k": (gsm8k, dict(vocab_size=1024, d_model=160, n_layers=2, n_heads=4, mlp_hidden_size=432)),
    "arithmetic": (arithmetic, dict(vocab_size=300, d_model=96, n_layers=3, n_heads=4, mlp_hidden_size=256)),
}


class StopAfter(TrainerCallback):
    """Ends training after so many seconds, so that a run fits its time slot."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def on_train_begin(self, args, state, control, **kwargs):
        self.deadline = time.monotonic() + self.seconds

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = time.monotonic() > self.deadline


class SaveAt(TrainerCallback):
    """Saves the model as <out>/<drift> at given steps."""

    def __init__(self, out: Path, step_of_drift: dict[int, str]):
        self.out, self.step_of_drift = out, step_of_drift

    def on_step_end(self, args, state, control, model=None, **kwargs):
        drift = self.step_of_drift.get(state.global_step)
        if drift:
            model.save_pretrained(self.out / drift)


def common(out: Path, max_length: int) -> dict:
    return dict(
        output_dir=str(out / "runs"),
        max_length=max_length,
        max_prompt_length=max_length // 4,
        report_to=[],
        save_strategy="no",
        seed=1,
        use_cpu=True,
        disable_tqdm=True,
        logging_steps=50,
        max_tokens_per_pack=12_000,
    )


def train_reference(
    task: str, data: Path, out: Path, seconds: float, max_length: int, start: Path | None
) -> dict:
    rows, sizes = TASKS[task]
    completions, _, held_out = rows(data)
    if start is None:
        texts = [text for row in completions for text in (row["prompt"], row["completion"])]
        tokenizer = train_tokenizer(texts, sizes["vocab_size"])
        model = build_model(NewModel(**sizes), tokenizer, max_length=max_length, seed=1)
    else:
        model, tokenizer = load_model(str(start)), load_tokenizer(str(start))
    started = time.monotonic()
    trainer = DiffusionSFTTrainer(
        model,
        DiffusionSFTConfig(
            **common(out, max_length),
            mask_design="coupled",
            num_samples=2,
            per_device_train_batch_size=8,
            learning_rate=2e-3,
            lr_scheduler_type="constant_with_warmup",
            max_steps=10**6,
        ),
        train_dataset=completions,
        processing_class=tokenizer,
        callbacks=[StopAfter(seconds)],
    )
    trainer.train()
    trainer.model.save_pretrained(out / "reference")
    tokenizer.save_pretrained(out / "reference")
    held_out.to_json(out / "pairs.jsonl")
    return {
        "sft_steps": trainer.state.global_step,
        "sft_seconds": round(time.monotonic() - started),
        "parameters": sum(p.numel() for p in model.parameters()),
        "sft_log": trainer.state.log_history[-3:],
    }


def train_policies(task: str, data: Path, out: Path, steps: int, max_length: int, **config) -> dict:
    rows, _ = TASKS[task]
    _, pairs, _ = rows(data)
    started = time.monotonic()
    trainer = VRPOTrainer(
        load_model(str(out / "reference")),
        args=VRPOConfig(
            **common(out, max_length),
            mask_design="paper",
            num_samples=2,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=5e-4,
            lr_scheduler_type="constant_with_warmup",
            max_steps=steps,
            **config,
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
    parser.add_argument("--stage", choices=("sft", "vrpo", "both"), default="both")
    parser.add_argument("--seconds", type=float, default=240.0, help="time of the SFT stage")
    parser.add_argument("--start", type=Path, help="checkpoint to go on from in the SFT stage")
    parser.add_argument("--steps", type=int, default=100, help="VRPO steps")
    parser.add_argument("--max-length", type=int, default=160)
    args = parser.parse_args()
    set_seed(1)
    args.out.mkdir(parents=True, exist_ok=True)
    log_file = args.out / "training.json"
    log = json.loads(log_file.read_text()) if log_file.exists() else {}
    if args.stage in ("sft", "both"):
        log |= train_reference(args.task, args.data, args.out, args.seconds, args.max_length, args.start)
    if args.stage in ("vrpo", "both"):
        log |= train_policies(args.task, args.data, args.out, args.steps, args.max_length)
    log_file.write_text(json.dumps(log, indent=1))
    print(json.dumps({key: value for key, value in log.items() if key != "vrpo_log"}, indent=1))


if __name__ == "__main__":
    main()
