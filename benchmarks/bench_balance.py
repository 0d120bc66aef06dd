"""How long processes wait for each other, with and without the balanced order of a step's examples.

    python -m benchmarks.bench_balance --gsm8k ../shared/data/gsm8k/preferences_train.jsonl

Writes benchmarks/results/balance.csv: the share of time that a process waits on average if a batch takes as
long as it has tokens. No model runs; a process is a sum of lengths. GSM8K's lengths come from a tokenizer of
4,096 tokens trained on the pairs themselves; the log-normal mix has median 245 and sigma 1, at most 8,192.
"""

import argparse
import csv
import json
import math
from pathlib import Path

import torch
from accelerate.data_loader import SeedableRandomSampler

from vrpo.commands.new_model import train_tokenizer
from vrpo.training.balance import BalancedSampler

OUTPUT = Path(__file__).parent / "results/balance.csv"
SIZES = ((2, 8, 1), (8, 8, 1), (8, 8, 8), (8, 1, 8), (64, 8, 1))


def gsm8k_lengths(path: Path) -> list[int]:
    """Tokens of each pair, its prompt once per side."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    names = ("prompt", "chosen", "rejected")
    tokenizer = train_tokenizer([row[name] for row in rows for name in names], vocab_size=4096)
    lengths = [[len(tokenizer(row[name])["input_ids"]) for name in names] for row in rows]
    return [2 * prompt + chosen + rejected for prompt, chosen, rejected in lengths]


def lognormal_lengths(count: int = 2000) -> list[int]:
    normal = torch.randn(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [max(4, min(8192, int(math.exp(5.5 + value)))) for value in normal]


def waiting(order: list[int], costs: list[int], num_processes: int, batch_size: int) -> float:
    """1 - (mean over processes) / (slowest process), over all whole batches of an epoch."""
    busy = total = 0.0
    step = num_processes * batch_size
    for start in range(0, len(order) - step + 1, step):
        firsts = range(start, start + step, batch_size)
        sums = [sum(costs[item] for item in order[first : first + batch_size]) for first in firsts]
        busy, total = busy + sum(sums) / num_processes, total + max(sums)
    return 1 - busy / total


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gsm8k", type=Path, required=True)
    mixes = {"gsm8k": gsm8k_lengths(parser.parse_args().gsm8k), "lognormal": lognormal_lengths()}
    with OUTPUT.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(
            ["lengths", "processes", "batch_size", "batches_per_step", "waiting", "waiting_balanced"]
        )
        for name, costs in mixes.items():
            for num_processes, batch_size, num_batches in SIZES:
                sampler = SeedableRandomSampler(costs, data_seed=0)
                balanced = BalancedSampler(
                    sampler,
                    lambda epoch, costs=costs: costs,
                    batch_size=batch_size,
                    num_processes=num_processes,
                    num_batches=num_batches,
                )
                sampler.set_epoch(0)
                shares = [waiting(list(s), costs, num_processes, batch_size) for s in (sampler, balanced)]
                writer.writerow([name, num_processes, batch_size, num_batches, *(f"{s:.4f}" for s in shares)])
    print(OUTPUT.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
