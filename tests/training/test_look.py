"""A dry run counts what the run then takes."""

import pytest
from trainers import config

from vrpo import VRPOTrainer
from vrpo.training import dry_run
from vrpo.training.dry_run import data_text, look, steps_text
from vrpo.training.kto_trainer import DiffusionKTOTrainer
from vrpo.training.sft_trainer import DiffusionSFTTrainer

SETTINGS = {
    "part of an epoch": {"num_train_epochs": 2.5},
    "accumulation and small packs": {
        "num_train_epochs": 2,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "max_tokens_per_pack": 100,
    },
    "replay": {"per_device_train_batch_size": 5, "max_tokens_per_pack": 40, "gradient_mode": "replay"},
    "drop_last": {"num_train_epochs": 3, "per_device_train_batch_size": 5, "dataloader_drop_last": True},
    "drop_last and accumulation": {
        "max_steps": 4,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 3,
        "dataloader_drop_last": True,
    },
    "steps": {"max_steps": 7, "per_device_train_batch_size": 5},
    "sequential": {"max_steps": 4, "per_device_train_batch_size": 5, "train_sampling_strategy": "sequential"},
    "evaluation": {"num_train_epochs": 1, "eval_strategy": "epoch", "eval_on_start": True},
    "split batches": {"num_train_epochs": 2, "accelerator_config": {"split_batches": True}},
    "stream": {"max_steps": 7, "per_device_train_batch_size": 5, "is_stream": True},
    "stream and drop_last": {
        "max_steps": 5,
        "per_device_train_batch_size": 5,
        "gradient_accumulation_steps": 2,
        "dataloader_drop_last": True,
        "is_stream": True,
    },
    "pairs for kto": {"num_train_epochs": 2, "per_device_train_batch_size": 5, "kind": DiffusionKTOTrainer},
    "stream of pairs for kto": {"max_steps": 6, "is_stream": True, "kind": DiffusionKTOTrainer},
    "fill of sft": {"num_train_epochs": 3, "per_device_train_batch_size": 5, "kind": DiffusionSFTTrainer},
}


def made(tmp_path, model, tokenizer, rows, kind=VRPOTrainer, is_stream=False, **fields):
    rows = rows.select(range(12))
    if kind is DiffusionSFTTrainer:
        rows = rows.rename_column("chosen", "completion").remove_columns("rejected")
    settings = config(tmp_path, kind.__annotations__["args"], **fields)
    return kind(
        model,
        args=settings,
        train_dataset=rows.to_iterable_dataset() if is_stream else rows,
        eval_dataset=rows.select(range(3)) if "eval_strategy" in fields else None,
        processing_class=tokenizer,
    )


def counted(trainer) -> tuple[int, list[list[int]]]:
    """Packed tokens of a run, and the packs of the micro-batches of each batch."""
    tokens, cuts = 0, []
    step, cut = trainer.training_step, trainer._micro_batches

    def counting_step(*args):
        nonlocal tokens
        trainer._num_tokens = 0
        loss = step(*args)
        tokens += trainer._num_tokens
        return loss

    def counting_cut(batch):
        found = cut(batch)
        if trainer.model.training:
            cuts.append([count for _, count in found])
        return found

    trainer.training_step, trainer._micro_batches = counting_step, counting_cut
    trainer.train()
    return tokens, cuts


@pytest.mark.parametrize("name", SETTINGS)
def test_look__counts_what_the_run_takes(tmp_path, tiny_model, tokenizer, pair_rows, name):
    trainer = made(tmp_path, tiny_model, tokenizer, pair_rows, **SETTINGS[name])
    seen = look(trainer)
    told = steps_text(seen, 2)
    tokens, cuts = counted(trainer)
    assert seen.max_steps == trainer.state.global_step
    assert seen.is_exact and 2 * seen.total_tokens == tokens
    assert f"{tokens:,} in total; K = 2" in told
    assert seen.cuts == cuts[: len(seen.cuts)]
    assert len(seen.lengths["prompt"]) <= (24 if "pairs" in name else 12)


def test_look__estimates_a_stream_by_whole_passes(tmp_path, tiny_model, tokenizer, pair_rows, monkeypatch):
    fields = {"max_steps": 30, "per_device_train_batch_size": 5, "is_stream": True}
    monkeypatch.setattr(dry_run, "_STREAMED", 5)  # a pass of 12 rows is 3 batches, the last of 2 rows
    trainer = made(tmp_path, tiny_model, tokenizer, pair_rows, **fields)
    seen = look(trainer)
    assert not seen.is_exact and "in total, by the mean of its first batches" in steps_text(seen, 2)
    assert "a stream; of its first 12 rows" in data_text(seen.report, seen.lengths)
    assert 2 * seen.total_tokens == counted(trainer)[0]  # 30 steps are 10 passes


def test_data_text__counts_pairs_that_are_taken_apart(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = made(tmp_path, tiny_model, tokenizer, pair_rows, kind=DiffusionKTOTrainer)
    seen = look(trainer)
    assert data_text(seen.report, seen.lengths).startswith(
        "data       24 examples of 12 rows, taken apart; dropped: 0 unusable, 0 equal after truncation, "
        "0 over the token budget\n"
    )
