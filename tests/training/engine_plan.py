"""What the engine tests run, all in one start: which case on which engine in how many processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import engine_runs
import engines

CASES = ["full", "lora", "replay", "sft", "sparse", "stream", "samples", "evaluated"]
ZERO_CASES = ["loaded", "known", "knownlora", "trunk"]
HALF_CASES = ["bf16", "bf16full", "knownbf16"]
FOUR_CASES = ["full", "lora"]
RESUMED_CASES = ["lora", "sft"]
FAULTS = ["loss", "gradient"]
RECIPES = {"full_fsdp2": "fsdp2", "full_zero3": "zero3", "lora_zero3": "zero3"}


def zeros() -> list[str]:
    return ["zero2", "zero3"] if engine_runs.has_deepspeed() else []


def run_all(folder: Path) -> None:
    """All runs of several processes, and the ones of a single process that they are to equal."""
    engine_runs.first_model().save_pretrained(folder / "start")
    recipes = {recipe: engine for recipe, engine in RECIPES.items() if engine in ("fsdp2", *zeros())}
    _lay_out(folder / "recipes", folder / "start")
    # The checkpoints of 2 processes go on in 4, those of 4 in 2, and both in one.
    moved = [f"{engine}/lora" for engine in ("ddp", "fsdp2+sharded")]
    groups: list[tuple[Any, ...]] = [
        (1, "recipe_runs.py", folder / "recipes", *(f"one/{recipe}" for recipe in recipes)),
        (2, "recipe_runs.py", folder / "recipes", *(f"{engine}/{name}" for name, engine in recipes.items())),
        (2, "engine_runs.py", folder, *_of_two()),
        (2, "engine_checks.py", folder, *_checks_of_two()),
    ]
    if zeros():
        groups += [(1, "engine_checks.py", folder, *_checks_of_one())]
        groups += [(4, "engine_checks.py", folder, *(f"{zero}/universal/sft" for zero in zeros()))]
    four = [f"{engine}/{case}" for engine in ("ddp", "fsdp2+sharded", *zeros()) for case in FOUR_CASES]
    groups += [
        (4, "engine_runs.py", folder, *four, *(f"{job}/2" for job in moved)),
        (2, "engine_runs.py", folder, *(f"{job}/4" for job in moved)),
    ]
    engines.launch(*groups)
    for case in (*CASES, *HALF_CASES, "trunk"):
        engine_runs.train("ddp", case, folder / f"one-{case}")


def _of_two() -> list[str]:
    found = ["ddp", "fsdp2+sharded", *zeros()]
    runs = [f"{engine}/{case}" for engine in found for case in (*CASES, *HALF_CASES)]
    runs += [f"{zero}/{case}" for zero in zeros() for case in ZERO_CASES]
    runs += [f"{engine}/compiled" for engine in found if engine != "zero2"]
    resumed = [f"{engine}/{case}/2" for engine in found for case in RESUMED_CASES]
    return [*runs, "fsdp2/sft", "fsdp2/lora", "fsdp2/summed", *resumed]


def _checks_of_two() -> list[str]:
    faults = [f"{engine}/{fault}" for engine in ("ddp", "fsdp2", *zeros()) for fault in FAULTS]
    return [*faults, "fsdp2/reduced/full", "fsdp2/reduced/summed", *(["zero3/parts"] if zeros() else [])]


def _checks_of_one() -> list[str]:
    return [f"{zero}/{check}/sft" for zero in zeros() for check in ("refused", "convert", "universal")]


def _lay_out(recipes: Path, start: Path) -> None:
    """A model with its tokenizer, and rows to train on, as the command line takes them."""
    shutil.copytree(start, recipes / "start")
    engine_runs.tokenizer_of_rows().save_pretrained(recipes / "start")
    rows = [json.dumps(row) + "\n" for row in engine_runs.ROWS]
    (recipes / "pairs.jsonl").write_text("".join(rows))
