"""Length mixes of the pairs that a step is measured on: GSM8K's, and one like UltraFeedback's.

    python -m benchmarks.step.lengths PAIRS.jsonl    writes gsm8k_lengths.csv anew

GSM8K's are the first 512 pairs in the order of `random.Random(0)`, of the 2,295 pairs of model answers to its
problems (grade-school-math, MIT), counted by a tokenizer of 4,096 tokens trained on them: 65 tokens of prompt
and 83 of response on average. The other is log-normal: prompts of 20 to 900 tokens around 100 (sigma 1),
responses of 10 to 1,500 around 250 (sigma 0.9), from a seed.
"""

import csv
import json
import math
import random
import sys
from pathlib import Path

import torch

from vrpo.batch import ResponseBatch

GSM8K = Path(__file__).with_name("gsm8k_lengths.csv")
NAMES = ("prompt", "chosen", "rejected")
PROMPT, RESPONSE = (20, 900, 100.0, 1.0), (10, 1500, 250.0, 0.9)  # least, most, median, sigma

Lengths = tuple[int, int, int]
"""Tokens of prompt, chosen and rejected."""


def gsm8k(num_pairs: int) -> list[Lengths]:
    """The first pairs of the file."""
    with GSM8K.open(newline="", encoding="utf-8") as stream:
        rows = [tuple(int(row[name]) for name in NAMES) for row in csv.DictReader(stream)]
    if num_pairs > len(rows):
        raise ValueError(f"num_pairs must be at most {len(rows)} for gsm8k, got {num_pairs}")
    return rows[:num_pairs]


def ultrafeedback_like(num_pairs: int, seed: int = 0) -> list[Lengths]:
    """Log-normal lengths; those of fewer pairs are the first of more."""
    drawn = random.Random(seed)

    def length(least: int, most: int, median: float, sigma: float) -> int:
        return min(max(round(median * math.exp(sigma * drawn.gauss(0, 1))), least), most)

    return [(length(*PROMPT), length(*RESPONSE), length(*RESPONSE)) for _ in range(num_pairs)]


MIXES = {"gsm8k": gsm8k, "ultrafeedback-like": ultrafeedback_like}


def make_batch(pairs: list[Lengths], num_tokens: int, seed: int = 0) -> ResponseBatch:
    """Pairs of these lengths with random tokens below num_tokens; both sides have the same prompt."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(length: int) -> torch.Tensor:
        return torch.randint(num_tokens, (length,), generator=generator)

    tokens = []
    for prompt, *responses in pairs:
        shared = drawn(prompt)
        for length in responses:
            tokens += [shared, drawn(length)]
    return ResponseBatch(
        tokens_U=torch.cat(tokens),
        prompt_length_R=torch.tensor([prompt for prompt, *_ in pairs]).repeat_interleave(2),
        response_length_R=torch.tensor([responses for _, *responses in pairs]).flatten(),
        example_R=torch.arange(len(pairs)).repeat_interleave(2),
        side_R=torch.arange(2).repeat(len(pairs)),
        num_sides=2,
    )


def count(path: Path) -> list[Lengths]:
    """Lengths of all pairs of a file, in the order that the module's docstring states."""
    from vrpo.commands.new_model import train_tokenizer

    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    tokenizer = train_tokenizer([row[name] for row in rows for name in NAMES], vocab_size=4096)
    lengths = [tuple(len(tokenizer(row[name])["input_ids"]) for name in NAMES) for row in rows]
    random.Random(0).shuffle(lengths)
    return lengths


if __name__ == "__main__":
    with GSM8K.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([NAMES, *count(Path(sys.argv[1]))[:512]])
