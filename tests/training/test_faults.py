"""Nothing is lost: killed anywhere and started again, a run ends as if left alone; faults have outcomes.

More kills: `VRPO_FAULTS=2000 pytest tests/training/test_faults.py`.
"""

import copy
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from trainers import LORA, logged, parameters, trainer_of
from transformers import TrainerCallback

from vrpo.commands.main import main
from vrpo.disk import checksum
from vrpo.training.checkpoints import INCOMPLETE, MANIFEST, checkpoints, fault_of, publish, rotate
from vrpo.training.interrupt import TrainingInterrupted

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
HERE = Path(__file__).parent
KILLS = int(os.environ.get("VRPO_FAULTS", "200"))


def report_of(script: str, kills: int) -> dict:
    """What a script of this folder reports of the runs that it stopped, in a folder that is gone then."""
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a disk would take most of the time
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        env = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        env["DS_ACCELERATOR"] = "cpu"
        env["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), *(path for path in sys.path if path)])
        command = [sys.executable, HERE / script, folder, "--kills", str(kills)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each run is a fork")
def test_train__killed_anywhere_and_started_again_ends_as_the_straight_run():
    report = report_of("fault_runs.py", KILLS)
    assert report["failures"] == []
    assert sum(report["kills"].values()) >= KILLS
    assert min(report["kills"].values()) >= KILLS // 20, report["kills"]
    assert min(report["phases"].values()) >= 1 and min(report["stops"].values()) >= 1, report
    phases = report["phases"]
    assert phases["precomputation"] >= KILLS // 25 and phases["checkpoint"] >= KILLS // 5, phases


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="each process is a fork")
def test_train__one_of_two_processes_that_dies_loses_nothing_under_ddp_and_fsdp2():
    kills = max(4, KILLS // 40)
    report = report_of("fault_two_processes.py", kills)
    assert report["failures"] == []
    assert min(report["kills"].values()) >= kills and report["phases"]["checkpoint"] >= 2, report


class At(TrainerCallback):
    """Does something once, at the end of a step."""

    def __init__(self, step, act):
        self.step, self.act = step, act

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.act()


@pytest.fixture
def made(tmp_path, tiny_model, tokenizer, pair_rows):
    """Makes a trainer of the same start each time."""

    def make(**fields):
        return trainer_of(tmp_path, copy.deepcopy(tiny_model), tokenizer, pair_rows, **SAVING | fields)

    return make


def _fails(monkeypatch, fault: str):
    """From the third step on: what a disk without room, or one that became read-only, does."""
    if fault == "file too large":  # the system's own refusal, in the middle of a file
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
        return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    number = {"no room": errno.ENOSPC, "read-only": errno.EROFS}.get(fault, errno.ENOSPC)

    def refuse(*args, **kwargs):
        if fault == "no room in torch":
            raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")
        if fault == "no room in safetensors":
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise OSError(number, os.strerror(number), "some/file")

    place = "safetensors.torch.serialize_file" if "safetensors" in fault else "torch.save"
    monkeypatch.setattr(place, refuse)
    return monkeypatch.undo


@pytest.mark.parametrize(
    "fault", ["file too large", "no room", "no room in torch", "no room in safetensors", "read-only"]
)
def test_train__a_disk_that_refuses_stops_it_in_one_line_and_older_checkpoints_stay(
    tmp_path, made, monkeypatch, fault
):
    straight = made(output_dir=str(tmp_path / "straight"))
    straight.train()
    mend = []
    trainer = made(callbacks=[At(3, lambda: mend.append(_fails(monkeypatch, fault)))])
    try:
        with pytest.raises(OSError, match=r"the checkpoint checkpoint-4 could not be written: .*") as error:
            trainer.train()
    finally:
        mend[0]()
    assert "\n" not in str(error.value) and "the last checkpoint is" in str(error.value)
    assert [folder.name for folder in checkpoints(tmp_path / "out")] == ["checkpoint-2"]
    assert not (tmp_path / "out" / INCOMPLETE).exists()
    again = made()
    again.train(resume_from_checkpoint=True)
    assert torch.equal(parameters(again.model), parameters(straight.model))
    assert logged(again, "loss") == logged(straight, "loss")


def _flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "missing": lambda path: path.unlink(),
    "flipped": lambda path: _flip(path, path.stat().st_size // 2),
    "unreadable": lambda path: (path.unlink(), path.symlink_to(path)),  # for root, too
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", ["model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_train__true_passes_over_a_damaged_checkpoint_and_says_so(tmp_path, made, caplog, name, damage):
    made().train()
    DAMAGE[damage](tmp_path / "out/checkpoint-4" / name)
    trainer = made()
    trainer.train(resume_from_checkpoint=True)
    told = next(record.message for record in caplog.records if "passed over" in record.message)
    assert "going on from" in told and "checkpoint-2; passed over: checkpoint-4" in told and name in told
    assert fault_of(tmp_path / "out/checkpoint-4", is_plain=True) is None  # written again
    for step in (2, 4):
        (tmp_path / f"out/checkpoint-{step}/optimizer.pt").unlink()
    for word in (True, "auto"):
        with pytest.raises(
            ValueError, match=r"no checkpoint in .* is whole: checkpoint-4 has no optimizer.pt"
        ):
            made().train(resume_from_checkpoint=word)


def test_train__a_second_call_does_not_overwrite_the_first_ones_checkpoints(tmp_path, made):
    trainer = made()
    trainer.train()
    before = (tmp_path / "out/checkpoint-2/model.safetensors").read_bytes()
    with pytest.raises(ValueError, match=r"train\(\) was called before on this trainer"):
        trainer.train()
    assert (tmp_path / "out/checkpoint-2/model.safetensors").read_bytes() == before
    end = parameters(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert torch.equal(parameters(trainer.model), end)


@pytest.fixture
def own_signals():
    """The handlers that Python starts with; a shell starts what runs in its background without SIGINT."""
    handlers = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {signum: signal.signal(signum, handler) for signum, handler in handlers.items()}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("adapter", [False, True])
def test_train__a_signal_saves_after_the_step_and_leaves(tmp_path, made, signum, adapter, own_signals):
    extra = {"peft_config": LORA} if adapter else {}
    straight = made(output_dir=str(tmp_path / "straight"), logging_steps=4, **extra)
    straight.train()
    stopped = made(logging_steps=4, callbacks=[At(3, lambda: os.kill(os.getpid(), signum))], **extra)
    with pytest.raises(TrainingInterrupted, match=r"checkpoint-3 is whole") as error:
        stopped.train()
    assert error.value.code == 128 + signum
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    again = made(logging_steps=4, **extra)
    again.train(resume_from_checkpoint="auto")
    assert torch.equal(parameters(again.model), parameters(straight.model))
    curves = [logged(trainer, "rewards/margins") for trainer in (again, straight)]
    assert curves[0] == curves[1] and logged(again, "loss") == logged(straight, "loss")


def test_main__tells_a_signal_in_one_line_and_by_the_exit_code(monkeypatch, capsys):
    def stop(*args):
        raise TrainingInterrupted(signal.SIGTERM, "out/checkpoint-3")

    monkeypatch.setattr("vrpo.commands.main._dispatch", stop)
    assert main(["train"]) == 143
    assert capsys.readouterr().err.startswith("vrpo: stopped by SIGTERM; out/checkpoint-3 is whole")


def test_train__resumed_at_its_end_takes_no_further_step(tmp_path, made):
    trainer = made()
    trainer.train()
    again = made()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 4
    assert torch.equal(parameters(again.model), parameters(trainer.model))


def test_rotate__deletes_what_an_earlier_run_left_further_on_first(tmp_path):
    for step in (2, 4, 6, 8):
        (tmp_path / f"checkpoint-{step}").mkdir()
    rotate(tmp_path, limit=3, current=4, best=None)
    assert [folder.name for folder in checkpoints(tmp_path)] == [
        "checkpoint-8",
        "checkpoint-4",
        "checkpoint-2",
    ]
    rotate(tmp_path, limit=1, current=4, best=str(tmp_path / "checkpoint-2"))
    assert [folder.name for folder in checkpoints(tmp_path)] == ["checkpoint-4", "checkpoint-2"]


def test_train__the_best_checkpoint_is_named_as_it_is_seen(tmp_path, made, pair_rows):
    trainer = made(eval_dataset=pair_rows, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True)
    trainer.train()
    best = json.loads((tmp_path / "out/checkpoint-4/trainer_state.json").read_text())["best_model_checkpoint"]
    assert best == trainer.state.best_model_checkpoint and Path(best).parent == tmp_path / "out"
    assert Path(best).is_dir()


def test_fault_of__names_the_damaged_shard_of_a_sharded_checkpoint(tmp_path):
    aside = tmp_path / INCOMPLETE / "checkpoint-2"
    shard = "pytorch_model_fsdp_0/__1_0.distcp"
    (aside / shard).parent.mkdir(parents=True)
    (aside / "trainer_state.json").write_text("{}")
    (aside / shard).write_bytes(os.urandom(200_000))
    publish(aside, tmp_path / "checkpoint-2", {"trainer_state.json": checksum(aside / "trainer_state.json")})
    folder = tmp_path / "checkpoint-2"
    assert fault_of(folder) is None and not aside.parent.exists()
    _flip(folder / shard, 100_000)  # far from both ends
    assert fault_of(folder) == f"is damaged: {shard} is not the file that was written"
    assert fault_of(folder, checksum=None) is None  # names and sizes only
    os.truncate(folder / shard, 7)
    assert fault_of(folder, checksum=None) == f"is damaged: {shard} has 7 of 200000 bytes"


def test_fault_of__understands_manifests_without_checksums(tmp_path):
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    (folder / "trainer_state.json").write_text("{}")
    ends = hashlib.sha256(b"{}").hexdigest()
    files = {"trainer_state.json": {"size": 2, "ends": ends}}
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}))
    assert fault_of(folder) is None
    (folder / "trainer_state.json").write_text("[]")
    assert fault_of(folder) == "is damaged: trainer_state.json is not the file that was written"


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_train__a_damaged_base_model_is_told_and_written_again_once_removed(tmp_path, made, damage):
    straight = made(peft_config=LORA)
    straight.train()
    base = tmp_path / "out/base_model"
    before = (base / "model.safetensors").read_bytes()
    DAMAGE[damage](base / "model.safetensors")
    with pytest.raises(ValueError, match="only its files are damaged, remove the folder, and it is written"):
        made(peft_config=LORA).train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    shutil.rmtree(base)
    again = made(peft_config=LORA)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-2"))
    assert (base / "model.safetensors").read_bytes() == before
    assert torch.equal(parameters(again.model), parameters(straight.model))


def test_save_model__a_full_disk_leaves_the_earlier_model(tmp_path, made, monkeypatch):
    trainer = made()
    trainer.save_model()
    before = (tmp_path / "out/model.safetensors").read_bytes()
    trainer.train()
    undo = _fails(monkeypatch, "no room in torch")  # after the weights
    with pytest.raises(OSError, match=r"^the model could not be written to .*out: .*inline_container"):
        trainer.save_model()
    undo()
    assert (tmp_path / "out/model.safetensors").read_bytes() == before
    assert not (tmp_path / "out" / INCOMPLETE).exists()
    trainer.save_model()
    assert (tmp_path / "out/model.safetensors").read_bytes() != before
