"""What is given and read by nobody is refused, with what it needs; defaults never are."""

import dataclasses
import logging
from pathlib import Path

import pytest
from datasets import Dataset
from trainers import LORA, config, trainer_of

from vrpo import DiffusionSFTConfig, VRPOConfig, VRPOTrainer
from vrpo.training.kto_config import DiffusionKTOConfig
from vrpo.training.kto_trainer import DiffusionKTOTrainer
from vrpo.training.no_effect import BY_ITSELF, HARMLESS, NEEDS
from vrpo.training.support import IRRELEVANT, REFUSED

CONFIGS = (VRPOConfig, DiffusionSFTConfig, DiffusionKTOConfig)
EVALUATING = {"eval_strategy": "steps", "eval_steps": 1}
BEST = EVALUATING | {"metric_for_best_model": "loss"}
# field: (what is given, that with which it does something)
CASES = {
    "eval_steps": (2, {"eval_strategy": "steps"}),
    "eval_delay": (3, EVALUATING),
    "load_best_model_at_end": (True, EVALUATING | {"save_strategy": "steps", "save_steps": 1}),
    "metric_for_best_model": ("loss", EVALUATING),
    "greater_is_better": (True, BEST),
    "save_strategy": ("best", BEST),
    "warmup_steps": (5, {"lr_scheduler_type": "constant_with_warmup"}),
    "optim_target_modules": (["q_proj"], {"optim": "galore_adamw"}),
    "gradient_checkpointing_kwargs": ({"use_reentrant": False}, {"gradient_checkpointing": True}),
    "fsdp_config": ({"version": 2}, None),  # fsdp needs processes: engine_runs.py has both
    "dataloader_multiprocessing_context": ("spawn", {"dataloader_num_workers": 1}),
    "dataloader_in_order": (False, {"dataloader_num_workers": 1}),
    "streaming_shuffle_buffer": (5, {"train_sampling_strategy": "random"}),
    "hub_strategy": ("end", {"push_to_hub": True}),
    "hub_always_push": (True, {"push_to_hub": True}),
    "precompute_ref_batch_size": (2, {"precompute_ref_log_probs": True}),
    "ref_log_probs_cache": ("x", {"precompute_ref_log_probs": True}),
    "ref_model_mixup_alpha": (0.1, {"sync_ref_model": True}),
    "ref_model_sync_steps": (1, {"sync_ref_model": True}),
    "precompute_ref_log_probs": (True, {"loss_type": ["simpo", "ipo"]}),
    "sync_ref_model": (True, {"loss_type": ["simpo", "ipo"]}),
    "share_trunk": (True, {"loss_type": ["simpo", "ipo"]}),
    "simpo_gamma": (3.0, {"loss_type": ["simpo", "ipo"]}),
}
WITHOUT = {
    "warmup_steps": {"lr_scheduler_type": "constant"},
    "streaming_shuffle_buffer": {"train_sampling_strategy": "sequential"},
    "precompute_ref_log_probs": {"loss_type": "simpo"},
    "sync_ref_model": {"loss_type": ["simpo"]},
    "share_trunk": {"loss_type": "simpo"},
    "eval_steps": {"eval_strategy": "epoch"},
}


def test_tables__say_of_every_field_what_it_hangs_on():
    names = {field.name for kind in CONFIGS for field in dataclasses.fields(kind)}
    tables = (NEEDS, HARMLESS, BY_ITSELF, REFUSED, IRRELEVANT)
    for name in names:
        assert sum(name in table for table in tables) == 1, name
    newer = {"activation_checkpointing", "activation_checkpointing_kwargs"}
    older = {"gradient_checkpointing", "gradient_checkpointing_kwargs"}
    assert {*NEEDS, *HARMLESS, *BY_ITSELF} <= names | newer | older
    assert set(CASES) == set(NEEDS) - {"activation_checkpointing_kwargs"}


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", CASES)
def test_config__refuses_what_does_nothing_and_takes_what_does(tmp_path, name):
    value, needed = CASES[name]
    with pytest.raises(ValueError, match=f"{name}=.* does nothing without ") as error:
        config(tmp_path, **{name: value} | WITHOUT.get(name, {}))
    assert "\n" not in str(error.value)
    if needed is not None:
        config(tmp_path, **{name: value} | needed)


@pytest.mark.parametrize("kind", CONFIGS)
def test_config__takes_every_field_at_its_default(tmp_path, kind):
    fields = {
        field.name: field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        for field in dataclasses.fields(kind)
        if field.init and field.name != "output_dir"
    }
    switched = {
        "logging_strategy": "no",
        "save_strategy": "no",
        "lr_scheduler_type": "constant",
        "optim": "sgd",
    }
    made = kind(output_dir=str(tmp_path), **fields)
    kind(output_dir=str(tmp_path), **fields | switched)
    dataclasses.replace(made, seed=1)
    # As a file of all that a run was made with holds it.
    kept = {name: value for name, value in made.to_dict().items() if name in fields}
    kind(**kept | {"output_dir": str(tmp_path)})


def test_init__refuses_a_shuffle_buffer_without_a_stream(tmp_path, tiny_model, tokenizer, pair_rows):
    with pytest.raises(ValueError, match="streaming_shuffle_buffer=5 does nothing without a stream"):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, streaming_shuffle_buffer=5)
    stream = pair_rows.to_iterable_dataset()
    trainer_of(tmp_path, tiny_model, tokenizer, stream, streaming_shuffle_buffer=5, max_steps=1)
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, streaming_shuffle_buffer=0)


@pytest.mark.parametrize("disabled", [True, False])
def test_init__tells_that_lora_dropout_is_off(
    tmp_path, tiny_model, tokenizer, pair_rows, caplog, monkeypatch, disabled
):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, peft_config=LORA, disable_dropout=disabled)
    assert ("lora_dropout=0.5 does nothing: disable_dropout=True" in caplog.text) == disabled


# --- metric_for_best_model


def trainer_for(tmp_path, tiny_model, tokenizer, rows, evaluation, **fields):
    fields |= {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    return trainer_of(tmp_path, tiny_model, tokenizer, rows, eval_dataset=evaluation, **fields)


REPORTED = {
    "no replicates": {"num_samples": 2},
    "replicates": {"num_samples": 4, "num_replicates": 2},
    "of the design": {"num_samples": 4, "mask_design": "paper"},
    "too few levels": {"num_samples": 4, "mask_design": "paper", "masks_per_level": 4},
    "without reference": {"loss_type": "simpo"},
    "kto": {"kind": DiffusionKTOTrainer, "num_samples": 2},
    "kto of one kind": {"kind": DiffusionKTOTrainer, "num_samples": 4, "mask_design": "paper"},
}


@pytest.mark.parametrize("name", REPORTED)
def test_init__knows_the_metrics_that_an_evaluation_reports(tmp_path, tiny_model, tokenizer, pair_rows, name):
    fields = dict(REPORTED[name])
    kind = fields.pop("kind", VRPOTrainer)
    evaluation = pair_rows.select(range(2))
    if name == "kto of one kind":
        evaluation = Dataset.from_list(
            [{"prompt": row["prompt"], "completion": row["chosen"], "label": True} for row in evaluation]
        )
    settings = config(tmp_path, kind.config_class, **fields)
    trainer = kind(
        tiny_model,
        args=settings,
        train_dataset=pair_rows,
        eval_dataset=evaluation,
        processing_class=tokenizer,
    )
    found = trainer.evaluate()
    known = {f"eval_{metric}" for metric in trainer._metrics_of_evaluation(trainer.eval_dataset)}
    timings = ("runtime", "samples_per_second", "steps_per_second", "model_preparation_time")
    timings = {f"eval_{what}" for what in ("loss", *timings)}
    assert {key for key in found if key.startswith("eval_")} - timings == known


def test_init__refuses_a_best_metric_that_this_run_will_not_report(
    tmp_path, tiny_model, tokenizer, pair_rows
):
    def make(metric, **fields):
        return trainer_for(
            tmp_path, tiny_model, tokenizer, pair_rows, pair_rows, metric_for_best_model=metric, **fields
        )

    with pytest.raises(ValueError, match=r"must be one of loss, .*got 'vrpo/score_std'"):
        make("vrpo/score_std")
    make("vrpo/score_std", num_samples=4, num_replicates=2)
    with pytest.raises(ValueError, match="got 'elbo/ref_chosen'"):
        make("elbo/ref_chosen", loss_type="simpo")


# --- the report


def test_create_model_card__writes_the_evaluation_into_the_report_too(
    tmp_path, tiny_model, tokenizer, pair_rows
):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows, max_steps=1, training_report=True
    )
    trainer.train()
    trainer.save_model()
    report = Path(trainer.args.output_dir, "report.md")
    assert "| evaluation |" not in report.read_text()
    trainer.evaluate()
    trainer.create_model_card()
    assert "| Loss | evaluation |" in report.read_text()
