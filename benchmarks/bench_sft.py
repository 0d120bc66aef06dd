"""What steps of the quickstart's model cost on a CPU, part by part, beside the bare matmuls of their shapes.

    python -m benchmarks sft --against ac78abb

Trains as examples/quickstart.py does, SFT with EOS fill and VRPO, with one thread and with two. With
--against another revision trains beside the working tree, in turns and on the same batches, compiled under
runs/compare; the ratio of the two comes from one run. A block of steps is timed whole and by part: data
(loading and collating), draw (fill, masks, packing), forward, backward, optimizer (finiteness, clipping,
AdamW), and the rest (loss, metrics, logging, the Trainer's loop). The fastest block of each counts; one row
per revision, objective and number of threads goes to benchmarks/results/sft.csv.
"""

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.compare_build import SOURCES, BuildError, build_extension, commit_of, copy_revision
from benchmarks.sft_child import HARNESS, PARTS, Side, clock_name
from examples import arithmetic
from examples.quickstart import Settings

FIELDS = (
    "date", "git", "dirty", "device", "torch", "triton", "threads", "objective", "revision", "against",
    "clock", "tokens", "masked", "ms", *(f"{part}_ms" for part in (*PARTS, "rest", "matmul")),
    "tokens_per_second", "speedup", "steps", "blocks",
)  # fmt: skip
SOURCES_OF_TRAINING = (*SOURCES, "vrpo", "examples")


def matmul_ms(objective: str, tokens: int, rows: int, threads: int) -> float:
    """The matrix products of one step at its shapes, the fastest of several times.

    Three products of each weight, forward and for the gradients of its input and of itself; VRPO also runs
    the reference forward. Every layer on all tokens; attention is left out.
    """
    settings, before = Settings(), torch.get_num_threads()
    torch.set_num_threads(threads)
    width, inner = settings.d_model, settings.mlp_hidden_size
    shapes = [(width, width)] * 4 + [(width, inner)] * 2 + [(inner, width)]
    vocabulary = len(arithmetic.build_tokenizer())
    work = [(tokens, *shape) for _ in range(settings.n_layers) for shape in shapes] + [
        (rows, width, vocabulary)
    ]
    given = [(torch.ones(n, k), torch.ones(k, m), torch.ones(n, m)) for n, k, m in work]
    clock, best = time.process_time if threads == 1 else time.perf_counter, float("inf")
    for _ in range(5):
        started = clock()
        for inputs, weight, gradient in given:
            inputs @ weight
            gradient @ weight.T
            inputs.T @ gradient
            if objective == "vrpo":
                inputs @ weight
        best = min(best, clock() - started)
    torch.set_num_threads(before)
    return 1e3 * best


def blocks_of(
    roots: dict[str, Path], objective: str, threads: int, args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """The timed blocks of each revision, in turns; the first block of each warms up and does not count."""
    sides: dict[str, Side] = {}
    try:
        for name, root in roots.items():
            sides[name] = Side(root, objective, threads)
        blocks: dict[str, list[dict[str, Any]]] = {name: [] for name in roots}
        for number in range(args.blocks + 1):
            order = list(roots) if number % 2 else list(roots)[::-1]
            for name in order:
                block = sides[name].ask(args.steps)
                if number:
                    blocks[name].append(block)
        return blocks
    finally:
        for side in sides.values():
            side.close()


def rows_of(
    blocks: dict[str, list[dict[str, Any]]], objective: str, threads: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row per revision from its fastest block, by tokens per millisecond."""
    best = {
        name: max(found, key=lambda block: block["tokens"] / block["ms"]) for name, found in blocks.items()
    }
    rate = {name: block["tokens"] / block["ms"] for name, block in best.items()}
    shared = record.provenance("cpu") | {
        "threads": threads,
        "objective": objective,
        "clock": clock_name(threads),
        "steps": args.steps,
        "blocks": args.blocks,
    }
    rows = []
    for name, block in best.items():
        rest = block["ms"] - sum(block[part] for part in PARTS)
        times = {f"{part}_ms": block[part] for part in PARTS} | {"ms": block["ms"], "rest_ms": rest}
        times["matmul_ms"] = matmul_ms(objective, round(block["tokens"]), round(block["rows"]), threads)
        row = shared | {key: round(value, 2) for key, value in times.items()}
        row |= {"revision": name, "tokens": round(block["tokens"]), "masked": round(block["rows"])}
        row["tokens_per_second"] = round(1e3 * rate[name])
        if args.against and name != args.against:
            row |= {"against": args.against, "speedup": round(rate[name] / rate[args.against], 3)}
        rows.append(row)
    return rows


def roots_of(args: argparse.Namespace) -> dict[str, Path]:
    """Folder of each revision: the working tree, and a compiled copy of the one to compare with.

    Errors: BuildError for a revision that does not exist or does not compile.
    """
    roots = {"tree": HARNESS}
    if args.against:
        args.against = commit_of(HARNESS, args.against)[:7]
        cache = HARNESS / "runs" / "compare"
        copy = copy_revision(HARNESS, args.against, cache, SOURCES_OF_TRAINING, suffix="-training")
        build_extension(copy, cache)
        roots[args.against] = copy
    return roots


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks sft", description=__doc__.splitlines()[0])
    parser.add_argument("--against", metavar="REV", help="git revision to train beside the working tree")
    parser.add_argument("--objectives", nargs="+", choices=("sft", "vrpo"), default=["sft", "vrpo"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=10, help="of a block")
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--quick", action="store_true", help="2 blocks of 2 steps: every line runs")
    parser.add_argument("--output", type=Path, default=record.RESULTS / "sft.csv")
    args = parser.parse_args(arguments)
    if args.quick:
        args.steps = args.blocks = 2
    for name in ("steps", "blocks"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    return args


def main(arguments: list[str] | None = None) -> int:
    """0, or 2 if the revision to compare with cannot be built."""
    args = parse(arguments)
    try:
        roots = roots_of(args)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 2
    for objective in args.objectives:
        for threads in args.threads:
            rows = rows_of(blocks_of(roots, objective, threads, args), objective, threads, args)
            record.append(rows, args.output, FIELDS)
            for row in rows:
                parts = "  ".join(f"{part} {row[f'{part}_ms']:.1f}" for part in (*PARTS, "rest", "matmul"))
                print(f"{objective:5s} {threads} threads  {row['revision']:8s} {row['ms']:7.1f} ms  {parts}"
                      f"  {row['tokens_per_second']} tokens/s  {row.get('speedup', '')}")  # fmt: skip
    return 0
