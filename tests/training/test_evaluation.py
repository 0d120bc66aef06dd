"""What evaluate and predict take and give, metrics of the user's own, models made anew, and model cards."""

import copy
import math

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from trainers import LORA, config, logged, parameters, trainer_of

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer
from vrpo.training.config import VRPOConfig
from vrpo.training.vrpo_trainer import VRPOTrainer


def raw_forms(rows):
    return {"Dataset": rows, "list of dicts": rows.to_list()}


@pytest.mark.parametrize("form", ["Dataset", "list of dicts"])
def test_evaluate__takes_rows_as_they_come(tmp_path, tiny_model, tokenizer, pair_rows, form):
    rows = raw_forms(pair_rows)[form]
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, rows, eval_dataset=pair_rows)
    expected = trainer.evaluate()
    found = trainer.evaluate(rows)
    assert found["eval_logps/chosen"] == expected["eval_logps/chosen"]
    assert found["eval_loss"] == expected["eval_loss"]
    both = trainer.evaluate({"first": rows, "second": rows})
    assert (
        both["eval_first_logps/chosen"] == both["eval_second_logps/chosen"] == expected["eval_logps/chosen"]
    )


def test_evaluate__takes_each_split_of_a_dict(tmp_path, tiny_model, tokenizer, pair_rows):
    splits = DatasetDict(test=pair_rows, more=pair_rows.select(range(3)))
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=splits)
    assert {"eval_test_loss", "eval_more_loss"} <= set(trainer.evaluate())
    assert {"eval_test_loss", "eval_more_loss"} <= set(trainer.evaluate(splits))


def test_train__a_dict_of_splits_is_refused_with_their_names(tmp_path, tiny_model, tokenizer, pair_rows):
    splits = DatasetDict(test=pair_rows, train=pair_rows)
    with pytest.raises(ValueError, match=r"train dataset is a dict of \['test', 'train'\]: pass one of them"):
        trainer_of(tmp_path, tiny_model, tokenizer, splits)
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows)
    with pytest.raises(ValueError, match="test dataset is a dict of"):
        trainer.predict(splits)


@pytest.mark.parametrize("form", ["Dataset", "list of dicts"])
def test_predict__gives_the_metrics_of_each_example(tmp_path, tiny_model, tokenizer, pair_rows, form):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows, per_device_eval_batch_size=5
    )
    output = trainer.predict(raw_forms(pair_rows)[form])
    assert output.label_ids.tolist() == list(range(12))
    assert set(output.predictions) >= {"loss", "rewards/margins", "logps/chosen", "elbo/ref_chosen"}
    for name, values in output.predictions.items():
        assert values.shape == (12,), name
        assert values.mean() == pytest.approx(output.metrics[f"test_{name}"], rel=1e-5), name
    assert output.predictions["loss"] != pytest.approx(output.predictions["loss"][0], abs=0)


def test_predict__of_the_sft_trainer(tmp_path, tiny_model, tokenizer, completion_rows):
    trainer = DiffusionSFTTrainer(
        tiny_model, args=config(tmp_path, DiffusionSFTConfig), processing_class=tokenizer
    )
    output = trainer.predict(completion_rows)
    assert set(output.predictions) == {"loss", *DiffusionSFTTrainer.metric_names}
    assert output.predictions["loss"].shape == (12,)


def test_metric_names__are_those_that_an_evaluation_reports(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows, num_samples=4, num_replicates=2
    )
    found = {name.removeprefix("eval_") for name in trainer.evaluate()}
    assert {name for name in found if "/" in name} == set(VRPOTrainer.metric_names)


@pytest.mark.parametrize("batch_metrics", [False, True])
def test_evaluate__compute_metrics_gets_every_example(
    tmp_path, tiny_model, tokenizer, pair_rows, batch_metrics
):
    seen = []

    def compute_metrics(prediction, compute_result=True):
        seen.append(np.asarray(prediction.label_ids))
        margins = np.asarray(prediction.predictions["rewards/margins"])
        return {"worst_margin": float(margins.min())} if compute_result else {}

    trainer = trainer_of(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        eval_dataset=pair_rows,
        compute_metrics=compute_metrics,
        batch_eval_metrics=batch_metrics,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="worst_margin",
        num_train_epochs=2,
    )
    assert trainer.evaluate()["eval_worst_margin"] == 0.0
    assert sorted(np.concatenate(seen).tolist()) == list(range(12))
    trainer.train()
    assert len(logged(trainer, "eval_worst_margin")) == 2


@pytest.mark.parametrize("reference", ["frozen copy", "explicit", "adapter"])
def test_train__model_init_starts_from_a_new_model_each_time(
    tmp_path, tiny_model, tokenizer, pair_rows, reference
):
    extra = {"adapter": {"peft_config": LORA}, "explicit": {"ref_model": copy.deepcopy(tiny_model)}}
    trainer = trainer_of(
        tmp_path,
        None,
        tokenizer,
        pair_rows,
        model_init=lambda: copy.deepcopy(tiny_model),
        sft_weight=0.0,
        **extra.get(reference, {}),
    )
    ends = []
    for _ in range(2):
        trainer.train()
        ends.append(parameters(trainer.model))
        assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
        assert logged(trainer, "rewards/margins")[0] == 0.0
    assert torch.equal(*ends)
    assert not torch.equal(ends[0][: len(parameters(tiny_model))], parameters(tiny_model))


def test_estimator__follows_what_a_hyperparameter_search_sets(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, num_samples=2)
    trainer.args.num_samples, trainer.args.num_replicates = 8, 2
    assert (trainer.estimator.num_samples, trainer.estimator.num_replicates) == (8, 2)


def test_init__wants_a_model_or_a_way_to_make_one(tmp_path, tiny_model, tokenizer, pair_rows):
    with pytest.raises(ValueError, match="give either model or model_init"):
        trainer_of(tmp_path, None, tokenizer, pair_rows)
    with pytest.raises(ValueError, match="give either model or model_init"):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, model_init=lambda: tiny_model)


def test_init__takes_the_reference_by_its_path(tmp_path, tiny_model, tokenizer, pair_rows):
    tiny_model.save_pretrained(tmp_path / "reference")
    trainer = trainer_of(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        ref_model=str(tmp_path / "reference"),
        sft_weight=0.0,
        max_steps=1,
    )
    trainer.train()
    assert logged(trainer, "rewards/margins") == [0.0]


def test_init__refuses_rows_beyond_the_models_positions(tmp_path, tiny_model, tokenizer):
    rows = Dataset.from_list([{"prompt": "What?", "chosen": " 12345" * 40, "rejected": " no"}] * 4)
    with pytest.raises(ValueError, match="64"):
        trainer_of(tmp_path, tiny_model, tokenizer, rows)
    trainer_of(tmp_path, tiny_model, tokenizer, rows, max_length=64)


def test_init__refuses_a_mask_token_outside_the_vocabulary(tmp_path, tiny_model, tokenizer, pair_rows):
    with pytest.raises(ValueError, match="mask_token_id is 300, outside"):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, mask_token_id=300)


def test_last_evaluation__is_that_of_the_last_step_only(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows, eval_strategy="epoch"
    )
    assert trainer.last_evaluation() is None
    trainer.train()
    assert trainer.last_evaluation()["eval_loss"] == logged(trainer, "eval_loss")[-1]
    other = trainer_of(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        eval_dataset=pair_rows,
        eval_on_start=True,
        max_steps=3,
    )
    other.train()
    assert logged(other, "eval_loss") and other.last_evaluation() is None


@pytest.mark.parametrize("fields", [{}, {"peft_config": LORA}], ids=["full", "lora"])
def test_save_model__writes_a_card_that_says_from_what_and_on_what(
    tmp_path, tiny_model, tokenizer, pair_rows, fields
):
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = trainer_of(tmp_path, str(tmp_path / "base"), None, pair_rows, max_steps=1, **fields)
    trainer.dataset_name = "pairs.jsonl"
    trainer.train()
    trainer.save_model()
    card = (tmp_path / "out/README.md").read_text()
    for text in (
        f"started from `{tmp_path / 'base'}`",
        "trained on `pairs.jsonl`",
        "| beta | 0.2 |",
        "2505.19223",
    ):
        assert text in card
    assert ("an adapter" if fields else "all its weights") in card
    assert "unknown dataset" not in card and "from scratch" not in card
    for name in ("dataset", "dataset_name"):  # of transformers, of TRL
        trainer.create_model_card(model_name="mine", **{name: f"org/{name}"})
        assert f"- org/{name}\n" in (tmp_path / "out/README.md").read_text()


def test_train__equal_seeds_are_equal_runs_whatever_the_random_state(
    tmp_path, tiny_model, tokenizer, pair_rows
):
    ends = []
    for number in range(2):
        torch.manual_seed(number)
        np.random.seed(number)
        trainer = trainer_of(tmp_path / str(number), copy.deepcopy(tiny_model), tokenizer, pair_rows)
        torch.manual_seed(number + 5)
        trainer.train()
        ends.append(parameters(trainer.model))
    assert torch.equal(*ends)
    assert VRPOConfig is type(trainer.args)
