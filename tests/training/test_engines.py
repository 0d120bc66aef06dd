"""DDP, FSDP2, ZeRO-2 and ZeRO-3 on 2 and 4 processes end where one process ends, resumed runs too.

All runs of a launch share its start (engine_runs.py). DDP and FSDP2 train in float64; DeepSpeed knows float32
at most, and is compared with the float64 run.
"""

import json
import os
import shutil
from pathlib import Path

import engine_runs
import pytest
import torch
from engine_plan import CASES, FOUR_CASES, HALF_CASES
from peft import PeftModel
from safetensors.torch import load_file

from vrpo.generation.callback import SAMPLES_FILE
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
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", ENGINES[4]])
def test_train__compiled_layers_under_an_engine_equal_eager_ones(out, engine):
    assert_equal(out / f"{engine}-compiled-2", out / "one-full")


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
def test_train__fsdp2_may_add_up_whole_gradients_and_ends_the_same(out):
    """sync_each_batch: false, as accelerate has it by default."""
    assert_equal(out / "fsdp2-summed-2", out / "one-full")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_evaluate__before_between_and_after_steps_gives_what_one_process_gets(out, engine):
    told, known = (
        json.loads((out / run / "eval.json").read_text())
        for run in (f"{engine}-evaluated-2", "one-evaluated")
    )
    assert [entry["step"] for entry in told] == [0, 2, 4]
    for entry, other in zip(told, known, strict=True):
        for key in (key for key in other if not key.endswith(("runtime", "per_second", "time"))):
            assert entry[key] == pytest.approx(other[key], rel=1e-4, abs=1e-3), (key, entry["step"])


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_callback__answers_are_those_of_one_process(out, engine):
    found = [(out / run / SAMPLES_FILE).read_text() for run in (f"{engine}-samples-2", "one-samples")]
    assert found[0] == found[1]
    steps = [json.loads(line)["step"] for line in found[0].splitlines()]
    assert steps == [0, 0, 2, 2, 4, 4]


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
