"""One process of test_engine_checks.py: what an engine does at a fault, and how weights in parts are read.

    torchrun --nproc_per_node N engine_checks.py OUT engine/check...

Each process writes what it saw to OUT/<engine>-<check>-<N>.<rank>.json. OUT/start holds a model, saved.
"""

import functools
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import engine_runs
import torch
import torch.distributed as dist

from vrpo.models import load_model
from vrpo.models.partitioned import any_partitioned, local_part, whole
from vrpo.training.fingerprint import hash_of_weights
from vrpo.training.finite import check_weights, not_finite
from vrpo.training.resume import digest_of_weights
from vrpo.training.trunk import _equal
from vrpo.training.zero import frozen_engine_copy

POISONED_STEP = 2


def poison(kind: str, trainer: Any, module: torch.nn.Module, args: Any, output: Any) -> Any:
    """From the poisoned step on, in the last process: a NLL that is NaN, or one whose slope is infinite."""
    is_last = dist.get_rank() == dist.get_world_size() - 1
    if trainer.state.global_step < POISONED_STEP or not is_last or not module.training:
        return None
    nll = output.nll
    output.nll = nll * math.nan if kind == "loss" else nll + (nll - nll.detach()).sqrt()
    return output


def stops(kind: str, engine: str, folder: Path) -> dict[str, Any]:
    """Trains until it stops: with which error, and what is left."""
    trainer = engine_runs.build(engine, "sft", folder)
    trainer.args.save_steps = 1
    trainer.model.register_forward_hook(functools.partial(poison, kind, trainer))
    error = None
    try:
        trainer.train()
    except FloatingPointError as found:
        error = str(found)
    return {
        "error": error,
        "bad": not_finite(trainer.model.named_parameters()),
        "step": trainer.state.global_step,
        "checkpoints": sorted(path.name for path in folder.glob("checkpoint-*")),
    }


def resumes(engine: str, case: str, out: Path, *, is_universal: bool) -> dict[str, Any]:
    """Goes on from the checkpoint of two processes to OUT/<engine>-<case>-<N>-universal, or says why not."""
    name = f"{engine}-{case}-{os.environ['WORLD_SIZE']}-{'universal' if is_universal else 'refused'}"
    checkpoint = out / f"{engine}-{case}-2" / f"checkpoint-{engine_runs.SAVED_STEP}"
    try:
        engine_runs.train(engine, case, out / name, checkpoint, is_universal=is_universal)
    except ValueError as error:
        return {"error": str(error)}
    return {"error": None}


def convert(engine: str, case: str, out: Path) -> dict[str, Any]:
    """The checkpoint of two processes in DeepSpeed's universal form, by the command that the error gives."""
    from deepspeed.checkpoint import ds_to_universal

    folder = out / f"{engine}-{case}-2" / f"checkpoint-{engine_runs.SAVED_STEP}"
    tag = folder / (folder / "latest").read_text()
    words = ["--inject_missing_state", "--input_folder", tag, "--output_folder", f"{tag}_universal"]
    sys.argv = ["ds_to_universal", *map(str, words)]
    ds_to_universal.main(ds_to_universal.parse_arguments())
    return {}


def parts(out: Path) -> dict[str, Any]:
    """A model that ZeRO-3 loaded in parts, beside the same one whole."""
    plain = engine_runs.first_model()
    trainer = engine_runs.build("zero3", "loaded", out / "parts")
    model, other = trainer.model, load_model(out / "start")
    here, there = dict(model.named_parameters()), dict(plain.named_parameters())
    found: dict[str, Any] = {"are_parts": any_partitioned(here.values())}
    found["whole"] = all(torch.equal(whole(here[name]), weight) for name, weight in there.items())
    sizes = torch.tensor([local_part(here[name]).numel() for name in there])
    dist.all_reduce(sizes)
    found["add_up"] = sizes.tolist() == [weight.numel() for weight in there.values()]
    same = functools.partial(_same, here, there)
    found["same"] = [*same(), _equal(model, other)]
    frozen = frozen_engine_copy(trainer.accelerator, model)
    found["copied"] = _equal(model, frozen) and not any(p.requires_grad for p in frozen.parameters())
    # What one process changes, the other cannot see in its own part.
    head = local_part(here["lm_head.weight"])
    if dist.get_rank() == 1:
        head[3] += 1.0
    found["changed"] = [*same(), _equal(model, other), _equal(model, frozen)]
    if dist.get_rank() == 1:
        head[3] = math.nan
    try:
        check_weights(model, trainer.accelerator, 1, "out", "out")
        found["nan"] = None
    except FloatingPointError as error:
        found["nan"] = str(error)
    return found


def reduced(engine: str, case: str, folder: Path) -> list[int]:
    """How many weights have a gradient, in parts, after each pack of the first optimizer step."""
    trainer = engine_runs.build(engine, case, folder)
    trainer.args.max_steps, counts = 1, []
    backward = trainer._backward

    def counted(model: torch.nn.Module, *args: Any) -> None:
        backward(model, *args)
        counts.append(sum(p.grad is not None for p in trainer.model.parameters()))

    trainer._backward = counted
    trainer.train()
    return counts


def _same(here: dict, there: dict) -> list[bool]:
    return [digest(here.items()) == digest(there.items()) for digest in (hash_of_weights, digest_of_weights)]


def main(place: str, *jobs: str) -> None:
    out = Path(place)
    for job in jobs:
        engine, check, *case = job.split("/")
        if check == "parts":
            found = parts(out)
        elif check == "convert":
            found = convert(engine, case[0], out)
        elif check == "reduced":
            found = reduced(engine, case[0], out / f"{engine}-{check}-{case[0]}")
        elif check in ("refused", "universal"):
            found = resumes(engine, case[0], out, is_universal=check == "universal")
        else:
            found = stops(check, engine, out / f"{engine}-{check}")
        name = "-".join([engine, check, *case, os.environ["WORLD_SIZE"]])
        (out / f"{name}.{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
