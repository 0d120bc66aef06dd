"""DDP, FSDP2, ZeRO-2 and ZeRO-3 on 2 and 4 processes end where one process ends, resumed runs too.

All runs of a launch share its start (engine_runs.py). DDP and FSDP2 train in float64; DeepSpeed knows float32
at most, and is compared with the float64 run.
"""

import json
import shutil
from pathlib import Path

import engine_runs
import engines
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from vrpo.models import load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:.(is_)?gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning"
)
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
FULL_CASES = ["full", "lora", "replay", "sft", "sparse"]


def jobs(world_size: int) -> list[str]:
    """What a launch of this many processes runs."""
    found = ["ddp", "fsdp2+sharded", *(("zero2", "zero3") if engine_runs.has_deepspeed() else ())]
    cases = [*FULL_CASES, "bf16"] if world_size == 2 else ["lora"]
    runs = [f"{engine}/{case}" for engine in found for case in cases if (engine, case) != ("zero3", "full")]
    if world_size == 4:
        return runs
    resumed = [f"{engine}/{case}/2" for engine in found for case in ("lora", "sft")]
    return [*runs, "fsdp2/sft", "fsdp2/lora", *resumed]


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """The folders of all runs; one process trains in here."""
    folder = tmp_path_factory.mktemp("engines")
    for case in engine_runs.CASES:
        engine_runs.train("ddp", case, folder / f"one-{case}")
    engines.launch("engine_runs.py", 2, folder, *jobs(2))
    # The checkpoints of 2 processes go on in 4, those of 4 in 2, and both in one.
    moved = [f"{engine}/lora" for engine in ("ddp", "fsdp2+sharded")]
    engines.launch("engine_runs.py", 4, folder, *jobs(4), *(f"{job}/2" for job in moved))
    engines.launch("engine_runs.py", 2, folder, *(f"{job}/4" for job in moved))
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (path,) = folder.glob("*.safetensors")
    return load_file(path)


def log(folder: Path) -> list[dict]:
    return json.loads((folder / "log.json").read_text())


def assert_equal(found: Path, expected: Path) -> None:
    """Same steps, same log, same weights in the saved model."""
    is_double = not found.name.startswith("zero")
    told, known = log(found), log(expected)
    assert [entry["step"] for entry in told] == [1, 2, 3, 4]
    for entry, other in zip(told, known, strict=True):
        for key in other.keys() - MEASURED:
            # A margin is a small difference of ELBOs of some 100 nats.
            relative, absolute = (1e-5, 1e-9) if is_double else (1e-4, 1e-3)
            assert entry[key] == pytest.approx(other[key], rel=relative, abs=absolute), (key, entry["step"])
    saved, right = weights(found), weights(expected)
    assert saved.keys() == right.keys()
    for name, weight in right.items():
        rtol, atol = (1e-8, 1e-10) if is_double else (1e-5, 2e-6)
        torch.testing.assert_close(saved[name].double(), weight, rtol=rtol, atol=atol, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL_CASES)
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_train__two_processes_of_an_engine_equal_one(out, engine, case):
    if (engine, case) == ("zero3", "full"):
        pytest.skip("ZeRO-3 holds no second model as reference (refused with a reason)")
    assert_equal(out / f"{engine}-{case}-2", out / f"one-{case}")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_train__four_processes_of_an_engine_equal_one(out, engine):
    assert_equal(out / f"{engine}-lora-4", out / "one-lora")


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
@pytest.mark.parametrize("engine", ["ddp", "fsdp2sharded", *ENGINES[3:]])
def test_train__in_bf16_starts_at_margin_zero_and_stays_near(out, engine):
    told, known = log(out / f"{engine}-bf16-2"), log(out / "one-bf16")
    for key in ("rewards/margins", "rewards/chosen", "rewards/rejected"):
        assert told[0][key] == 0.0, key
    for entry, other in zip(told, known, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], abs=0.05), entry["step"]
