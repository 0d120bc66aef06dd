"""One process of test_engines.py: `vrpo train` with recipes of examples/scaling, on a toy.

    torchrun --nproc_per_node N recipe_runs.py OUT engine/recipe...

OUT/start is the model, OUT/pairs.jsonl the data. What only fits the large model is replaced by flags; the
engine, its settings and the reference are the recipe's. The engine "one" takes the recipe's engine away.
"""

import os
import sys
from pathlib import Path

import engines
import torch
import yaml

from vrpo.commands.options import parse
from vrpo.commands.table import COMMANDS

FOLDER = Path(__file__).parents[2] / "examples/scaling"
GLOBAL_BATCH = 8


def run(engine: str, recipe: str, out: Path) -> None:
    """Train as the command line does, to OUT/<recipe>-<engine>."""
    settings = yaml.safe_load((FOLDER / f"{recipe}.yaml").read_text())
    if engine == "one":
        for name in ("fsdp", "fsdp_config", "deepspeed"):
            settings.pop(name, None)
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    kept = engines.use("ddp" if engine == "one" else engine)
    output_dir = out / f"{recipe}-{engine}"
    settings |= {
        "model_name_or_path": str(out / "start"),
        "dataset_name": str(out / "pairs.jsonl"),
        "output_dir": str(output_dir),
        "bf16": False,  # whose roundings depend on the engine
        "num_samples": 2,
        "max_tokens_per_pack": 110,
        "per_device_train_batch_size": GLOBAL_BATCH // 2 // world_size,
        "gradient_accumulation_steps": 2,
        "max_steps": 3,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-2,
        "warmup_steps": 0,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "training_report": False,
        "report_to": "none",
        "use_cpu": kept.get("use_cpu", False),
        "accelerator_config": kept.get("accelerator_config"),
    }
    config = out / f"{recipe}-{engine}.{os.environ.get('RANK', 0)}.yaml"
    config.write_text(yaml.safe_dump(settings))
    command = COMMANDS["train"]
    groups, sections = parse(command, [f"--config={config}"])
    command.run(*groups, **sections)


def main(out: str, *jobs: str) -> None:
    os.chdir(FOLDER.parents[1])  # recipes name files of theirs from there
    for job in jobs:
        run(*job.split("/"), Path(out).absolute())


if __name__ == "__main__":
    main(*sys.argv[1:])
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
