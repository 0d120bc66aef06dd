"""A run with early stopping, and one that evaluates at its start, go on from a checkpoint as they were."""

import copy

import pytest
from trainers import parameters, trainer_of
from transformers import EarlyStoppingCallback

SAVING = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 6,
    "metric_for_best_model": "loss",
    "greater_is_better": True,  # a loss that falls never improves: patience runs out
}


@pytest.fixture
def run(tmp_path, tiny_model, tokenizer, pair_rows):
    def make(name, callbacks, **fields):
        return trainer_of(
            tmp_path / name,
            copy.deepcopy(tiny_model),
            tokenizer,
            pair_rows,
            eval_dataset=pair_rows,
            callbacks=callbacks,
            **{**SAVING, **fields},
        )

    return make


def log_of(trainer):
    timeless = ("runtime", "per_second", "memory")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in timeless)}
        for entry in trainer.state.log_history
    ]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("restore", [False, True])
def test_train__goes_on_waiting_from_the_count_of_the_checkpoint(tmp_path, run, number, restore):
    """Without it every resume starts to count again, and a run that is stopped now and then never ends."""
    patient = [3, 2][:number]
    options = {"restore_callback_states_from_checkpoint": restore}
    straight = run("out", [EarlyStoppingCallback(n) for n in patient], **options)
    straight.train()
    stops = min(patient) + 1
    assert straight.state.global_step == stops
    for step in range(1, stops + 1):
        again = run("out", [EarlyStoppingCallback(n) for n in patient], **options)
        again.train(resume_from_checkpoint=str(tmp_path / f"out/out/checkpoint-{step}"))
        assert again.state.global_step == stops
        assert parameters(again.model).equal(parameters(straight.model))
        assert log_of(again)[:-1] == log_of(straight)[:-1]  # the last is train_loss, of this call


def test_train__more_patience_goes_on_beyond_the_end(tmp_path, run, caplog):
    run("out", [EarlyStoppingCallback(1)]).train()
    ended = run("out", [EarlyStoppingCallback(1)])
    ended.train(resume_from_checkpoint="auto")
    assert ended.state.global_step == 2
    assert "early stopping ended this run at step 2" in caplog.text
    again = run("out", [EarlyStoppingCallback(3)])
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 4


def test_train__evaluates_at_the_start_once(tmp_path, run):
    straight = run("out", None, eval_on_start=True, max_steps=3)
    straight.train()
    again = run("out", None, eval_on_start=True, max_steps=3)
    again.train(resume_from_checkpoint=str(tmp_path / "out/out/checkpoint-1"))
    assert log_of(again)[:-1] == log_of(straight)[:-1]
    assert [entry["step"] for entry in again.state.log_history if "eval_loss" in entry] == [0, 1, 2, 3]
    assert again.args.eval_on_start
