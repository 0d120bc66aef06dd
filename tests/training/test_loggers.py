"""Metrics and answers in TensorBoard, W&B and Trackio, each where it is installed; none needs a network."""

import importlib
import math
import sys
import types

import pytest
from trainers import trainer_of

from vrpo.generation.callback import LogCompletionsCallback
from vrpo.generation.config import SamplerConfig

TRAINED = ("loss", "rewards/margins", "vrpo/replay_drift", "vrpo/sft_loss", "vrpo/tokens_per_second")
EVALUATED = ("loss", "rewards/accuracies", "elbo/chosen_per_token")
NAMES = [f"train/{name}" for name in TRAINED] + [f"eval/{name}" for name in EVALUATED]


def train(tmp_path, model, tokenizer, rows, logger):
    answers = LogCompletionsCallback([[5, 6, 7], [8, 9]], 2, SamplerConfig(max_new_tokens=4))
    trainer = trainer_of(
        tmp_path,
        model,
        tokenizer,
        rows,
        eval_dataset=rows,
        eval_strategy="steps",
        eval_steps=2,
        max_steps=4,
        gradient_mode="replay",
        report_to=[logger],
        run_name="a-run",
        callbacks=[answers],
    )
    trainer.train()
    return trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # of the package
def test_train__tensorboard_has_every_metric(tmp_path, monkeypatch, tiny_model, tokenizer, pair_rows):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    trainer = train(tmp_path, tiny_model, tokenizer, pair_rows, "tensorboard")
    (folder,) = {path.parent for path in (tmp_path / "runs").rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder)).Reload()
    assert set(NAMES) <= set(events.Tags()["scalars"])
    history = {e["step"]: e["rewards/margins"] for e in trainer.state.log_history if "rewards/margins" in e}
    written = {event.step: event.value for event in events.Scalars("train/rewards/margins")}
    assert written == pytest.approx(history, abs=1e-6) and len(written) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_train__wandb_has_every_metric_and_the_answers(
    tmp_path, monkeypatch, tiny_model, tokenizer, pair_rows
):
    wandb = pytest.importorskip("wandb")
    for name, value in {"MODE": "offline", "DIR": str(tmp_path), "SILENT": "true"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    train(tmp_path, tiny_model, tokenizer, pair_rows, "wandb")
    try:
        summary = dict(wandb.run.summary)
    finally:
        wandb.finish()
    assert all(math.isfinite(summary[name]) for name in NAMES)
    assert summary["completions"]["ncols"] == 3 and summary["completions"]["nrows"] == 6


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::ResourceWarning")
def test_train__trackio_has_every_metric_and_the_answers(
    tmp_path, monkeypatch, tiny_model, tokenizer, pair_rows
):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio")
    storage = importlib.import_module("trackio.sqlite_storage")
    train(tmp_path, tiny_model, tokenizer, pair_rows, "trackio")
    found = [run for run in trackio.Api().runs("huggingface") if run.name == "a-run"]
    entries = storage.SQLiteStorage.get_logs("huggingface", "a-run")
    assert len(found) == 1
    assert set(NAMES) | {"completions"} <= {name for entry in entries for name in entry}
    last = next(entry["completions"] for entry in reversed(entries) if "completions" in entry)
    assert len(last["_value"]) == 6


def test_log_completions__tables_have_all_answers_so_far(
    tmp_path, monkeypatch, tiny_model, tokenizer, pair_rows
):
    logged = []
    stub = types.ModuleType("wandb")
    stub.Table = lambda dataframe: dataframe
    stub.log = logged.append
    monkeypatch.setitem(sys.modules, "wandb", stub)
    answers = LogCompletionsCallback([[5, 6, 7], [8, 9]], 1, SamplerConfig(max_new_tokens=4))
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=2, callbacks=[answers])
    trainer.args.report_to = ["wandb"]
    trainer.train()
    assert [entry["train/global_step"] for entry in logged] == [0, 1, 2]
    table = logged[-1]["completions"]
    assert list(table.columns) == ["step", "prompt", "completion"]
    assert list(table["step"]) == [0, 0, 1, 1, 2, 2]
    assert len(logged[0]["completions"]) == 2
