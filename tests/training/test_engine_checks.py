"""Faults under each engine end all processes alike, and what lies in parts is read, resumed or refused."""

import json
import os
import shutil
from pathlib import Path

import engine_runs
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from test_engines import ENGINES, assert_equal, deepspeed

from vrpo.commands.main import main
from vrpo.models import load_model
from vrpo.models.paths import check_model_path

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_kwargs)?. is deprecated:FutureWarning"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="each process is a fork"),
]
SAVED = f"checkpoint-{engine_runs.SAVED_STEP}"
ALL = ["ddp", "fsdp2", *ENGINES[3:]]


def seen(out: Path, check: str, world_size: int = 2) -> list:
    """What each process saw."""
    return [json.loads((out / f"{check}-{world_size}.{rank}.json").read_text()) for rank in range(world_size)]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("engine", ALL)
def test_train__a_value_that_is_not_finite_in_one_process_stops_all(out, engine, fault):
    first, second = seen(out, f"{engine}-{fault}")
    assert first["error"].startswith(f"{fault} is not finite at step 2")
    assert str(out / f"{engine}-{fault}" / "checkpoint-2") in first["error"]
    if fault == "loss":  # the examples are the other process's
        assert "(rows of the dataset)" in first["error"]
        assert first["error"] == second["error"]
    for found in (first, second):
        assert found["error"].startswith(f"{fault} is not finite at step 2")
        assert found["step"] == 2 and not found["bad"]  # the weights are those of before the step
        assert found["checkpoints"] == ["checkpoint-1", "checkpoint-2"]


@pytest.mark.slow
@deepspeed
def test_partitioned__weights_are_read_whole_and_in_parts(out):
    for rank, found in enumerate(seen(out, "zero3-parts")):
        assert found["are_parts"] and found["whole"] and found["add_up"] and found["copied"]
        assert found["same"] == [True, True, True]
        # Changed in one process: the hash, and what compares with an unchanged model, tell it in both.
        assert found["changed"][0] is False and found["changed"][2:] == [False, False]
        where = "lm_head.weight" if rank else r"(in another process)"
        assert found["nan"].startswith(f"weights are not finite after step 1: {where}")


@pytest.mark.slow
def test_train__fsdp2_reduces_gradients_after_every_pack(out):
    """And with sync_each_batch: false only in the last one, holding whole gradients until then."""
    for counts in seen(out, "fsdp2-reduced-full"):
        assert len(counts) >= 4 and len(set(counts)) == 1 and counts[0] > 0
    for counts in seen(out, "fsdp2-reduced-summed"):
        assert counts[0] == 0 and counts[-1] > 0


@pytest.mark.slow
@deepspeed
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_resume__under_zero_on_another_number_of_processes_is_refused_with_the_cure(out, engine):
    (found,) = seen(out, f"{engine}-refused-sft", world_size=1)
    folder = out / f"{engine}-sft-2" / SAVED
    assert "was written by 2 processes under DeepSpeed" in found["error"]
    assert "this run has 1. Launch 2 processes, or convert it" in found["error"]
    assert f"ds_to_universal --inject_missing_state --input_folder {folder}/global_step" in found["error"]
    assert '"checkpoint": {"load_universal": true}' in found["error"]


@pytest.mark.slow
@deepspeed
@pytest.mark.parametrize("world_size", [1, 4])
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_resume__under_zero_a_converted_checkpoint_goes_on_in_any_number(out, engine, world_size):
    assert all(found["error"] is None for found in seen(out, f"{engine}-universal-sft", world_size))
    assert_equal(out / f"{engine}-sft-{world_size}-universal", out / "one-sft")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2sharded", pytest.param("zero3", marks=deepspeed)])
def test_load_model__of_a_checkpoint_in_parts_says_how_to_join_them(out, tmp_path, capsys, engine):
    folder = tmp_path / "checkpoint"
    shutil.copytree(out / f"{engine}-sft-2" / SAVED, folder)
    with pytest.raises(ValueError, match="holds its weights in the parts of") as error:
        load_model(folder)
    cure = str(error.value)
    rows = out / "recipes" / "pairs.jsonl"
    flags = ["train", f"--model_name_or_path={folder}", f"--dataset_name={rows}", "--use_cpu"]
    assert main([*flags, f"--output_dir={tmp_path / 'run'}"]) == 2
    assert "holds its weights in the parts of" in capsys.readouterr().err
    inside = (
        folder / "pytorch_model_fsdp_0" if engine == "fsdp2sharded" else next(folder.glob("global_step*"))
    )
    with pytest.raises(ValueError, match=r"model_name_or_path: .* holds its weights in the parts of"):
        check_model_path(str(inside), argument="model_name_or_path")
    if engine == "fsdp2sharded":
        assert f"accelerate merge-weights {inside} {folder}" in cure
        merge_fsdp_weights(str(inside), str(folder))
    else:
        assert f"python {folder}/zero_to_fp32.py {folder} {folder} --safe_serialization" in cure
        from deepspeed.utils.zero_to_fp32 import convert_zero_checkpoint_to_fp32_state_dict

        convert_zero_checkpoint_to_fp32_state_dict(str(folder), str(folder), safe_serialization=True)
    model = load_model(folder, dtype=torch.float64)
    right = load_model(out / "one-sft" / SAVED, dtype=torch.float64)
    for (name, weight), expected in zip(model.named_parameters(), right.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=2e-6, msg=name)
    assert load_file(folder / "model.safetensors")
