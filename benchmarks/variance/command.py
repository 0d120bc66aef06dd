"""Variance of scores, losses, gradients and ELBOs under the mask designs, on independently trained models.

python -m benchmarks variance run --train          # hours on two cores; goes on where it stopped
python -m benchmarks variance run --tasks gsm8k --models 3 --kinds scores
python -m benchmarks variance report               # every table and figure from the result files
"""

import argparse
from pathlib import Path

from benchmarks.variance import report, run, training
from benchmarks.variance.models import TASKS


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks variance",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("run", help="train and measure", description=run.__doc__)
    command.add_argument("--tasks", nargs="+", choices=sorted(TASKS), default=list(report.TASKS))
    command.add_argument("--kinds", nargs="*", choices=sorted(run.KINDS), default=list(run.KINDS))
    command.add_argument("--train", action="store_true", help="make the models that are not there")
    command.add_argument("--seed", type=int, help="of the masks; the file's, or 1000 x the model's number")
    command.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="to train and measure on")
    command.set_defaults(run=run.run)
    add_common(command)
    command = commands.add_parser("training", help="training outcome", description=training.__doc__)
    tasks = list(training.LEARNING_RATE)
    command.add_argument("--tasks", nargs="+", choices=sorted(tasks), default=tasks)
    command.add_argument("--steps", type=int, default=60, help="of 8 pairs")
    command.add_argument("--pairs", type=int, default=200, help="held-out ones to score")
    command.set_defaults(run=training.run)
    add_common(command)
    report.add_arguments(commands.add_parser("report", help="tables and figures", description=report.__doc__))
    args = parser.parse_args(arguments)
    return args.run(args)


def add_common(command: argparse.ArgumentParser) -> None:
    command.add_argument("--models", nargs="+", type=int, default=[1, 2, 3, 4, 5], help="their seeds")
    command.add_argument("--folder", type=Path, default=Path("runs/variance"), help="of the trained models")
    command.add_argument("--data", type=Path, default=Path("../shared/data/gsm8k"), help="GSM8K text")
    command.add_argument("--threads", type=int, default=1)
