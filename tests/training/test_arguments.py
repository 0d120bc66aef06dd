"""Every inherited argument works, is refused with a reason, or means nothing: none is silently ignored."""

import dataclasses
import math
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trainers import LORA, config, logged, parameters, trainer_of
from transformers import TrainingArguments

from vrpo import DiffusionSFTConfig, VRPOConfig, VRPOTrainer
from vrpo.models.checkpoint import load_policy
from vrpo.training.support import IRRELEVANT, REFUSED, WORKS

REFUSED_VALUES = {
    "neftune_noise_alpha": 5.0,
    "label_smoothing_factor": 0.1,
    "label_names": ["labels"],
    "train_sampling_strategy": "group_by_length",
    "bf16_full_eval": True,
    "fp16_full_eval": True,
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "use_cache": True,
    "include_num_input_tokens_seen": "all",
    "include_for_metrics": ["inputs"],
    "eval_use_gather_object": True,
    "auto_find_batch_size": True,
    "parallelism_config": object(),
    "remove_unused_columns": True,
    "optim": "lomo",
}


def test_training_arguments__every_field_is_in_one_table():
    """A field of a newer transformers fails here until someone has looked at what it does."""
    fields = {field.name for field in dataclasses.fields(TrainingArguments)}
    tables = [set(REFUSED), set(IRRELEVANT), set(WORKS)]
    known = set().union(*tables)
    assert fields - known == set()
    assert sum(map(len, tables)) == len(known)
    # Two names came with 5.23; every other one exists in 5.17, too.
    assert known - fields <= {"activation_checkpointing", "activation_checkpointing_kwargs"}
    assert set(REFUSED_VALUES) == set(REFUSED)


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("kind", [VRPOConfig, DiffusionSFTConfig])
def test_config__refuses_what_would_do_nothing_or_harm(tmp_path, name, kind):
    with pytest.raises(ValueError, match=name) as error:
        config(tmp_path, kind, **{name: REFUSED_VALUES[name]})
    assert "\n" not in str(error.value)
    default = next(field for field in dataclasses.fields(TrainingArguments) if field.name == name)
    if default.default is not dataclasses.MISSING and name != "remove_unused_columns":
        config(tmp_path, kind, **{name: default.default})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps must be at least 1, got 0"),
        ({"gradient_accumulation_steps": -1}, "gradient_accumulation_steps must be at least 1"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"per_device_eval_batch_size": -2}, "per_device_eval_batch_size must be at least 1"),
        ({"max_steps": 0}, "max_steps must be at least 1, or -1"),
        ({"num_train_epochs": 0}, "num_train_epochs must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate must be a finite number, got nan"),
        ({"learning_rate": -1.0}, "learning_rate must be at least 0"),
        ({"learning_rate": "fast"}, "learning_rate must be a number, got 'fast'"),
        ({"beta": math.inf}, "beta must be a finite number"),
        ({"beta": "0.2"}, "beta must be a number"),
        ({"num_samples": 2.5}, "num_samples must be an integer"),
        ({"num_samples": True}, "num_samples must be an integer"),
        ({"mask_design": 3}, "mask_design must be a text"),
        ({"loss_type": "hinges"}, "loss_type must be one or several of sigmoid,.*got 'hinges'"),
        ({"loss_type": 3}, "loss_type must be one or several of"),
        ({"loss_type": {"ipo": 1.0}}, "loss_type must be one value or a list"),
        ({"loss_type": ["ipo", "hinge"], "loss_weights": [1.0]}, "got 1 weights for 2 losses"),
        ({"loss_weights": {"sigmoid": 1.0}}, "loss_weights must be one value or a list"),
        ({"label_smoothing": 0.5}, r"label_smoothing must be in \[0, 0.5\)"),
        ({"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing=0.1 does nothing in hinge"),
        ({"simpo_gamma": math.inf}, "simpo_gamma must be a finite number"),
        ({"loss_type": "simpo", "share_trunk": True}, "share_trunk=True does nothing without a loss_type"),
        ({"sft_weight": math.nan}, "sft_weight must be a finite number"),
        ({"adam_beta1": 1.0}, r"adam_beta1 must be in \[0, 1\)"),
        ({"adam_epsilon": 0.0}, "adam_epsilon must be above 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be at least 0"),
        ({"max_tokens_per_pack": 0}, "max_tokens_per_pack must be at least 1"),
        ({"mask_token_id": -1}, "mask_token_id must be at least 0"),
        ({"logging_steps": -1}, "logging_steps must be above 0"),
        ({"save_steps": -5}, "save_steps must be above 0"),
        ({"disable_dropout": "maybe"}, "disable_dropout must be true or false"),
        ({"fp16": True}, "fp16=True does nothing on a CPU"),
        ({"fp16": True, "bf16": True}, "At most one of fp16 and bf16"),
        ({"lr_scheduler_type": "cosin"}, "cosin is not a valid SchedulerType"),
        ({"optim": "adam"}, "adam is not a valid OptimizerNames"),
        (
            {"dataloader_persistent_workers": True},
            "dataloader_persistent_workers needs dataloader_num_workers",
        ),
        ({"accelerator_config": {"dispatch_batches": True}}, "dispatch_batches is not supported"),
        ({"accelerator_config": {"even": True}}, "training arguments: .*even"),
        (
            {"save_strategy": "steps", "load_best_model_at_end": True},
            "requires the save and eval strategy to match",
        ),
        ({"eval_strategy": "sometimes"}, "sometimes is not a valid IntervalStrategy"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_config__tells_bad_values_in_one_line(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        config(tmp_path, **fields)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"report_to": "wandb"}, "report_to=wandb needs the package wandb"),
        ({"report_to": ["tensorbord"]}, "report_to must be none, all or some of"),
        ({"lr_scheduler_kwargs": {"cycles": 3}}, "lr_scheduler_kwargs=.*'cycles'.* do not fit"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "do not fit lr_scheduler_type='cosine_with_min_lr'"),
        ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1"),
        ({"optim": "adamw_bnb_8bit"}, "optim='adamw_bnb_8bit': .*bitsandbytes"),
        ({"optim": "galore_adamw"}, "optim='galore_adamw': "),
        ({"optim": "adafactor", "optim_args": "nonsense"}, "optim='adafactor': "),
        ({"optim_args": "eps=1"}, "optim='adamw_torch_fused' does not read 'eps=1'"),
        ({"optim": "sgd", "optim_args": "momentum=.9, foo=1"}, "optim='sgd' does not read 'foo=1'"),
        ({"optim": "sgd", "optim_args": "momentum=-1"}, "optim='sgd': Invalid momentum value: -1"),
        ({"optim_target_modules": "all"}, "optim_target_modules='all' does nothing with"),
        ({"lr_scheduler_kwargs": {"num_cycles": None}}, "do not fit lr_scheduler_type='cosine'"),
        ({"lr_scheduler_kwargs": {"num_cycles": "a"}}, "do not fit lr_scheduler_type='cosine'"),
        ({"lr_scheduler_kwargs": {"num_cycles": math.inf}}, "do not fit lr_scheduler_type='cosine'"),
        (
            {"lr_scheduler_type": "cosine_with_min_lr", "lr_scheduler_kwargs": {"min_lr_rate": "0.1"}},
            "do not fit lr_scheduler_type='cosine_with_min_lr'",
        ),
        (
            {"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"power": "a"}},
            "do not fit lr_scheduler_type='polynomial'",
        ),
        (
            {"lr_scheduler_type": "inverse_sqrt", "lr_scheduler_kwargs": {"timescale": 0}},
            "do not fit lr_scheduler_type='inverse_sqrt'",
        ),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 13},
            "dataloader_drop_last leaves no batch",
        ),
        (
            {"dataloader_drop_last": True, "per_device_eval_batch_size": 13},
            "dataloader_drop_last leaves no batch of the 12 eval rows",
        ),
        (
            {
                "save_strategy": "epoch",
                "eval_strategy": "epoch",
                "load_best_model_at_end": True,
                "metric_for_best_model": "rewards/acuracy",
            },
            "metric_for_best_model must be one of loss, rewards/accuracies.*got 'rewards/acuracy'",
        ),
        ({"max_length": 4096, "max_tokens_per_pack": 10}, "max_tokens_per_pack"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_init__refuses_what_would_fail_later(tmp_path, tiny_model, tokenizer, pair_rows, fields, message):
    if fields.get("report_to") == "wandb":
        from transformers.integrations import is_wandb_available

        if is_wandb_available():
            pytest.skip("wandb is installed")
    if fields.get("optim") == "adamw_bnb_8bit":
        from transformers.utils import is_bitsandbytes_available

        if is_bitsandbytes_available():
            pytest.skip("bitsandbytes is installed")
    with pytest.raises(ValueError, match=message) as error:
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, eval_dataset=pair_rows, **fields)
    assert "\n" not in str(error.value)


WORKING = {
    "adafactor": {"optim": "adafactor"},
    "sgd": {"optim": "sgd"},
    "adamw_torch": {"optim": "adamw_torch"},
    "sequential": {"train_sampling_strategy": "sequential", "data_seed": 3},
    "best": {
        "save_strategy": "best",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "rewards/margins",
        "load_best_model_at_end": True,
    },
    "plateau": {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1},
    "evaluation": {
        "eval_on_start": True,
        "eval_strategy": "epoch",
        "eval_accumulation_steps": 1,
        "eval_delay": 1,
        "eval_do_concat_batches": False,
        "prediction_loss_only": True,
    },
    "loader": {
        "dataloader_drop_last": True,
        "dataloader_num_workers": 1,
        "dataloader_persistent_workers": True,
    },
    "memory": {"torch_empty_cache_steps": 1, "skip_memory_metrics": False, "max_grad_norm": 0.0},
    "split batches": {"accelerator_config": {"split_batches": True}},
    "numpy numbers": {"num_samples": 4, "learning_rate": 0, "warmup_steps": 0.5},
    "debug": {"debug": "underflow_overflow"},
    "jit checkpoint": {"enable_jit_checkpoint": True, "save_strategy": "steps"},
}


@pytest.mark.parametrize("name", WORKING)
def test_train__runs_with_arguments_that_are_said_to_work(tmp_path, tiny_model, tokenizer, pair_rows, name):
    fields = dict(WORKING[name])
    trainer = trainer_of(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        eval_dataset=pair_rows,
        max_steps=2,
        sft_weight=0.0,
        **fields,
    )
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.isfinite(parameters(trainer.model)).all()


def test_train__full_determinism_gives_the_same_run(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1, full_determinism=True)
    try:
        trainer.train()
        assert logged(trainer, "rewards/margins") == [0.0]
    finally:
        torch.use_deterministic_algorithms(False)
        for name in (
            "CUDA_LAUNCH_BLOCKING",
            "CUBLAS_WORKSPACE_CONFIG",
            "ASCEND_LAUNCH_BLOCKING",
            "HCCL_DETERMINISTIC",
        ):
            os.environ.pop(name, None)


def test_train__logs_its_first_and_its_last_step(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, max_steps=5, logging_steps=10, sft_weight=0.0
    )
    trainer.train()
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 5]
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    silent = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=2, logging_strategy="no")
    silent.train()
    assert logged(silent, "loss") == []


OWN = [field.name for field in dataclasses.fields(VRPOConfig)]
NUMBERS = [
    field.name
    for field in dataclasses.fields(VRPOConfig)
    if field.type in (int, float, int | None, float | None)
]
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 9),
    st.sampled_from([2**31, -(2**63), 10**30]),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from([0.5, 1.0, 1e-8, -0.0]),
    st.text(max_size=5),
    st.sampled_from(["balanced", "paper", "true", "no", "levels", "sigmoid_jackknife", "1e-5", "{", "steps"]),
    st.lists(st.integers(0, 3), max_size=2),
    st.dictionaries(st.text(max_size=3), st.integers(0, 3), max_size=1),
)
UNTOUCHED = {"output_dir", "use_cpu", "push_to_hub", "log_level", "log_level_replica", "ddp_backend", "tf32"}


@pytest.mark.parametrize("name", ["fsdp_config", "deepspeed", "accelerator_config"])
@pytest.mark.parametrize("value", [2, True, 1.0])
def test_config__a_number_is_no_file_of_settings(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        config(tmp_path, **{name: value})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    fields=st.dictionaries(
        st.sampled_from([name for name in OWN if name not in UNTOUCHED]), ODD, min_size=1, max_size=3
    )
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_config__any_value_passes_or_is_refused_in_one_line(tmp_path, fields):
    try:
        config(tmp_path, **fields)
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    fields=st.dictionaries(
        st.sampled_from(
            [name for name in NUMBERS if name not in ("max_steps", "dataset_num_proc", *UNTOUCHED)]
        ),
        st.one_of(st.integers(0, 9), st.floats(0, 2), st.sampled_from([1e-30, 2**31, 1e30])),
        min_size=1,
        max_size=3,
    )
)
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_train__what_the_config_accepts_trains_a_step_or_is_refused(
    tmp_path, tiny_model, tokenizer, pair_rows, fields
):
    try:
        trainer = trainer_of(
            tmp_path,
            tiny_model,
            tokenizer,
            pair_rows,
            **{"max_steps": 1, "dataloader_num_workers": 0} | fields,
        )
    except (ValueError, OSError) as error:
        assert str(error) and "\n" not in str(error)
        return
    if trainer.args.dataloader_num_workers > 2:
        return
    try:
        trainer.train()
    except FloatingPointError as error:  # a beta of 1e30 is allowed, and its gradient is not a number
        assert "\n" not in str(error)
    else:
        assert trainer.state.global_step == 1


def test_train__a_beta_may_be_an_integer(tmp_path, tiny_model, tokenizer, pair_rows):
    betas = {"adam_beta1": 0, "adam_beta2": 0}
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1, **betas)
    trainer.train()
    assert trainer.state.global_step == 1


@pytest.mark.parametrize("adapter", [False, True])
def test_train__a_mask_token_of_the_arguments_is_saved(tmp_path, tiny_model, tokenizer, pair_rows, adapter):
    extra = {"peft_config": LORA} if adapter else {}
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1, mask_token_id=7, **extra)
    trainer.train()
    trainer.save_model()
    assert load_policy(str(tmp_path / "out")).config.mask_token_id == 7


def test_train__a_collator_without_responses_is_told_what_is_needed(
    tmp_path, tiny_model, tokenizer, pair_rows
):
    def collate(rows):
        return {"input_ids": torch.zeros(2, 2)}

    args = {"args": config(tmp_path, max_steps=1), "processing_class": tokenizer}
    trainer = VRPOTrainer(tiny_model, train_dataset=pair_rows, data_collator=collate, **args)
    for act in (trainer.train, lambda: trainer.evaluate(pair_rows)):
        with pytest.raises(ValueError, match=r"under 'responses'.*; got the keys \['input_ids'\]"):
            act()
