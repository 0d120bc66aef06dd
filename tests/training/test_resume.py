"""A run goes on as what it was, from a whole checkpoint; nothing is taken from another run, or destroyed."""

import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from trainers import LORA, config, logged, parameters, trainer_of

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.training.checkpoints import MANIFEST
from vrpo.training.resume import LOCK_FILE, RUN_FILE, checkpoint_to_resume, digest_of_dataset

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}


@pytest.fixture
def stopped(tmp_path, tiny_model, tokenizer, pair_rows):
    """A run with the checkpoints 2 and 4; gives a function that makes a trainer to go on with."""
    start = {name: weight.clone() for name, weight in tiny_model.state_dict().items()}
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **SAVING).train()

    def again(rows=pair_rows, scale=1.0, **fields):
        tiny_model.load_state_dict({name: weight * scale for name, weight in start.items()})
        return trainer_of(tmp_path, tiny_model, tokenizer, rows, **{**SAVING, "max_steps": 6, **fields})

    return again


def test_train__true_and_more_steps_go_on_from_the_last_checkpoint(tmp_path, stopped):
    trainer = stopped()
    trainer.train(resume_from_checkpoint="true")
    assert trainer.state.global_step == 6
    run = json.loads((tmp_path / "out/checkpoint-6" / RUN_FILE).read_text())
    assert run["settings"]["beta"] == 0.2 and run["trainer"] == "vrpo"


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
def test_train__refuses_a_checkpoint_without_its_optimizer_or_schedule(tmp_path, stopped, name, caplog):
    (tmp_path / "out/checkpoint-4" / name).unlink()
    last = str(tmp_path / "out/checkpoint-4")
    with pytest.raises(ValueError, match=f"has no {name}, so Adam and the warm-up would start again"):
        stopped().train(resume_from_checkpoint=last)
    stopped(save_only_model=True).train(resume_from_checkpoint=last)
    assert f"has no {name}: optimizer and schedule start again" in caplog.text


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "model.safetensors", "trainer_state.json", RUN_FILE]
)
def test_train__refuses_a_damaged_checkpoint_by_name(tmp_path, stopped, name):
    path = tmp_path / "out/checkpoint-4" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"checkpoint-4 is damaged: {name} has") as error:
        stopped().train(resume_from_checkpoint=str(path.parent))
    assert "\n" not in str(error.value)
    (path.parent / MANIFEST).unlink()  # as transformers' Trainer leaves a checkpoint
    with pytest.raises(ValueError, match=f"checkpoint-4 is damaged: {name} cannot be opened") as error:
        stopped().train(resume_from_checkpoint=str(path.parent))
    assert "\n" not in str(error.value)


def test_train__refuses_to_go_on_with_other_data(stopped, pair_rows):
    rows = pair_rows.to_list()
    rows[5] = rows[5] | {"chosen": " something else."}
    with pytest.raises(ValueError, match="of another run: the training data"):
        stopped(rows=Dataset.from_list(rows)).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="of another run: the training data"):
        stopped(rows=pair_rows.select(range(11))).train(resume_from_checkpoint=True)


def test_train__refuses_to_go_on_with_another_seed_or_start(stopped):
    with pytest.raises(ValueError, match=r"of another run: seed \(42 -> 7\)"):
        stopped(seed=7).train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="of another run: the weights of the reference"):
        stopped(scale=1.5).train(resume_from_checkpoint=True)


def test_train__tells_what_was_changed_on_purpose(stopped, caplog):
    stopped(learning_rate=5e-3, beta=0.4, num_samples=4).train(resume_from_checkpoint=True)
    told = next(record.message for record in caplog.records if "with other settings" in record.message)
    for change in ("learning_rate 0.01 -> 0.005", "beta 0.2 -> 0.4", "num_samples 2 -> 4"):
        assert change in told
    assert "mask_design" not in told


def test_train__goes_on_with_an_adapter_and_refuses_another_base(tmp_path, tiny_model, tokenizer, pair_rows):
    base = copy.deepcopy(tiny_model)
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, peft_config=LORA, **SAVING).train()
    fields = SAVING | {"max_steps": 6, "peft_config": LORA}
    good = trainer_of(tmp_path, copy.deepcopy(base), tokenizer, pair_rows, **fields)
    good.train(resume_from_checkpoint=True)
    assert good.state.global_step == 6
    with torch.no_grad():
        for weight in base.parameters():
            weight.mul_(1.01)
    with pytest.raises(ValueError, match="base model under the adapter"):
        trainer_of(tmp_path, base, tokenizer, pair_rows, **fields).train(resume_from_checkpoint=True)


def test_train__keeps_off_the_checkpoints_of_another_run(tmp_path, stopped):
    with pytest.raises(ValueError, match="holds a checkpoint of another run, checkpoint-4"):
        stopped(beta=0.4).train()
    stopped(beta=0.4, save_strategy="no").train()  # writes no checkpoint, so none is in the way
    (tmp_path / "out/checkpoint-4" / RUN_FILE).unlink()
    with pytest.raises(ValueError, match="holds a checkpoint of another run, checkpoint-4"):
        stopped().train()
    assert (tmp_path / "out/checkpoint-4/model.safetensors").exists()


def test_train__the_same_run_may_start_again(stopped):
    trainer = stopped(max_steps=4)
    trainer.train()
    assert trainer.state.global_step == 4


@dataclass
class OwnConfig(VRPOConfig):
    """Fields that JSON has no form for."""

    source: Path = Path("rows")
    bounds: tuple = (1, 2)


def test_train__fields_of_an_own_config_belong_to_the_run(tmp_path, tiny_model, tokenizer, pair_rows):
    def again(**fields):
        args = config(tmp_path, OwnConfig, **SAVING, **fields)
        model = copy.deepcopy(tiny_model)
        VRPOTrainer(model, args=args, train_dataset=pair_rows, processing_class=tokenizer).train()

    again()
    again()
    with pytest.raises(ValueError, match="holds a checkpoint of another run"):
        again(bounds=(1, 3))


def test_train__two_runs_do_not_share_an_output_dir(tmp_path, tiny_model, tokenizer, pair_rows):
    (tmp_path / "out").mkdir()
    lock = tmp_path / "out" / LOCK_FILE
    code = (
        f"import sys; from filelock import FileLock; lock = FileLock({str(lock)!r}); lock.acquire()\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    other = subprocess.Popen([sys.executable, "-c", code], **pipes)
    try:
        assert other.stdout.readline() == "held\n"
        trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1)
        with pytest.raises(ValueError, match="is in use by another training run"):
            trainer.train()
        other.kill()  # the lock of a process that died is free
        other.wait()
        trainer.train()
        trainer.train()  # and so is that of a run that ended
    finally:
        other.kill()
        other.communicate()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, None),
        (False, None),
        ("false", None),
        ("no", None),
        ("No", None),
        ("", None),
        (True, "checkpoint-10"),
        ("true", "checkpoint-10"),
        ("TRUE", "checkpoint-10"),
        ("yes", "checkpoint-10"),
        ("auto", "checkpoint-10"),
    ],
)
def test_checkpoint_to_resume__reads_words(tmp_path, value, expected):
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}/trainer_state.json").write_text("{}")
    found = checkpoint_to_resume(value, str(tmp_path))
    assert (found and Path(found).name) == expected


def test_checkpoint_to_resume__says_what_is_missing(tmp_path):
    assert checkpoint_to_resume(str(tmp_path), "nowhere") == str(tmp_path)
    with pytest.raises(ValueError, match="has no checkpoint"):
        checkpoint_to_resume(True, str(tmp_path))
    assert checkpoint_to_resume("auto", str(tmp_path)) is None
    with pytest.raises(ValueError, match="there is no folder 'last'; 'true' takes the last"):
        checkpoint_to_resume("last", str(tmp_path))


def test_digest_of_dataset__is_one_of_content_and_order():
    rows = [{"prompt_ids": [1, 2], "completion_ids": [3], "example_id": 0}]
    rows += [{"prompt_ids": [1], "completion_ids": [2, 3], "example_id": 1}]
    digest = digest_of_dataset(Dataset.from_list(rows))
    assert digest == digest_of_dataset(Dataset.from_list([*rows, rows[0]]).select([0, 1]))
    moved = [rows[0] | {"prompt_ids": [1], "completion_ids": [2, 3]}, rows[1]]
    others = [rows[::-1], rows[:1], moved]
    assert len({digest, *(digest_of_dataset(Dataset.from_list(other)) for other in others)}) == 4


def test_sft__resumes_without_the_weights_it_started_from(tmp_path, tiny_model, tokenizer, completion_rows):
    ends = []
    for steps, resume in ((4, None), (6, True)):
        trainer = DiffusionSFTTrainer(
            tiny_model,
            args=config(tmp_path, DiffusionSFTConfig, **SAVING | {"max_steps": steps}),
            train_dataset=completion_rows,
            processing_class=tokenizer,
        )
        trainer.train(resume_from_checkpoint=resume)
        ends.append(parameters(trainer.model))
    assert logged(trainer, "loss") and trainer.state.global_step == 6
    assert not torch.equal(*ends)


def test_train__does_not_begin_beside_the_checkpoints_of_a_longer_run(stopped):
    """Its own would be mixed with them, and the next resume would take theirs."""
    with pytest.raises(ValueError, match="holds a checkpoint of another run, checkpoint-4"):
        stopped(max_steps=2).train()
