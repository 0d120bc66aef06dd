"""What one call of `python -m benchmarks kernels` times: its options, and the turns they make."""

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import DTYPES, HEADS, MODELS, Case, ModelHead
from benchmarks.providers import PROVIDERS, stages
from benchmarks.record import RESULTS

FILE = RESULTS / "kernels.csv"


@dataclass(frozen=True)
class Turn:
    """What is timed together, interleaved.

    Attributes:
        case: the problem; its head is the first of `heads`.
        heads: kinds of heads, on the same hidden states and weights.
        model: whose head it is, "" for given sizes.
    """

    case: Case
    heads: tuple[str, ...]
    model: str
    dtype: str
    threads: int
    providers: list[str]

    def described(self) -> dict[str, str]:
        """What can differ from turn to turn besides N and the provider."""
        return {
            "model": self.model,
            "heads": "+".join(self.heads),
            "dtype": self.dtype,
            "logits": self.case.logits,
            "threads": f"{self.threads} threads",
        }


def labels(turns: list[Turn]) -> dict[int, list[str]]:
    """Number of a turn -> a name for each of its providers, with what differs between the turns."""
    described = [turn.described() for turn in turns]
    varying = [key for key in (described[0] if turns else {}) if len({one[key] for one in described}) > 1]
    return {
        number: [
            ", ".join((name, f"N={turn.case.num_rows}", *(one[key] for key in varying)))
            for name in turn.providers
        ]
        for number, (turn, one) in enumerate(zip(turns, described, strict=True))
    }


def turns(options: argparse.Namespace, device: str) -> Iterator[Turn]:
    """In order: on a GPU the plain head of every size goes first; others are timed at the first size only."""
    for group, (model, head) in itertools.product(_head_groups(options, device), _shapes(options)):
        kinds = group if options.heads or not options.model else (head.head,)
        first_only = device == "cuda" and kinds != ("plain",) and len(options.rows) > 1
        for num_rows, dtype, logits, threads, providers in itertools.product(
            options.rows[:1] if first_only else options.rows,
            options.dtypes,
            options.logits,
            options.threads,
            stages(options.providers, device),
        ):
            case = Case(num_rows, head.size, head.num_classes, DTYPES[dtype], device, logits, head=kinds[0])
            yield Turn(case, kinds, model, dtype, threads, providers)


def _head_groups(options: argparse.Namespace, device: str) -> list[tuple[str, ...]]:
    """Heads that are timed together: all on a CPU, where figures of one run are compared; one by one else."""
    if options.model and not options.heads:
        return [()]  # each model's own
    heads = options.heads or (list(HEADS) if device == "cpu" else ["plain"])
    return [tuple(heads)] if device == "cpu" else [(head,) for head in heads]


def _shapes(options: argparse.Namespace) -> list[tuple[str, ModelHead]]:
    """(model or "", its head)."""
    if options.model:
        return [(name, MODELS[name]()) for name in options.model]
    return [("", ModelHead(options.size, options.classes, "plain"))]


def parse(description: str, arguments: list[str], device: str) -> argparse.Namespace:
    """The command line."""
    laptop = device == "cpu"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks kernels",
        description=description,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[512] if laptop else [4096, 1024, 256, 16384])
    parser.add_argument("--size", type=int, default=1024 if laptop else 4096, help="D")
    parser.add_argument("--classes", type=int, default=32768 if laptop else 126464, help="V")
    parser.add_argument(
        "--model", nargs="+", choices=list(MODELS), default=[], help="D, V and kind of its head"
    )
    parser.add_argument(
        "--heads",
        nargs="+",
        choices=list(HEADS),
        default=None,
        help="all on a CPU, plain on a GPU; there others are timed at the first of --rows",
    )
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=["fp32", "bf16"] if laptop else ["bf16"]
    )
    threads = sorted({1, torch.get_num_threads()}) if laptop else [torch.get_num_threads()]
    parser.add_argument("--threads", type=int, nargs="+", default=threads)
    parser.add_argument("--logits", nargs="+", choices=["random", "peaked"], default=["random"])
    parser.add_argument("--repeats", type=int, default=5 if laptop else 15)
    parser.add_argument("--providers", nargs="+", choices=list(PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing new after these")
    parser.add_argument("--until", type=float, default=math.inf, help="the same as epoch seconds")
    parser.add_argument("--compiled", action="store_true", help="the caches on disk have what is compiled")
    parser.add_argument("--revision", default="", help="git revision to write, where there is no repository")
    parser.add_argument("--output", type=Path, default=FILE, help="CSV file to append to")
    return parser.parse_args(arguments)
