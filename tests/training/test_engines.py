"""DDP, FSDP2, ZeRO-2 and ZeRO-3 on 2 and 4 processes end where one process ends, resumed runs too.

All runs of a launch share its start (engine_runs.py). DDP and FSDP2 train in float64; DeepSpeed knows float32
at most, and is compared with the float64 run.
"""

import json
import os
import shutil
from pathlib import Path

import engine_runs
import engines
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from vrpo.models import load_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each process is a fork"),
]
deepspeed = pytest.mark.skipif(
    not engine_runs.has_deepspeed(),
    reason="deepspeed is not installed",
)
ENGINES = ["ddp", "fsdp2sharded", "fsdp2", *(pytest.param(f"zero{n}", marks=deepspeed) for n in (2, 3))]
MEASURED = {
    "vrpo/tokens_per_second",
    "vrpo/peak_memory_gb",
    "vrpo/replay_drift",
}  # of each machine and process
CASES = ["full", "lora", "replay", "sft", "sparse"]
ZERO_CASES = ["loaded", "known", "knownlora", "trunk"]
HALF_CASES = ["bf16", "bf16full", "knownbf16"]
FOUR_CASES = ["full", "lora"]


def jobs(world_size: int) -> list[str]:
    """What a launch of this many processes runs."""
    zeros = ["zero2", "zero3"] if engine_runs.has_deepspeed() else []
    found = ["ddp", "fsdp2+sharded", *zeros]
    if world_size == 4:
        return [f"{engine}/{case}" for engine in found for case in FOUR_CASES]
    runs = [f"{engine}/{case}" for engine in found for case in (*CASES, *HALF_CASES)]
    runs += [f"{engine}/{case}" for engine in zeros for case in ZERO_CASES]
    resumed = [f"{engine}/{case}/2" for engine in found for case in ("lora", "sft")]
    return [*runs, "fsdp2/sft", "fsdp2/lora", *resumed]


def recipe_engines() -> dict[str, str]:
    """The recipes for many GPUs, and the engine of each, where it is installed."""
    found = {"full_fsdp2": "fsdp2", "full_zero3": "zero3", "lora_zero3": "zero3"}
    return {r: e for r, e in found.items() if engine_runs.has_deepspeed() or not e.startswith("zero")}


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folders of all runs; one process trains in here."""
    folder = tmp_path_factory.mktemp("engines")
    engine_runs.first_model().save_pretrained(folder / "start")
    # The checkpoints of 2 processes go on in 4, those of 4 in 2, and both in one.
    moved = [f"{engine}/lora" for engine in ("ddp", "fsdp2+sharded")]
    recipes = folder / "recipes"
    recipes.mkdir()
    shutil.copytree(folder / "start", recipes / "start")
    engine_runs.tokenizer_of_rows().save_pretrained(recipes / "start")
    (recipes / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in engine_runs.ROWS))
    engines.launch(
        (1, "recipe_runs.py", recipes, *(f"one/{recipe}" for recipe in recipe_engines())),
        (
            2,
            "recipe_runs.py",
            recipes,
            *(f"{engine}/{recipe}" for recipe, engine in recipe_engines().items()),
        ),
        (2, "engine_runs.py", folder, *jobs(2)),
        (4, "engine_runs.py", folder, *jobs(4), *(f"{job}/2" for job in moved)),
        (2, "engine_runs.py", folder, *(f"{job}/4" for job in moved)),
    )
    for case in (*CASES, *HALF_CASES, "trunk"):
        engine_runs.train("ddp", case, folder / f"one-{case}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def log(folder: Path) -> list[dict]:
    return json.loads((folder / "log.json").read_text())


def assert_equal(found: Path, expected: Path) -> None:
    """Same steps, same log, same weights in the saved model."""
    told, known = log(found), log(expected)
    assert [entry["step"] for entry in told] == [1, 2, 3, 4]
    assert_equal_ends(found, expected, told, known, is_double=not found.name.startswith("zero"))


def assert_equal_ends(found: Path, expected: Path, told: list, known: list, *, is_double: bool) -> None:
    for entry, other in zip(told, known, strict=True):
        for key in other.keys() - MEASURED:
            # A margin is a small difference of ELBOs of some 100 nats.
            relative, absolute = (1e-5, 1e-9) if is_double else (1e-4, 1e-3)
            assert entry[key] == pytest.approx(other[key], rel=relative, abs=absolute), (key, entry["step"])
    saved, right = weights(found), weights(expected)
    assert saved.keys() == right.keys()
    for name, weight in right.items():
        rtol, atol = (1e-8, 1e-10) if is_double else (1e-5, 2e-6)
        torch.testing.assert_close(saved[name].double(), weight.double(), rtol=rtol, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_train__two_processes_of_an_engine_equal_one(out, engine, case):
    assert_equal(out / f"{engine}-{case}-2", out / f"one-{case}")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "plain"),
    [("loaded", "full"), ("known", "full"), ("knownlora", "lora"), ("trunk", "trunk")],
)
@pytest.mark.parametrize("engine", ENGINES[3:])
def test_train__under_zero_a_reference_is_loaded_known_or_shares_a_trunk(out, engine, case, plain):
    """As one process that computes a frozen copy, or the adapter off, in each step."""
    assert_equal(out / f"{engine}-{case}-2", out / f"one-{plain}")
    assert (out / f"{engine}-{case}-2" / "reference_elbos").exists() == case.startswith("known")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "engine"),
    [
        ("full_fsdp2", "fsdp2"),
        pytest.param("full_zero3", "zero3", marks=deepspeed),
        pytest.param("lora_zero3", "zero3", marks=deepspeed),
    ],
)
def test_recipe__on_two_processes_ends_where_one_process_ends(out, recipe, engine):
    """examples/scaling from the command line, the model loaded as the engine loads it."""
    found, expected = (out / "recipes" / f"{recipe}-{name}" for name in (engine, "one"))
    told, known = (
        [
            entry
            for entry in json.loads((folder / "trainer_state.json").read_text())["log_history"]
            if "loss" in entry
        ]
        for folder in (found, expected)
    )
    assert [entry["step"] for entry in told] == [1, 2, 3]
    assert told[0]["rewards/margins"] == 0.0 and told[-1]["rewards/margins"] > 0.0
    assert_equal_ends(found, expected, told, known, is_double=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", FOUR_CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_train__four_processes_of_an_engine_equal_one(out, engine, case):
    assert_equal(out / f"{engine}-{case}-4", out / f"one-{case}")


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "sft"])
@pytest.mark.parametrize("engine", ENGINES)
def test_save_model__writes_a_whole_model_under_every_engine(out, engine, case):
    """From FULL_STATE_DICT and from SHARDED_STATE_DICT; and it loads."""
    folder = out / f"{engine}-{case}-2"
    assert_equal(folder, out / f"one-{case}")
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "README.md", "training_args.bin"} <= names
    checkpoint = {path.name for path in (folder / f"checkpoint-{engine_runs.SAVED_STEP}").iterdir()}
    assert {"tokenizer.json", "trainer_state.json", "vrpo_run.json"} <= checkpoint
    if case == "sft":
        assert "config.json" in names & checkpoint
        loaded = dict(load_model(folder, dtype=torch.float64).named_parameters())
        right = dict(load_model(out / "one-sft", dtype=torch.float64).named_parameters())
        assert loaded.keys() == right.keys()
        for name, weight in right.items():
            torch.testing.assert_close(loaded[name], weight, rtol=1e-5, atol=2e-6, msg=name)
    else:
        assert {"adapter_config.json", "adapter_model.safetensors"} <= names & checkpoint
        base = load_model(out / "one-lora" / "base_model", dtype=torch.float64)
        model = PeftModel.from_pretrained(base, str(folder))
        assert any("lora_A" in name for name, _ in model.named_parameters())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["lora", "sft"])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_resume__in_the_middle_of_an_epoch_ends_where_the_straight_run_ends(out, engine, case):
    assert_equal(out / f"{engine}-{case}-2-from-2", out / f"one-{case}")


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded"])
def test_resume__on_another_number_of_processes(out, engine, before, after):
    assert_equal(out / f"{engine}-lora-{after}-from-{before}", out / "one-lora")


@pytest.mark.slow
@pytest.mark.parametrize(("case", "before"), [("lora", 2), ("lora", 4), ("sft", 2)])
def test_resume__on_one_process(out, tmp_path, case, before):
    folder = tmp_path / "run"  # a copy: training writes beside the checkpoint
    shutil.copytree(out / f"ddp-{case}-{before}", folder)
    engine_runs.train("ddp", case, folder, folder / f"checkpoint-{engine_runs.SAVED_STEP}")
    assert_equal(folder, out / f"one-{case}")


@pytest.mark.slow
@pytest.mark.parametrize("case", HALF_CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_train__in_bf16_starts_at_margin_zero_and_stays_near(out, engine, case):
    told, known = log(out / f"{engine}-{case}-2"), log(out / f"one-{case}")
    for key in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert told[0][key] == 0.0, key
    for entry, other in zip(told, known, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], abs=0.05), entry["step"]
