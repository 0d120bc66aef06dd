"""Training with every preference loss, and with KTO: the loss falls; references only where needed."""

import copy
import json
import logging
import shutil

import pytest
import torch
from trainers import LORA, config, logged, parameters, trainer_of

from vrpo import DiffusionKTOConfig, DiffusionKTOTrainer
from vrpo.commands.main import main
from vrpo.commands.options import parse
from vrpo.commands.table import COMMANDS
from vrpo.objectives.losses import LOSSES
from vrpo.objectives.pairs import NOISE

LISTED = ["sigmoid", "ipo", "apo_zero"]


def options_of(loss_type):
    """Settings under which a random tiny model can lower the loss in a few steps."""
    options = {"loss_type": loss_type, "num_replicates": 2, "sft_weight": 0.0}
    if loss_type == "exo_pair":
        options["label_smoothing"] = 1e-3
    if loss_type in ("sigmoid_norm", "simpo"):
        options["beta"] = 2.0
    return options


@pytest.mark.parametrize("loss_type", [*LOSSES, LISTED], ids=str)
def test_train__every_loss_falls_on_its_own_pairs(tmp_path, tiny_model, tokenizer, pair_rows, loss_type):
    trainer = trainer_of(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        eval_dataset=pair_rows,
        per_device_train_batch_size=12,
        max_steps=5,
        **options_of(loss_type),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before
    assert all(f"eval_vrpo/{name}" in after for name in NOISE)
    assert {f"eval_{name}" for name in trainer.metric_names} <= set(after)


def kto(tmp_path, model, tokenizer, rows, eval_dataset=None, peft_config=None, **fields):
    args = config(tmp_path, kind=DiffusionKTOConfig, **fields)
    return DiffusionKTOTrainer(
        model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_dataset,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(peft_config),
    )


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
@pytest.mark.parametrize("reference", ["frozen copy", "adapter"])
def test_train__kto_starts_at_one_half_and_falls(
    tmp_path, tiny_model, tokenizer, pair_rows, reference, loss_type
):
    trainer = kto(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        eval_dataset=pair_rows,
        peft_config=LORA if reference == "adapter" else None,
        loss_type=loss_type,
        per_device_train_batch_size=24,
        per_device_eval_batch_size=24,
        num_replicates=2,
        max_steps=6,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-6)
    for key in ("rewards/chosen", "rewards/rejected", "rewards/margins", "kl", "vrpo/score_std"):
        assert logged(trainer, key)[0] == 0.0, key
    assert losses[-1] < losses[0]
    after = trainer.evaluate()
    assert {f"eval_{name}" for name in trainer.metric_names} <= set(after)
    margin = after["eval_rewards/chosen"] - after["eval_rewards/rejected"]
    assert after["eval_rewards/margins"] == pytest.approx(margin) and margin > 0


def test_train__kto_does_not_depend_on_how_a_batch_is_cut(tmp_path, tiny_model, tokenizer, pair_rows):
    """One graph, or a replay of single copies: the same z0, the same gradient (fp64)."""
    ends = []
    for budget in (65536, 40):
        trainer = kto(
            tmp_path / str(budget),
            copy.deepcopy(tiny_model).double(),
            tokenizer,
            pair_rows,
            per_device_train_batch_size=8,
            max_tokens_per_pack=budget,
            num_train_epochs=1,
        )
        trainer.train()
        ends.append((parameters(trainer.model), logged(trainer, "loss"), logged(trainer, "kl")))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=1e-9, atol=1e-12)
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-6)
    assert ends[0][2] == pytest.approx(ends[1][2], rel=1e-5, abs=1e-9)
    assert max(ends[0][2]) > 0


def test_train__kto_metrics_of_one_kind_alone_leave_the_other_out(tmp_path, tiny_model, tokenizer):
    rows = [{"prompt": f"What is {n}?", "completion": " one", "label": True} for n in range(4)]
    trainer = kto(tmp_path, tiny_model, tokenizer, rows, max_steps=2)
    trainer.train()
    assert logged(trainer, "rewards/chosen") and not logged(trainer, "rewards/rejected")
    assert not logged(trainer, "rewards/margins") and not logged(trainer, "label")


def test_train__without_a_reference_none_is_copied_kept_or_run(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows, loss_type="simpo", max_steps=1
    )
    assert trainer.ref_model is None and trainer._reference(trainer.model) is None
    trainer.train()
    reported = trainer.evaluate()
    assert not any("ref_" in name for name in reported)
    with pytest.raises(ValueError, match=r"ref_model is of no use to loss_type=\['simpo'\]"):
        trainer_of(
            tmp_path,
            tiny_model,
            tokenizer,
            pair_rows,
            ref_model=copy.deepcopy(tiny_model),
            loss_type="simpo",
        )


def test_train__resume_tells_of_another_loss_and_goes_on(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    def run(name, **fields):
        trainer = trainer_of(
            tmp_path / name,
            copy.deepcopy(tiny_model),
            tokenizer,
            pair_rows,
            save_strategy="steps",
            save_steps=1,
            **fields,
        )
        return trainer

    run("first", max_steps=1).train()
    shutil.copytree(tmp_path / "first/out/checkpoint-1", tmp_path / "saved/checkpoint-1")
    logger = logging.getLogger("vrpo.training.resume")
    logger.addHandler(caplog.handler)
    try:
        again = run("again", max_steps=2, loss_type=["hinge", "ipo"], loss_weights=[1.0, 0.5])
        again.train(resume_from_checkpoint=str(tmp_path / "saved/checkpoint-1"))
    finally:
        logger.removeHandler(caplog.handler)
    assert again.state.global_step == 2
    assert "loss_type ['sigmoid'] -> ['hinge', 'ipo']" in caplog.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"loss_type": "bco"}, "loss_type must be one of kto, apo_zero_unpaired, got 'bco'"),
        ({"beta": 0.0}, "beta must be positive"),
        ({"desirable_weight": 0.0}, "desirable_weight must be positive"),
        ({"undesirable_weight": -1.0}, "undesirable_weight must be positive"),
    ],
)
def test_kto_config__refuses_bad_fields(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, kind=DiffusionKTOConfig, **fields)


def test_parse__loss_type_is_one_or_several(tmp_path):
    flags = ["--dataset_name=a", f"--output_dir={tmp_path}", "--use_cpu"]

    def parsed(*more):
        return parse(COMMANDS["train"], [*flags, *more])[0][2]

    assert parsed().loss_type == ["sigmoid"]
    assert parsed("--loss_type", "ipo").loss_type == ["ipo"]
    listed = parsed("--loss_type", "sigmoid", "ipo", "--loss_weights", "0.8", "0.2")
    assert (listed.loss_type, listed.loss_weights) == (["sigmoid", "ipo"], [0.8, 0.2])
    assert parsed("--loss_weights", "2").loss_weights == [2.0]
    path = tmp_path / "losses.yaml"
    path.write_text("loss_type: [robust, hinge]\nloss_weights: [1, 0.5]\nlabel_smoothing: 0.1\n")
    read = parsed("--config", str(path))
    assert (read.loss_type, read.loss_weights) == (["robust", "hinge"], [1.0, 0.5])
    assert read.label_smoothing == 0.1


def test_kto__command_trains_and_saves(tmp_path, tiny_model, tokenizer):
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    rows = [{"prompt": f"What is {n}?", "completion": " one", "label": n % 2 == 0} for n in range(6)]
    with open(tmp_path / "labelled.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    quick = ["--max_steps=1", "--num_samples=2", "--max_length=64", "--use_cpu", "--disable_tqdm=true"]
    paths = [f"--{name}={tmp_path / place}" for name, place in (("dataset_name", "labelled.jsonl"),)]
    paths += [f"--model_name_or_path={tmp_path / 'base'}", f"--output_dir={tmp_path / 'out'}"]
    assert main(["kto", *paths, *quick, "--report_to=none"]) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert "aligned by KTO" in (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
