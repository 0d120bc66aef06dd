"""What is changed between a checkpoint and the run that goes on from it takes effect, or is refused."""

import copy

import pytest
import torch
from peft import LoraConfig
from trainers import LORA, config, logged, parameters, trainer_of
from transformers import TrainerCallback

SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "lr_scheduler_type": "cosine"}


class Change(TrainerCallback):
    """At the end of a step the new numbers, as a person would write them into the optimizer."""

    def __init__(self, step, rate=None, **groups):
        self.step, self.rate, self.groups = step, rate, groups

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kwargs):
        if state.global_step != self.step:
            return
        for group in optimizer.param_groups:
            group.update({key: value for key, value in self.groups.items() if key != "weight_decay"})
            if "weight_decay" in self.groups and group["weight_decay"]:
                group["weight_decay"] = self.groups["weight_decay"]
        if self.rate is not None:
            factor = self.rate / lr_scheduler.base_lrs[0]
            lr_scheduler.base_lrs = [self.rate for _ in lr_scheduler.base_lrs]
            for group in optimizer.param_groups:
                group["lr"] *= factor
            lr_scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize(
    ("fields", "change"),
    [
        ({"learning_rate": 1e-3}, {"rate": 1e-3}),
        ({"weight_decay": 0.5}, {"weight_decay": 0.5}),
        ({"adam_beta1": 0.5, "adam_beta2": 0.7}, {"betas": (0.5, 0.7)}),
        ({"adam_epsilon": 1e-2}, {"eps": 1e-2}),
    ],
    ids=str,
)
def test_train__a_changed_setting_takes_effect_after_a_resume(
    tmp_path, tiny_model, tokenizer, pair_rows, fields, change, caplog
):
    def run(name, callbacks=(), **more):
        return trainer_of(
            tmp_path / name,
            copy.deepcopy(tiny_model),
            tokenizer,
            pair_rows,
            callbacks=list(callbacks),
            **{**SAVING, **more},
        )

    run("a").train()
    plain = run("b")
    plain.train()
    changed = run("c", [Change(2, **change)])
    changed.train()
    resumed = run("a", **fields)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-2"))
    assert f"{next(iter(fields))} " in caplog.text and "with other settings" in caplog.text
    assert not parameters(resumed.model).allclose(parameters(plain.model), atol=1e-6)
    torch.testing.assert_close(parameters(resumed.model), parameters(changed.model), rtol=0, atol=2e-7)
    torch.testing.assert_close(
        torch.tensor(logged(resumed, "learning_rate")), torch.tensor(logged(changed, "learning_rate"))
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"optim": "sgd"}, "optim was 'adamw_torch_fused' and is 'sgd' now"),
        ({"optim": "adafactor"}, "optim was 'adamw_torch_fused' and is 'adafactor' now"),
        ({"train_top_layers": 1}, "train_top_layers was None and is 1 now"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy was 'random'"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last was False and is True now"),
    ],
    ids=str,
)
def test_train__refuses_to_change_what_states_or_rows_depend_on(
    tmp_path, tiny_model, tokenizer, pair_rows, fields, message
):
    trainer_of(tmp_path, copy.deepcopy(tiny_model), tokenizer, pair_rows, **SAVING | {"max_steps": 1}).train()
    again = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **{**SAVING, **fields})
    with pytest.raises(ValueError, match=f"resume_from_checkpoint: {message}") as error:
        again.train(resume_from_checkpoint=True)
    assert "\n" not in str(error.value)


def test_train__a_rate_that_was_reached_by_a_plateau_cannot_change(
    tmp_path, tiny_model, tokenizer, pair_rows
):
    fields = SAVING | {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_dataset": pair_rows,
    }
    trainer_of(tmp_path, copy.deepcopy(tiny_model), tokenizer, pair_rows, **fields | {"max_steps": 1}).train()
    again = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **fields, learning_rate=1e-3)
    with pytest.raises(ValueError, match="learning_rate cannot change with lr_scheduler_type"):
        again.train(resume_from_checkpoint=True)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"lora_alpha": 64}, "lora_alpha 4 -> 64"),
        ({"use_rslora": True}, "use_rslora False -> True"),
        ({"r": 4}, "r 2 -> 4"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"alpha_pattern": {"q_proj": 9}}, "alpha_pattern {} -> {'q_proj': 9}"),
    ],
    ids=str,
)
def test_train__refuses_another_adapter(tmp_path, tiny_model, tokenizer, pair_rows, fields, told):
    def run(config, **more):
        model = copy.deepcopy(tiny_model)
        return trainer_of(tmp_path, model, tokenizer, pair_rows, peft_config=config, **SAVING | more)

    run(LORA, max_steps=1).train()
    as_before = {"r": 2, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": ["v_proj", "q_proj"]}
    with pytest.raises(ValueError, match=rf"is of another run: the adapter \(.*{told}.*\) changed"):
        run(LoraConfig(**as_before | fields)).train(resume_from_checkpoint=True)
    same = run(LoraConfig(**as_before), max_steps=2)
    same.train(resume_from_checkpoint=True)
    assert same.state.global_step == 2


def test_train__a_longer_run_is_told(tmp_path, tiny_model, tokenizer, pair_rows, caplog):
    trainer_of(tmp_path, copy.deepcopy(tiny_model), tokenizer, pair_rows, **SAVING | {"max_steps": 1}).train()
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **SAVING | {"max_steps": 2}).train("true")
    assert "with other settings: max_steps 1 -> 2" in caplog.text


def test_config__refuses_an_order_of_rows_that_no_resume_could_find_again(tmp_path):
    with pytest.raises(ValueError, match="use_seedable_sampler=False is not supported"):
        config(tmp_path, accelerator_config={"use_seedable_sampler": False})
