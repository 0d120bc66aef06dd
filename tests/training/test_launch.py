"""Whatever would silently run under DDP, alone or several times over is refused, with how to launch."""

import pytest
import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from trainers import config

import vrpo.training.config as config_module
from vrpo import VRPOConfig
from vrpo.training.launch import check_launch

ZERO = {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("fields", "flags", "message"),
    [
        ({"fsdp": True}, {}, "fsdp=True does nothing with use_cpu=True"),
        ({"fsdp": "full_shard"}, {}, "fsdp='full_shard' does nothing with use_cpu=True"),
        ({"deepspeed": ZERO}, {}, "deepspeed does nothing with use_cpu=True"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true .* does nothing with use_cpu=True"),
        (
            {"use_cpu": False, "fsdp": True},
            {"ACCELERATE_USE_CPU": "true"},
            "fsdp=True does nothing with use_cpu",
        ),
        ({"use_cpu": False, "fsdp": True}, {}, "fsdp=True shards a model .* this run is one: .*torchrun"),
        ({"use_cpu": False}, {"ACCELERATE_USE_FSDP": "true"}, "ACCELERATE_USE_FSDP=true .* this run is one"),
        ({"use_cpu": False, "deepspeed": ZERO}, {}, "deepspeed needs a launcher, also for one process"),
        ({"fsdp": True, "deepspeed": ZERO}, {}, "fsdp=True and deepspeed are two engines"),
        ({"fsdp": True}, {"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp=True and ACCELERATE_USE_DEEPSPEED=true"),
        (
            {"deepspeed": ZERO},
            {"ACCELERATE_USE_FSDP": "true"},
            "ACCELERATE_USE_FSDP=true .* and deepspeed are",
        ),
        ({}, {"ACCELERATE_USE_MEGATRON_LM": "true"}, "asks for Megatron-LM, which is not supported"),
        ({}, {"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "asks for a parallelism_config"),
        (
            {"use_cpu": False},
            {"WORLD_SIZE": "2"},
            "2 processes were launched.*Set use_cpu=True",
        ),
        (
            {"use_cpu": False},
            {"OMPI_COMM_WORLD_SIZE": "4"},
            "4 processes were launched, and this one trains by",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_config__refuses_a_launch_that_falls_back_silently(tmp_path, monkeypatch, fields, flags, message):
    monkeypatch.setattr(config_module, "is_deepspeed_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, value in flags.items():
        monkeypatch.setenv(name, value)
    if "deepspeed" in fields or "ACCELERATE_USE_DEEPSPEED" in flags:
        pytest.importorskip("deepspeed")
    with pytest.raises(ValueError, match=message) as error:
        config(tmp_path, bf16=False, **fields)
    assert "\n" not in str(error.value)


def slurm(monkeypatch, **flags):
    for name, value in flags.items():
        monkeypatch.setenv(name, value)


STEP = {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}
TORCHRUN = {"WORLD_SIZE": "1", "GROUP_WORLD_SIZE": "1"}  # and ranks, at which torch would begin to listen


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (STEP, "srun started 2 tasks, and each would train by itself.*torchrun --nnodes.*unset SLURM_NTASKS"),
        ({"SLURM_NTASKS": "8"}, "the SLURM allocation has 8 tasks, and this process would train by itself"),
        (STEP | TORCHRUN, "srun started 2 tasks, and the torchrun of this one knows of 1: each"),
        (
            STEP | {"PMI_SIZE": "2", "PMI_RANK": "1"},
            "2 processes were launched, and this one trains by itself",
        ),
    ],
)
def test_config__refuses_slurm_tasks_that_nothing_joins(tmp_path, monkeypatch, flags, message):
    """srun, python in an allocation of several tasks, two torchruns that are strangers, MPI under srun."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    slurm(monkeypatch, **flags)
    with pytest.raises(ValueError, match=message) as error:
        config(tmp_path, use_cpu=False)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "flags",
    [
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},  # sbatch --ntasks=1
        {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"},  # sbatch that was told no number
        {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"},  # srun of one task
        {"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "1"},  # the same inside a larger allocation
        {"SLURM_NTASKS": "8"} | TORCHRUN,  # torchrun in the script of an allocation of eight tasks
        STEP | TORCHRUN | {"GROUP_WORLD_SIZE": "2"},  # one torchrun a node that know each other
    ],
)
def test_config__takes_what_slurm_starts_as_one_run(tmp_path, monkeypatch, flags):
    slurm(monkeypatch, **flags)
    assert config(tmp_path).world_size == 1


def test_config__deepspeed_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setattr(config_module, "is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match="deepspeed needs the package deepspeed"):
        config(tmp_path, deepspeed="ds.json")


@pytest.mark.parametrize("word", ["false", "False"])
def test_config__fsdp_may_be_switched_off_by_a_word(tmp_path, word):
    assert config(tmp_path, fsdp=word).fsdp is False


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"even_batches": False}, "MULTI_CPU", "even_batches must be True with 2 processes"),
        ({"split_batches": True}, "MULTI_CPU", "split_batches must be False with 2 processes"),
        ({}, "MULTI_CPU", "fsdp=True does nothing on CPUs"),
    ],
)
def test_check_launch__several_processes(tmp_path, monkeypatch, settings, kind, message):
    args: VRPOConfig = config(tmp_path, accelerator_config=settings)
    check_launch(args)  # one process: nobody waits
    state = PartialState()
    monkeypatch.setattr(state, "num_processes", 2)
    monkeypatch.setattr(state, "distributed_type", DistributedType[kind])
    if not settings:
        check_launch(args)
        args.fsdp = True
    with pytest.raises(ValueError, match=message):
        check_launch(args)


@pytest.mark.parametrize("name", ["nccl", "gloo", "nonsense"])
def test_config__a_backend_is_of_several_processes(tmp_path, name):
    with pytest.raises(ValueError, match=f"ddp_backend='{name}' is how several processes talk"):
        config(tmp_path, ddp_backend=name)
