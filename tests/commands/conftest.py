"""A tiny model that `vrpo sft` made, and files of rows, for the tests of the commands."""

import json

import pytest
import yaml
from tiny import SIZES

from vrpo.commands.main import main


@pytest.fixture(scope="session")
def files(tmp_path_factory, pair_rows, completion_rows):
    """A folder with pairs.jsonl, sft.jsonl and sft.yaml (a new tiny model, two steps)."""
    folder = tmp_path_factory.mktemp("cli")
    for name, rows in (("pairs", pair_rows), ("sft", completion_rows)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "dataset_name": str(folder / "sft.jsonl"),
        "output_dir": str(folder / "sft"),
        "new_model": SIZES,
        "max_length": 64,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": "1e-2",
        "warmup_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 0,
    }
    (folder / "sft.yaml").write_text(yaml.safe_dump(settings))
    return folder


@pytest.fixture(scope="session")
def model_path(files):
    """The model that `vrpo sft` made."""
    assert main(["sft", "--config", str(files / "sft.yaml")]) == 0
    return str(files / "sft")
