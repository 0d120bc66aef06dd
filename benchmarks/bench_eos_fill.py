"""Which EOS fill teaches a model to stop, and what it costs: python -m benchmarks eos-fill [--laws ...]

A LLaDA of 0.2 M parameters learns, from one mixed set of rows, to copy words of 1 to 8 letters ("copy dab:"
-> "dab": the prompt says how long the answer is) and to invent words of 1 to 8 letters ("any:" -> "hcf": the
prompt does not, every length has one chance in eight). Then it copies words it has not seen into m times the
tokens it needs, greedily, in one block and in m, and into a common number of tokens; and it invents words,
one draw each, whose mean length should be 4.5 however many masks it gets. Rows: results/eos_fill.csv.
"""

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from datasets import Dataset, disable_progress_bars
from transformers import PrinterCallback

from benchmarks.record import RESULTS, append, provenance
from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer
from vrpo.batch import ResponseBatch
from vrpo.commands.new_model import train_tokenizer
from vrpo.estimator import eos_fill
from vrpo.estimator.eos_fill import EosFill
from vrpo.generation import SamplerConfig, generate, trim_response
from vrpo.models import create_model

LETTERS = "abcdefgh"
LONGEST = 8  # letters; with EOS 9 tokens
MULTIPLES = (1, 2, 4)
FIELDS = (
    *(
        "date",
        "git",
        "dirty",
        "device",
        "torch",
        "triton",
        "law",
        "max_fill",
        "normalised_by",
        "steps",
        "seed",
    ),
    *("mean_fill", "tokens_per_step", "cpu_seconds", "eval_loss"),
    *(f"copy_{m}x_{blocks}" for m in MULTIPLES for blocks in ("block", "blocks")),
    *(f"copy_of_{m * (LONGEST + 1)}" for m in MULTIPLES),
    *(f"length_of_{m * (LONGEST + 1)}" for m in MULTIPLES),
)


@dataclass(frozen=True)
class Uniform(EosFill):
    """Rival: f ~ U{0 .. bound}; the number of masks then says nothing of the length at all."""

    def draw(self, epoch: int, batch: ResponseBatch, bound_R: torch.Tensor) -> torch.Tensor:
        counter = eos_fill.stream_counter(eos_fill.PURPOSE_EOS_FILL, batch.side_R, batch.side_R * 0)
        words_R = eos_fill.philox4x32(self.seed, counter * 0, counter, batch.example_R, counter * 0 + epoch)[
            0
        ]
        return (words_R * (bound_R + 1)) >> 32


@dataclass(frozen=True)
class Half(EosFill):
    """Rival: half of the examples log-uniform, the others bare."""

    def draw(self, epoch: int, batch: ResponseBatch, bound_R: torch.Tensor) -> torch.Tensor:
        coin_R = Uniform.draw(replace(self, seed=self.seed + 1), epoch, batch, torch.ones_like(bound_R))
        return coin_R * super().draw(epoch, batch, bound_R)


@dataclass(frozen=True)
class Relative(EosFill):
    """Rival: log-uniform up to max_fill / longest times the response's own length."""

    def draw(self, epoch: int, batch: ResponseBatch, bound_R: torch.Tensor) -> torch.Tensor:
        own_R = self.max_fill * batch.response_length_R // (LONGEST + 1)
        return super().draw(epoch, batch, torch.minimum(bound_R, own_R))


@dataclass(frozen=True)
class Longest(EosFill):
    """Rival: LLaDA's, up to the longest response of the batch."""

    def draw(self, epoch: int, batch: ResponseBatch, bound_R: torch.Tensor) -> torch.Tensor:
        return torch.minimum(bound_R, batch.response_length_R.max() - batch.response_length_R)


LAWS: dict[str, type[EosFill]] = {
    "log-uniform": EosFill,
    "uniform": Uniform,
    "half log-uniform": Half,
    "relative": Relative,
    "longest of the batch": Longest,
}


class Trainer(DiffusionSFTTrainer):
    """The product's trainer with another law or another normalisation, and a count of its tokens."""

    law: type[EosFill] = EosFill
    normalised_by = "total"
    tokens = 0

    def _responses(self, inputs, model):
        if self.eos_fill is not None and type(self.eos_fill) is not self.law:
            self.eos_fill = self.law(**vars(self.eos_fill))
        return super()._responses(inputs, model)

    def _objective(self, batch, replicate_K):
        objective = super()._objective(batch, replicate_K)
        if self.normalised_by != "answer" or batch.fill_R is None:
            return objective
        share_R = batch.response_length_R / (batch.response_length_R - batch.fill_R)
        return lambda *elbos: objective(*elbos) * share_R

    def _metrics(self, batch, result):
        self.tokens += result.num_tokens
        return super()._metrics(batch, result)


def rows(count: int, seed: int) -> list[dict[str, str]]:
    """Copied and invented words in turn."""
    drawn = random.Random(seed)
    words = ["".join(drawn.choices(LETTERS, k=drawn.randint(1, LONGEST))) for _ in range(count)]
    return [
        {"prompt": "any:" if index % 2 else f"copy {word}:", "completion": word}
        for index, word in enumerate(words)
    ]


class Judge:
    """Decodes with a trained model."""

    def __init__(self, model, tokenizer, words: list[str]):
        self.model, self.tokenizer, self.words = model, tokenizer, words

    def decode(self, prompts: list[str], **sampler) -> list[str]:
        eos = self.tokenizer.eos_token_id
        tokens_BG = generate(
            self.model,
            [self.tokenizer(prompt).input_ids for prompt in prompts],
            SamplerConfig(**sampler),
            mask_token_id=self.tokenizer.mask_token_id,
            progress=False,
        )
        return [self.tokenizer.decode(trim_response(tokens_G, (eos,))) for tokens_G in tokens_BG]

    def copies(self, size: Callable[[int], int], block: Callable[[int], int]) -> float:
        """Share of words copied right, decoded into size(tokens needed) tokens."""
        right = 0
        for length in range(1, LONGEST + 1):
            words = [word for word in self.words if len(word) == length]
            if words:
                need = length + 1
                written = self.decode(
                    [f"copy {word}:" for word in words], max_new_tokens=size(need), block_length=block(need)
                )
                right += sum(map(str.__eq__, words, written))
        return round(right / len(self.words), 4)

    def mean_length(self, size: int) -> float:
        """Mean length of invented words, one draw for each test word; 4.5 is right."""
        written = self.decode(
            ["any:"] * len(self.words), max_new_tokens=size, temperature=1.0, remasking="random"
        )
        return round(sum(map(len, written)) / len(written), 3)


def measure(law: str, max_fill: int, normalised_by: str, args: argparse.Namespace) -> dict:
    """Train once and decode; one row."""
    tokenizer = train_tokenizer(["copy any"], 262)
    model = create_model(
        tokenizer,
        d_model=64,
        n_layers=3,
        n_heads=4,
        mlp_hidden_size=128,
        max_sequence_length=128,
        init_std=0.1,
    )
    seen, unseen = rows(args.rows, args.seed), rows(2 * args.test, args.seed + 1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=DiffusionSFTConfig(
                output_dir=folder,
                max_eos_fill=max_fill,
                max_steps=args.steps,
                per_device_train_batch_size=args.batch,
                learning_rate=3e-3,
                warmup_steps=50,
                seed=args.seed,
                report_to="none",
                use_cpu=True,
                save_strategy="no",
                logging_steps=args.steps,
                disable_tqdm=True,
            ),
            train_dataset=Dataset.from_list(seen),
            eval_dataset=Dataset.from_list(unseen),
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.law, trainer.normalised_by = LAWS[law], normalised_by
        started = time.process_time()
        trainer.train()
        seconds = time.process_time() - started
        steps, tokens = trainer.state.global_step, trainer.tokens
        mean_fill = (
            next(line["sft/eos_fill"] for line in trainer.state.log_history if "loss" in line)
            if max_fill
            else 0
        )
        eval_loss = trainer.evaluate()["eval_loss"]
    judge = Judge(model.eval(), tokenizer, [row["completion"] for row in unseen[::2]])
    row = {
        "law": law if max_fill else "none",
        "max_fill": max_fill,
        "normalised_by": normalised_by,
        "steps": steps,
        "seed": args.seed,
        "mean_fill": round(mean_fill, 2),
        "tokens_per_step": round(tokens / steps),
        "cpu_seconds": round(seconds, 1),
        "eval_loss": round(eval_loss, 4),
    }
    for m in MULTIPLES:
        row[f"copy_{m}x_block"] = judge.copies(lambda need, m=m: m * need, lambda need, m=m: m * need)
        row[f"copy_{m}x_blocks"] = judge.copies(lambda need, m=m: m * need, lambda need: need)
        common = m * (LONGEST + 1)
        row[f"copy_of_{common}"] = judge.copies(lambda need, g=common: g, lambda need, g=common: g)
        row[f"length_of_{common}"] = judge.mean_length(common)
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--laws", nargs="+", choices=LAWS, default=["log-uniform"])
    parser.add_argument("--max_fill", nargs="+", type=int, default=[36], help="0: no fill")
    parser.add_argument("--normalised_by", nargs="+", choices=("total", "answer"), default=["total"])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--test", type=int, default=400, help="words to copy, and words to invent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="a run of seconds that records nothing")
    args = parser.parse_args(argv)
    if args.tiny:
        args.steps, args.batch, args.rows, args.test = 2, 4, 8, 4
    torch.set_num_threads(1)
    disable_progress_bars()
    for law in args.laws:
        for max_fill in args.max_fill:
            for normalised_by in args.normalised_by:
                row = measure(law, max_fill, normalised_by, args)
                print(row, flush=True)
                if not args.tiny:
                    append([provenance("cpu") | row], RESULTS / "eos_fill.csv", FIELDS)


if __name__ == "__main__":
    main()
