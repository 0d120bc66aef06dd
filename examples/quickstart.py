"""The whole road on two cores, without downloads: python -m examples.quickstart --output_dir runs/quickstart

Masked-diffusion SFT of a small LLaDA on a mixed corpus -> pairs sampled from that model, told apart by a
verifier -> VRPO, and beside it SFT on the chosen answers for as many steps -> a table, metrics.json, a figure
and three checkpoints. The task is `arithmetic.py`; what is printed and drawn is `quickstart_report.py`.
"""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    set_seed,
)

from examples import arithmetic, quickstart_report
from examples.arithmetic import Problem
from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.data.rows import PairCollator, prepare_pairs
from vrpo.evaluation.score import Scorer, score_dataset, summarise
from vrpo.generation.sampler import SamplerConfig, generate, trim_response
from vrpo.models import LLaDAForMaskedDiffusion, create_model
from vrpo.step import Estimator
from vrpo.training.trainer import DiffusionTrainer

LENGTHS = ((1, False), (2, False), (4, False), (4, True))
"""(times the answer's length, in blocks): how many masks the length table decodes into."""


@dataclass(frozen=True)
class Settings:
    """Sizes of the run. Problems are split into SFT, pairs and test: no problem is in two of them."""

    seed: int = 0
    sft_problems: int = 4000
    pair_problems: int = 1500
    test_problems: int = 500
    careful_share: float = 0.5  # of the corpus; the rest forgets to carry
    d_model: int = 64
    n_layers: int = 4
    mlp_hidden_size: int = 128
    sft_steps: int = 2000
    sft_batch: int = 64
    max_eos_fill: int = 3 * arithmetic.LONGEST_RESPONSE  # the length table decodes 4 times the longest
    sft_learning_rate: float = 4e-3
    temperature: float = 1.0  # of the answers that become pairs
    vrpo_steps: int = 100
    vrpo_batch: int = 16  # pairs
    vrpo_learning_rate: float = 1e-4
    num_samples: int = 8  # K
    beta: float = 0.2
    sft_weight: float = 1.0  # the paper's 0.05 unteaches here: chosen and rejected are nearly the same text
    length_problems: int = 150  # of the test problems, for the accuracy at 1, 2 and 4 times their length
    curve_every: int = 10  # steps between two points of the learning curves
    evaluation_samples: int = 16  # K of the held-out preference accuracy
    threads: int = 1  # of torch; the models are too small to need more
    variance_repeats: int = 8


@dataclass
class Run:
    """What every phase needs, and what has been measured so far."""

    settings: Settings
    output_dir: Path
    tokenizer: PreTrainedTokenizerBase
    test: list[Problem]
    metrics: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str, title: str) -> Iterator[None]:
        """Announce a phase and record its wall-clock seconds."""
        quickstart_report.say(f"\n== {title}")
        started = time.perf_counter()
        yield
        self.metrics.setdefault("seconds", {})[name] = time.perf_counter() - started


class LossOnTheBar(ProgressCallback):
    """The Trainer's progress bar with the loss on it, instead of a dictionary every few steps."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


class AccuracyCurve(TrainerCallback):
    """Exact match on some test problems every few steps, kept as [(step, accuracy)]."""

    def __init__(self, run: Run, num_problems: int):
        self.run = run
        self.problems = run.test[:num_problems]
        self.points: list[tuple[int, float]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.run.settings.curve_every == 0:
            self.points.append((state.global_step, accuracy(self.run, model, self.problems)))


def answers(
    run: Run,
    model: LLaDAForMaskedDiffusion,
    problems: list[Problem],
    *,
    temperature: float,
    seed: int,
    max_new_tokens: int = arithmetic.LONGEST_RESPONSE,
    block_length: int | None = None,
    progress: bool = True,
) -> list[str]:
    """One answer to each problem, decoded with the diffusion sampler, one token per step.

    All get the same number of masks, whatever the length of their answers: the model ends them. Drawn answers
    reveal their tokens in random order: revealing the most confident first would favour the more frequent way
    of answering far beyond its probability.
    """
    tokenizer = run.tokenizer
    sampler = SamplerConfig(
        max_new_tokens=max_new_tokens,
        block_length=block_length,
        temperature=temperature,
        remasking="random" if temperature else "low_confidence",
        stop_ids=(tokenizer.eos_token_id,),
    )
    tokens_BG = generate(
        model,
        [tokenizer(problem.prompt).input_ids for problem in problems],
        sampler,
        mask_token_id=tokenizer.mask_token_id,
        seed=seed,
        progress=progress,
    )
    return [tokenizer.decode(trim_response(row, [tokenizer.eos_token_id])) for row in tokens_BG]


def verdicts(
    run: Run, model: LLaDAForMaskedDiffusion, problems: list[Problem], temperature: float, progress: bool
) -> dict[str, float]:
    """Shares of correct, careless and other answers."""
    seed = run.settings.seed + 1
    written = answers(run, model, problems, temperature=temperature, seed=seed, progress=progress)
    kinds = [arithmetic.verify(*pair) for pair in zip(problems, written, strict=True)]
    known = (arithmetic.CORRECT, arithmetic.CARELESS, arithmetic.OTHER)
    return {kind: kinds.count(kind) / len(kinds) for kind in known}


def accuracy(run: Run, model: LLaDAForMaskedDiffusion, problems: list[Problem]) -> float:
    """Share of problems answered right by a draw at temperature 1."""
    return verdicts(run, model, problems, temperature=1.0, progress=False)[arithmetic.CORRECT]


def outcomes(run: Run, model: LLaDAForMaskedDiffusion) -> dict[str, dict[str, float]]:
    """Verdicts on the test problems, for the most likely answer and for a draw at temperature 1."""
    temperatures = {"greedy": 0.0, "sampled": 1.0}
    return {
        name: verdicts(run, model, run.test, value, progress=True) for name, value in temperatures.items()
    }


def lengths(run: Run, model: LLaDAForMaskedDiffusion) -> dict[str, float]:
    """Share of right most likely answers by the masks they were given: 1, 2 and 4 times the answer's tokens.

    Decoded in one block, and in blocks of the answer's length from left to right.
    """
    problems = run.test[: run.settings.length_problems]
    right: dict[str, int] = {}
    for num_terms in sorted({len(problem.terms) for problem in problems}):
        alike = [problem for problem in problems if len(problem.terms) == num_terms]
        size = alike[0].response_length
        for times, is_cut in LENGTHS:
            written = answers(
                run,
                model,
                alike,
                temperature=0.0,
                seed=0,
                max_new_tokens=times * size,
                block_length=size if is_cut else None,
                progress=False,
            )
            kinds = [arithmetic.verify(*pair) for pair in zip(alike, written, strict=True)]
            name = f"{times}x" + ", in blocks of" * is_cut
            right[name] = right.get(name, 0) + kinds.count(arithmetic.CORRECT)
    return {name: count / len(problems) for name, count in right.items()}


def train(run: Run, trainer: DiffusionTrainer, folder: str) -> dict[str, float]:
    """Train, save the checkpoint, and say how fast it went."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(LossOnTheBar())
    trainer.train()
    trainer.save_model(str(run.output_dir / folder))
    rates = [line["vrpo/tokens_per_second"] for line in trainer.state.log_history if "loss" in line]
    return {"tokens_per_second": sum(rates) / len(rates), "steps": trainer.state.global_step}


def trainer_arguments(run: Run, folder: str, steps: int, batch: int, learning_rate: float) -> dict[str, Any]:
    """What the three trainings have in common."""
    return dict(
        output_dir=str(run.output_dir / folder),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=1,
        learning_rate=learning_rate,
        weight_decay=0.01,
        seed=run.settings.seed,
        logging_steps=min(10, steps),
        logging_first_step=True,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
    )


def supervised(run: Run, problems: list[Problem]) -> LLaDAForMaskedDiffusion:
    """A new model, trained on the corpus of careful and careless writers."""
    settings = run.settings
    model = create_model(
        run.tokenizer,
        d_model=settings.d_model,
        n_layers=settings.n_layers,
        n_heads=4,
        mlp_hidden_size=settings.mlp_hidden_size,
        max_sequence_length=64,
        init_std=0.1,  # at this width 0.02 learns half as fast
        seed=settings.seed,
    )
    run.metrics["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    arguments = trainer_arguments(
        run, "sft", settings.sft_steps, settings.sft_batch, settings.sft_learning_rate
    )
    trainer = DiffusionSFTTrainer(
        model=model,
        args=DiffusionSFTConfig(**arguments, max_eos_fill=settings.max_eos_fill),
        train_dataset=Dataset.from_list(
            arithmetic.write_corpus(problems, settings.careful_share, settings.seed)
        ),
        processing_class=run.tokenizer,
    )
    run.metrics["sft"] = train(run, trainer, "sft")
    return model


def sample_pairs(
    run: Run, model: LLaDAForMaskedDiffusion, problems: list[Problem], seed: int
) -> list[dict[str, str]]:
    """Two answers of the model to each problem; where one is right and the other is not, a pair.

    A model may also answer nothing at all (EOS first); an empty response cannot be scored and makes no pair.
    """
    tries = [
        answers(run, model, problems, temperature=run.settings.temperature, seed=seed + side)
        for side in range(2)
    ]
    pairs = []
    for problem, *written in zip(problems, *tries, strict=True):
        right = [arithmetic.verify(problem, answer) == arithmetic.CORRECT for answer in written]
        if right[0] != right[1] and all(written):
            chosen, rejected = written if right[0] else reversed(written)
            pairs.append({"prompt": problem.prompt, "chosen": chosen, "rejected": rejected})
    return pairs


def align(
    run: Run, model: LLaDAForMaskedDiffusion, pairs: list[dict[str, str]]
) -> dict[str, LLaDAForMaskedDiffusion]:
    """VRPO on the pairs, and SFT on their chosen answers: same start, steps, batch, samples, rate."""
    settings = run.settings
    aligned = {}
    for name in ("sft_on_chosen", "vrpo"):
        shared = trainer_arguments(
            run, name, settings.vrpo_steps, settings.vrpo_batch, settings.vrpo_learning_rate
        ) | {"warmup_steps": 15, "num_samples": settings.num_samples}
        curve = AccuracyCurve(run, num_problems=200)
        aligned[name] = copy.deepcopy(model)
        common = dict(model=aligned[name], processing_class=run.tokenizer, callbacks=[curve])
        if name == "vrpo":
            config = VRPOConfig(beta=settings.beta, sft_weight=settings.sft_weight, **shared)
            trainer = VRPOTrainer(args=config, train_dataset=Dataset.from_list(pairs), **common)
        else:
            rows = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in pairs]
            trainer = DiffusionSFTTrainer(
                args=DiffusionSFTConfig(**shared), train_dataset=Dataset.from_list(rows), **common
            )
        title = {"vrpo": "VRPO", "sft_on_chosen": "SFT on the chosen answers, for comparison"}[name]
        with run.phase(name, f"{title}: {settings.vrpo_steps} steps"):
            run.metrics[name] = train(run, trainer, name)
        if name == "vrpo":
            run.metrics["first_step"] = first_step(trainer)
        start = accuracy(run, model, curve.problems)
        run.metrics[name]["curve"] = [(0, start), *curve.points]
    return aligned


def first_step(trainer: VRPOTrainer) -> dict[str, float]:
    """What VRPO logs at step 1, where policy and reference are still the same: ln 2, and a margin of 0."""
    line = trainer.state.log_history[0]
    sft_loss = trainer.args.sft_weight * line["vrpo/sft_loss"]
    return {"loss": line["loss"] - sft_loss, "sft_loss": sft_loss, "margin": line["rewards/margins"]}


def estimator(run: Run, num_samples: int, seed: int) -> Estimator:
    """The paper's estimator: independent levels, one mask each."""
    return Estimator(
        mask_token_id=run.tokenizer.mask_token_id,
        num_samples=num_samples,
        mask_design="paper",
        masks_per_level=1,
        seed=seed,
    )


def held_out(
    run: Run, model: LLaDAForMaskedDiffusion, reference: LLaDAForMaskedDiffusion, pairs: Dataset
) -> dict[str, float]:
    """Preference metrics on pairs of problems that no training has seen; see `evaluation.score.summarise`."""
    precise = estimator(run, run.settings.evaluation_samples, seed=0)
    scorer = Scorer(model.eval(), reference.eval(), precise, run.settings.beta, 65536, "cpu")
    rows = score_dataset(scorer, pairs)
    change = [row["elbo_chosen"] - row["ref_elbo_chosen"] for row in rows]
    summary = summarise(rows)
    summary["chosen_change"] = sum(change) / len(change)
    summary["elbo_gaps"] = [row["elbo_chosen"] - row["elbo_rejected"] for row in rows]
    return summary


@torch.no_grad()
def score_variance(
    run: Run, model: LLaDAForMaskedDiffusion, reference: LLaDAForMaskedDiffusion, pairs: Dataset
) -> dict[str, float]:
    """Variance of the score over repeated mask draws, mean over pairs, with masks shared or not.

    score = beta * [(B_policy - B_ref)(chosen) - (B_policy - B_ref)(rejected)]
    """
    repeats, beta = run.settings.variance_repeats, run.settings.beta
    batch = PairCollator()([pairs[i] for i in range(min(len(pairs), 64))])["responses"]

    def gaps(which: LLaDAForMaskedDiffusion, first_seed: int) -> torch.Tensor:
        scored = []
        for repeat in range(repeats):
            drawn = estimator(run, run.settings.num_samples, first_seed + repeat)
            scorer = Scorer(which, None, drawn, beta, 65536, "cpu")
            scored.append([row["elbo_chosen"] - row["elbo_rejected"] for row in scorer.score(batch)])
        return beta * torch.tensor(scored)

    policy, shared, separate = gaps(model, 0), gaps(reference, 0), gaps(reference, repeats)
    return {
        "shared": (policy - shared).var(dim=0).mean().item(),
        "separate": (policy - separate).var(dim=0).mean().item(),
        "pairs": batch.num_examples,
        "repeats": repeats,
    }


def quickstart(settings: Settings, output_dir: Path) -> dict[str, Any]:
    """The whole road; returns what it also writes to metrics.json."""
    started = time.perf_counter()
    set_seed(settings.seed)
    problems = arithmetic.all_problems(settings.seed)
    needed = settings.sft_problems + settings.pair_problems + settings.test_problems
    if needed > len(problems):
        raise ValueError(f"there are {len(problems)} problems, the settings ask for {needed}")
    first, second = settings.sft_problems, settings.sft_problems + settings.pair_problems
    run = Run(settings, output_dir, arithmetic.build_tokenizer(), test=problems[second:needed])
    run.metrics["settings"] = asdict(settings)

    with run.phase("sft", f"SFT of a small LLaDA on a mixed corpus: {settings.sft_steps} steps"):
        sft = supervised(run, problems[:first])
    with run.phase("pairs", "Preference pairs from the model's own answers"):
        pairs = sample_pairs(run, sft, problems[first:second], settings.seed + 1000)
        test_pairs = sample_pairs(run, sft, run.test, settings.seed + 2000)
        if not pairs or not test_pairs:
            raise ValueError("the model answered no problem both right and wrong: no pairs to learn from")
        run.metrics["pairs"] = {"train": len(pairs), "held_out": len(test_pairs), "examples": pairs[:3]}
        quickstart_report.say(quickstart_report.pairs_text(run.metrics["pairs"]))
    models = {"sft": sft, **align(run, sft, pairs)}
    with run.phase("evaluation", f"Evaluation on {len(run.test)} problems that no training has seen"):
        prepared, _ = prepare_pairs(Dataset.from_list(test_pairs), run.tokenizer)
        run.metrics["held_out"] = {
            name: {
                "outcomes": outcomes(run, model),
                "lengths": lengths(run, model),
                **held_out(run, model, sft, prepared),
            }
            for name, model in models.items()
        }
        run.metrics["score_variance"] = score_variance(run, models["vrpo"], sft, prepared)
    run.metrics["seconds"]["total"] = time.perf_counter() - started
    (output_dir / "metrics.json").write_text(json.dumps(run.metrics, indent=2) + "\n", encoding="utf-8")
    return run.metrics


def parse(argv: list[str] | None = None) -> tuple[Settings, Path]:
    """Command line -> settings and output folder; every field of Settings is a flag."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, default=Path("runs/quickstart"))
    for setting in fields(Settings):
        parser.add_argument(f"--{setting.name}", type=setting.type, default=setting.default)
    flags = vars(parser.parse_args(argv))
    output_dir = flags.pop("output_dir")
    return Settings(**flags), output_dir


def main(argv: list[str] | None = None) -> None:
    settings, output_dir = parse(argv)
    output_dir.mkdir(parents=True, exist_ok=True)
    disable_progress_bars()  # of tokenising a few thousand rows; training and sampling keep theirs
    torch.set_num_threads(settings.threads)
    metrics = quickstart(settings, output_dir)
    quickstart_report.say_results(metrics)
    figure = quickstart_report.draw(metrics, output_dir / "quickstart.png")
    quickstart_report.say_files(output_dir, figure)


if __name__ == "__main__":
    main()
