"""What a trainer is constructed with is of the right kind, or refused by name before any work."""

import pandas as pd
import pytest
import torch
from trainers import config, trainer_of
from transformers import EarlyStoppingCallback, TrainingArguments

from vrpo import DiffusionKTOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.training.kto_config import DiffusionKTOConfig

TRAINERS = {
    DiffusionSFTTrainer: DiffusionSFTConfig,
    DiffusionKTOTrainer: DiffusionKTOConfig,
    VRPOTrainer: VRPOConfig,
}


@pytest.mark.parametrize("trainer", TRAINERS)
def test_init__takes_its_own_config_only(tmp_path, tiny_model, tokenizer, pair_rows, trainer):
    others = [config(tmp_path, kind) for kind in TRAINERS.values() if kind is not TRAINERS[trainer]]
    plain = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    for args in (*others, plain, {"beta": 0.1}, 0.1, VRPOConfig):
        with pytest.raises(ValueError, match=f"args must be a {TRAINERS[trainer].__name__}, got"):
            trainer(tiny_model, args=args, train_dataset=pair_rows, processing_class=tokenizer)


def test_init__a_config_in_the_place_of_the_reference_is_told(tmp_path, tiny_model, tokenizer, pair_rows):
    with pytest.raises(ValueError, match="got VRPOConfig; pass it as args="):
        VRPOTrainer(tiny_model, config(tmp_path), train_dataset=pair_rows, processing_class=tokenizer)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ref_model", 3, "ref_model must be a model, a path or a hub name, got int 3"),
        ("ref_model", torch.nn.Linear(2, 2), "ref_model must be a masked-diffusion model"),
        ("model", torch.nn.Linear(2, 2), "model must be a masked-diffusion model"),
        ("model", 3, "model must be a masked-diffusion model"),
        ("peft_config", {"r": 4}, "peft_config must be a peft.LoraConfig, got dict"),
        ("peft_config", "lora", "peft_config must be a peft.LoraConfig, got str 'lora'"),
        ("processing_class", "gpt2", "processing_class must be the tokenizer, got str 'gpt2'"),
        ("processing_class", dict, "processing_class must be the tokenizer, got the class dict"),
        ("eval_dataset", {"a": None}, "eval_dataset must map names to datasets, got str 'a': None"),
        ("eval_dataset", {1: [{}]}, "eval_dataset must map names to datasets, got int 1: list"),
        ("eval_dataset", pd.DataFrame(), "eval_dataset must be a datasets.Dataset, got DataFrame"),
        ("eval_dataset", {"a": 3}, r"eval_dataset\['a'\] must be a datasets.Dataset, got int"),
        ("train_dataset", "pairs.jsonl", "train_dataset must be a datasets.Dataset, got str"),
        ("compute_metrics", "accuracy", "compute_metrics must be a function, got str 'accuracy'"),
        ("data_collator", 1, "data_collator must be a function, got int 1"),
        ("callbacks", EarlyStoppingCallback(), "callbacks must be a list of TrainerCallbacks"),
        ("callbacks", ["x"], "callbacks must be TrainerCallbacks, got str 'x'"),
        ("callbacks", [dict], "callbacks must be TrainerCallbacks, got the class dict"),
        ("callbacks", [EarlyStoppingCallback()], "EarlyStoppingCallback needs metric_for_best_model"),
        ("callbacks", [EarlyStoppingCallback], "EarlyStoppingCallback needs metric_for_best_model"),
        ("optimizers", "adam", r"optimizers must be a pair .*, got str 'adam'"),
        ("optimizers", (None, None, None), r"optimizers must be a pair .*, got tuple"),
        ("optimizers", (3, None), r"optimizers\[0\] must be a torch optimizer, got int 3"),
        ("optimizers", (None, 1e-3), r"optimizers\[1\] must be a torch schedule, got float 0.001"),
    ],
)
def test_init__names_an_argument_of_another_kind(
    tmp_path, tiny_model, tokenizer, pair_rows, name, value, message
):
    given = {"model": tiny_model, "train_dataset": pair_rows, "processing_class": tokenizer, name: value}
    with pytest.raises(ValueError, match=message) as error:
        VRPOTrainer(args=config(tmp_path), **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("value", "message"),
    [("x", "got str"), (lambda: None, "None"), (lambda a, b: None, "0 or 1 argument")],
)
def test_init__refuses_a_model_init_without_a_model(tmp_path, tokenizer, pair_rows, value, message):
    with pytest.raises(ValueError, match=f"model_init must be a.*{message}"):
        trainer_of(tmp_path, None, tokenizer, pair_rows, model_init=value)


def test_evaluate__names_a_dataset_that_is_not_there(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset={"a": pair_rows})
    assert "eval_loss" in trainer.evaluate("a")
    with pytest.raises(ValueError, match=r"the name of one, \['a'\]; got 'b'"):
        trainer.evaluate("b")
    with pytest.raises(ValueError, match="test_dataset must be a dataset, got None"):
        trainer.predict(None)


def test_train__early_stopping_that_is_added_later_is_checked_too(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows)
    trainer.add_callback(EarlyStoppingCallback())
    with pytest.raises(ValueError, match="EarlyStoppingCallback needs metric_for_best_model"):
        trainer.train()
