"""KTO: a batch in one graph or refused, streams that are resumed bitwise, an evaluation with one z0."""

import copy

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import sigmoid
from trainers import config, logged, parameters

from vrpo import DiffusionKTOConfig, DiffusionKTOTrainer
from vrpo.data.budget import TokenBudget
from vrpo.data.limits import Limits
from vrpo.data.rows import COMPLETION_SIDES, prepare_labelled
from vrpo.data.stream import Deal, RowStream

NO_LIMITS = Limits(None, None, None, None, None)
LABELLED = Dataset.from_list(
    [{"prompt": f"What is {n}?", "completion": "one " * (1 + n % 4), "label": n % 3 > 0} for n in range(13)]
)


def kto(tmp_path, model, tokenizer, rows=LABELLED, eval_dataset=None, compute_metrics=None, **fields):
    return DiffusionKTOTrainer(
        model,
        args=config(tmp_path, kind=DiffusionKTOConfig, **fields),
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )


# ---- one graph ----


def test_train__a_batch_that_fits_no_graph_is_refused_before_training(tmp_path, tiny_model, tokenizer):
    prepared, _ = prepare_labelled(LABELLED, tokenizer)
    lengths = sorted(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in prepared)
    largest = 2 * sum(lengths[-4:])
    told = f"the 4 longest responses in a batch take {largest} tokens .*max_tokens_per_pack={largest - 1}"
    with pytest.raises(ValueError, match=f"gradient_mode='joint' .*{told}.*gradient_mode='auto'"):
        kto(tmp_path, tiny_model, tokenizer, gradient_mode="joint", max_tokens_per_pack=largest - 1)
    for mode, budget in (("joint", largest), ("auto", 2 * lengths[-1])):
        fields = {"gradient_mode": mode, "max_tokens_per_pack": budget, "max_steps": 1}
        kto(tmp_path, tiny_model, tokenizer, **fields).train()


def test_train__a_streams_batch_that_fits_no_graph_is_refused_before_its_forward(
    tmp_path, tiny_model, tokenizer
):
    stream, calls = LABELLED.to_iterable_dataset(), []
    tiny_model.register_forward_hook(lambda *_: calls.append(1))
    trainer = kto(
        tmp_path, tiny_model, tokenizer, stream, gradient_mode="joint", max_tokens_per_pack=60, max_steps=1
    )
    with pytest.raises(ValueError, match=r"the 4 responses in a batch take \d+ tokens .*_pack=60"):
        trainer.train()
    assert not calls


def test_evaluate__joint_needs_no_graph_of_a_whole_batch(tmp_path, tiny_model, tokenizer):
    results = []
    for size, budget in ((13, 10**6), (13, 80)):
        trainer = kto(
            tmp_path,
            copy.deepcopy(tiny_model),
            tokenizer,
            eval_dataset=LABELLED,
            gradient_mode="joint",
            max_tokens_per_pack=budget,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=size,
        )
        results.append(trainer.evaluate()["eval_loss"])
    assert results[0] == pytest.approx(results[1], rel=1e-6)


# ---- evaluation ----


def moved(model):
    """A worse model: as the reference it puts z0 above 0."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("concatenates", [True, False])
def test_evaluate__has_one_z0_whatever_the_batch_size(tmp_path, tiny_model, tokenizer, concatenates):
    seen, results = [], []

    def compute(found):
        parts = found.predictions if isinstance(found.predictions, list) else [found.predictions]
        loss = np.concatenate([part["loss"] for part in parts])
        seen.append(np.concatenate([part["kl"] for part in parts]))
        return {"own_loss": loss.mean()}

    for size in (1, 5, 13):
        trainer = DiffusionKTOTrainer(
            copy.deepcopy(tiny_model).double(),
            ref_model=moved(copy.deepcopy(tiny_model).double()),
            args=config(
                tmp_path,
                kind=DiffusionKTOConfig,
                per_device_eval_batch_size=size,
                eval_do_concat_batches=concatenates,
                num_replicates=2,
                beta=0.5,
                desirable_weight=1.3,
            ),
            train_dataset=LABELLED,
            eval_dataset=LABELLED,
            processing_class=tokenizer,
            compute_metrics=compute,
        )
        found = trainer.evaluate()
        assert found["eval_own_loss"] == pytest.approx(found["eval_loss"], rel=1e-9)
        assert found["eval_kl"] > 0 and len(set(seen[-1])) == 1
        assert seen[-1][0] == pytest.approx(found["eval_kl"], rel=1e-9) and len(seen[-1]) == 13
        results.append({k: v for k, v in found.items() if not k.endswith(("runtime", "per_second", "_time"))})
    for other in results[1:]:
        assert other == pytest.approx(results[0], rel=1e-9)
    assert {"eval_vrpo/loss_bias", "eval_rewards/margins"} <= results[0].keys()


def test_predict__gives_the_losses_of_the_formula(tmp_path, tiny_model, tokenizer):
    trainer = DiffusionKTOTrainer(
        copy.deepcopy(tiny_model).double(),
        ref_model=moved(copy.deepcopy(tiny_model).double()),
        args=config(tmp_path, kind=DiffusionKTOConfig, per_device_eval_batch_size=3, beta=0.5),
        train_dataset=LABELLED,
        processing_class=tokenizer,
    )
    output = trainer.predict(LABELLED)
    values = {name: torch.from_numpy(value) for name, value in output.predictions.items()}
    ratio = values["logps/completion"] - values["elbo/ref_completion"]
    center = ratio.mean()
    assert center > 0
    sign = torch.tensor([1.0 if LABELLED[int(row)]["label"] else -1.0 for row in output.label_ids])
    expected = 1 - sigmoid(sign * 0.5 * (ratio - center))
    torch.testing.assert_close(values["loss"], expected, rtol=1e-9, atol=1e-12)
    assert output.metrics["test_loss"] == pytest.approx(float(expected.mean()), rel=1e-9)


def test_kto_config__refuses_metrics_of_single_batches(tmp_path):
    with pytest.raises(ValueError, match="z0 of loss_type='kto' is a mean over the whole evaluation set"):
        config(tmp_path, kind=DiffusionKTOConfig, batch_eval_metrics=True)
    config(tmp_path, kind=DiffusionKTOConfig, batch_eval_metrics=True, loss_type="apo_zero_unpaired")


# ---- streams ----


def stream_of(rows, tokenizer, deal, budget=10**6, **options):
    rows = rows.to_iterable_dataset(num_shards=2)
    budget = TokenBudget(1, budget)
    return RowStream(rows, tokenizer, COMPLETION_SIDES, NO_LIMITS, budget, deal, has_label=True, **options)


def test_stream__gives_the_labelled_rows_of_the_dataset(tokenizer, pair_rows):
    for rows in (LABELLED, pair_rows):  # labelled, and pairs taken apart
        prepared, _ = prepare_labelled(rows, tokenizer)
        first_pass = []
        for batch in stream_of(rows, tokenizer, Deal(5)):
            if batch[0]["epoch"]:
                break
            first_pass += [{k: v for k, v in row.items() if k not in ("epoch", "past")} for row in batch]
        assert first_pass == prepared.to_list()


def test_stream__names_rows_without_a_usable_label_or_room(tokenizer, pair_rows):
    rows = LABELLED.remove_columns("label")
    with pytest.raises(ValueError, match="lacks the column label"):
        stream_of(rows, tokenizer, Deal(4))
    rows = rows.add_column("label", [1, 0, 2, *[1] * 10])
    with pytest.raises(ValueError, match=r"label must be true or false, got 2 \(row 2\)"):
        stream_of(rows, tokenizer, Deal(4))
    rows = Dataset.from_list([row | {"example_id": 2**31 + n} for n, row in enumerate(pair_rows)])
    with pytest.raises(ValueError, match=r"example_id must be below 2\*\*31 where pairs are taken apart"):
        stream_of(rows, tokenizer, Deal(4))
    rows = pair_rows.to_list()
    rows[3]["rejected"] = "two " * 40  # of a pair, one response alone is left out
    told = []
    stream = stream_of(
        Dataset.from_list(rows),
        tokenizer,
        Deal(24),
        budget=60,
        may_drop=True,
        on_drop=lambda row, reason: told.append((row, reason.split(":")[0])),
    )
    ids = [row["example_id"] for row in next(iter(stream))]
    assert ids == [n for n in range(24) if n != 7] and told == [(3, "longer than the token budget")]


def test_train__a_stream_in_order_equals_the_dataset_in_order(tmp_path, tiny_model, tokenizer):
    fields = {"train_sampling_strategy": "sequential", "per_device_train_batch_size": 5, "max_steps": 5}
    ends = []
    for rows in (LABELLED, LABELLED.to_iterable_dataset(num_shards=2)):
        trainer = kto(tmp_path, copy.deepcopy(tiny_model), tokenizer, rows, eval_dataset=rows, **fields)
        trainer.train()
        ends.append((parameters(trainer.model), logged(trainer, "loss"), trainer.evaluate()["eval_loss"]))
    assert torch.equal(ends[0][0], ends[1][0]) and ends[0][1:] == ends[1][1:]


def test_train__a_stream_is_resumed_bitwise_in_any_pass(tmp_path, tiny_model, tokenizer):
    fields = {"max_steps": 6, "learning_rate": 1e-3, "gradient_accumulation_steps": 2}
    fields |= {"save_strategy": "steps", "save_steps": 1}
    stream = LABELLED.to_iterable_dataset(num_shards=2)

    def run(checkpoint, rows=stream):
        trainer = kto(tmp_path, copy.deepcopy(tiny_model), tokenizer, rows, **fields)
        trainer.train(resume_from_checkpoint=checkpoint)
        return parameters(trainer.model), logged(trainer, "kl")

    straight = run(None)
    for step in (1, 3, 5):  # four batches a pass, two a step
        end = run(str(tmp_path / f"out/checkpoint-{step}"))
        assert torch.equal(end[0], straight[0]) and end[1] == straight[1], step
    flipped = LABELLED.map(lambda row: {"label": not row["label"]}).to_iterable_dataset(num_shards=2)
    with pytest.raises(ValueError, match="of another run: the training data"):
        run(str(tmp_path / "out/checkpoint-2"), flipped)
