"""The trainers: exact starts, accumulation, resume, evaluation, and what they refuse."""

import copy
import inspect
import json
import math
import shutil

import pytest
import torch
from peft import get_peft_model
from trainers import LORA, config, logged, parameters, trainer_of
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from vrpo import DiffusionKTOTrainer, DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.estimator.masking import EVALUATION_EPOCH


@pytest.mark.parametrize("reference", ["frozen copy", "explicit", "adapter"])
def test_train__starts_at_log_two_with_margin_zero(tmp_path, tiny_model, tokenizer, pair_rows, reference):
    extra = {"num_replicates": 2}
    if reference == "adapter":
        extra["peft_config"] = LORA
    if reference == "explicit":
        extra["ref_model"] = copy.deepcopy(tiny_model)
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, sft_weight=0.0, max_steps=3, **extra)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    for key in (
        "rewards/margins",
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "vrpo/score_std",
    ):
        assert logged(trainer, key)[0] == 0.0, key
    assert logged(trainer, "rewards/margins")[-1] != 0.0
    assert losses[-1] < losses[0]


def test_init__does_not_replay_a_model_with_dropout(tmp_path, tiny_model, tokenizer, pair_rows):
    fields = {"peft_config": LORA, "disable_dropout": False}
    with pytest.raises(ValueError, match=r"gradient_mode='replay' passes every pack twice.*dropout"):
        trainer_of(
            tmp_path, copy.deepcopy(tiny_model), tokenizer, pair_rows, gradient_mode="replay", **fields
        )
    with pytest.raises(ValueError, match=r"its num_samples=2 masked copies take .* max_tokens_per_pack=20"):
        trainer_of(
            tmp_path, copy.deepcopy(tiny_model), tokenizer, pair_rows, max_tokens_per_pack=20, **fields
        )
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **fields)
    assert trainer.gradient_mode == "joint"


def test_micro_batches__are_as_many_and_in_as_many_packs_as_any_process_needs(
    tmp_path, tiny_model, tokenizer, pair_rows, monkeypatch
):
    """Processes that hold parts of a model wait for each other in every pass."""
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_tokens_per_pack=1000)
    batch = next(iter(trainer.get_train_dataloader()))["responses"]
    assert [count for _, count in trainer._micro_batches(batch)] == [1]
    monkeypatch.setattr(VRPOConfig, "world_size", 2)
    needs = iter([[3], [1, 4, 2]])  # of the other process: micro-batches, then packs of each
    monkeypatch.setattr(trainer, "_largest", lambda own: list(map(max, own, next(needs))))
    steps = [step for _, step in trainer._steps(tiny_model, trainer._micro_batches(batch))]
    assert [step.num_shares for step in steps] == [1, 4, 2]
    assert [len(step.packs) for step in steps] == [1, 4, 2]


def test_train__logs_how_far_the_passes_of_a_replay_differ(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, max_tokens_per_pack=20, eval_dataset=pair_rows
    )
    trainer.train()
    assert set(logged(trainer, "vrpo/replay_drift")) == {0.0}
    assert "eval_vrpo/replay_drift" not in trainer.evaluate()


@pytest.mark.parametrize("batch_size", [1, 3, 12])
def test_train__margins_are_exactly_zero_for_any_batch(
    tmp_path, tiny_model, tokenizer, pair_rows, batch_size
):
    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, per_device_train_batch_size=batch_size, learning_rate=0.0
    )
    trainer.train()
    assert set(logged(trainer, "rewards/margins")) == {0.0}
    assert set(logged(trainer, "rewards/chosen")) == {0.0}


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    "spread",
    [
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_tokens_per_pack": 150},
        {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_tokens_per_pack": 20},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "gradient_mode": "replay"},
    ],
    ids=["8x1", "2x4", "token-budget", "divided-pairs", "replay"],
)
def test_train__accumulation_and_token_budget_do_not_matter(
    tmp_path, tiny_model, tokenizer, pair_rows, spread, adapter
):
    """Two epochs of 12 pairs in steps of 8 and 4: the short last step counts pairs, not batches."""
    ends = []
    for number, fields in enumerate(
        ({"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}, spread)
    ):
        model = copy.deepcopy(tiny_model).double()
        trainer = trainer_of(
            tmp_path / str(number),
            model,
            tokenizer,
            pair_rows,
            num_train_epochs=2,
            max_grad_norm=0.1,
            **fields,
            **({"peft_config": LORA} if adapter else {}),
        )
        trainer.model.double()  # PEFT makes adapters float32
        trainer.train()
        assert trainer.state.global_step == 4
        ends.append((parameters(trainer.model), logged(trainer, "loss"), logged(trainer, "rewards/margins")))
    (one, one_loss, one_margin), (other, other_loss, other_margin) = ends
    # The NLL is fp32 even for ... see linear_cross_entropy; fp64 models go through the reference in fp64.
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
    assert one_loss == pytest.approx(other_loss, rel=1e-5)
    assert one_margin == pytest.approx(other_margin, rel=1e-6)


def test_train__resume_equals_the_straight_run_bitwise(tmp_path, tiny_model, tokenizer, pair_rows):
    def run(name, **kwargs):
        trainer = trainer_of(
            tmp_path / name,
            copy.deepcopy(tiny_model),
            tokenizer,
            pair_rows,
            num_train_epochs=3,
            save_strategy="steps",
            save_steps=4,
        )
        trainer.train(**kwargs)
        return trainer

    straight = run("straight")
    shutil.copytree(tmp_path / "straight/out/checkpoint-4", tmp_path / "saved/checkpoint-4")
    resumed = run("resumed", resume_from_checkpoint=str(tmp_path / "saved/checkpoint-4"))
    assert torch.equal(parameters(straight.model), parameters(resumed.model))
    assert logged(straight, "loss") == logged(resumed, "loss")
    # The reference is the model training started from, not the checkpoint.
    assert torch.equal(parameters(resumed.ref_model), parameters(tiny_model))


def test_train__epochs_draw_fresh_masks_and_evaluation_repeats_its_own(
    tmp_path, tiny_model, tokenizer, pair_rows, monkeypatch
):
    trainer = trainer_of(
        tmp_path,
        tiny_model,
        tokenizer,
        pair_rows,
        eval_dataset=pair_rows,
        num_train_epochs=2,
        eval_strategy="epoch",
    )
    epochs = []
    original = VRPOTrainer._parts

    def spy(self, model, batch, pack, epoch):
        epochs.append(epoch)
        return original(self, model, batch, pack, epoch)

    monkeypatch.setattr(VRPOTrainer, "_parts", spy)
    trainer.train()
    assert epochs == [0] * 3 + [EVALUATION_EPOCH] * 2 + [1] * 3 + [EVALUATION_EPOCH] * 2
    evaluated = [e for e in trainer.state.log_history if "eval_loss" in e]
    again = trainer.evaluate()
    assert again["eval_rewards/margins"] == evaluated[-1]["eval_rewards/margins"]
    assert again["eval_loss"] == pytest.approx(evaluated[-1]["eval_loss"])
    assert 0.0 <= again["eval_rewards/accuracies"] <= 1.0


def test_train__switches_lora_dropout_off(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, peft_config=LORA)
    dropouts = [m.p for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert dropouts and set(dropouts) == {0.0}


def test_train__full_model_gets_a_gradient_everywhere(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert not torch.equal(before[name], parameter), name


@pytest.mark.filterwarnings(
    "ignore:.gradient_checkpointing.* is deprecated:FutureWarning"
)  # 5.17 knows no other
def test_train__gradient_checkpointing_changes_nothing(tmp_path, tiny_model, tokenizer, pair_rows):
    ends = []
    for number, checkpointing in enumerate((False, True)):
        trainer = trainer_of(
            tmp_path / str(number),
            copy.deepcopy(tiny_model),
            tokenizer,
            pair_rows,
            gradient_checkpointing=checkpointing,
        )
        trainer.train()
        ends.append(parameters(trainer.model))
    assert torch.equal(*ends)


def test_train__stops_at_a_loss_that_is_not_finite(tmp_path, tiny_model, tokenizer, pair_rows):
    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                next(model.parameters()).data.fill_(math.nan)

    trainer = trainer_of(
        tmp_path, tiny_model, tokenizer, pair_rows, save_strategy="steps", save_steps=1, callbacks=[Break()]
    )
    with pytest.raises(
        FloatingPointError,
        match=r"step 2.*examples \[\d+.*the last checkpoint with finite weights is \S+checkpoint-2",
    ):
        trainer.train()
    state = json.loads((tmp_path / "out/checkpoint-2/trainer_state.json").read_text())
    assert state["global_step"] == 2
    assert not (tmp_path / "out/checkpoint-3").exists()


def test_sft__lowers_the_loss_and_reports_the_elbo(tmp_path, tiny_model, tokenizer, completion_rows):
    trainer = DiffusionSFTTrainer(
        tiny_model,
        args=config(tmp_path, DiffusionSFTConfig, num_train_epochs=20, num_samples=4),
        train_dataset=completion_rows,
        eval_dataset=completion_rows,
        processing_class=tokenizer,
    )
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < 0.8 * before["eval_loss"]
    assert after["eval_loss"] == pytest.approx(-after["eval_elbo/completion_per_token"], rel=1e-5)


def test_save_model__loads_again_with_the_same_weights(tmp_path, tiny_model, tokenizer, pair_rows):
    trainer = trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = trainer_of(tmp_path / "again", str(tmp_path / "saved"), None, pair_rows)
    assert torch.equal(parameters(again.model), parameters(trainer.model))


def test_init__refuses_a_causal_model(tmp_path, tokenizer, pair_rows):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    causal = LlamaForCausalLM(LlamaConfig(vocab_size=300, **sizes))
    with pytest.raises(ValueError, match=r"model must be a masked-diffusion model.*LlamaForCausalLM"):
        trainer_of(tmp_path, causal, tokenizer, pair_rows)


def test_init__refuses_a_reference_that_is_the_policy(tmp_path, tiny_model, tokenizer, pair_rows):
    with pytest.raises(ValueError, match="ref_model is the model itself"):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, ref_model=tiny_model)


@pytest.mark.parametrize("shared", ["base under the adapter", "part", "memory"])
def test_init__refuses_a_reference_that_shares_trained_weights(
    tmp_path, tiny_model, tokenizer, pair_rows, shared
):
    model, ref_model = tiny_model, copy.deepcopy(tiny_model)
    if shared == "base under the adapter":
        model, ref_model = get_peft_model(tiny_model, copy.deepcopy(LORA)), tiny_model
    elif shared == "part":
        ref_model.lm_head = model.lm_head
    else:
        ref_model.load_state_dict(model.state_dict(), assign=True)
    with pytest.raises(ValueError, match=r"ref_model shares weights with the model .*(lora_A|lm_head)"):
        trainer_of(tmp_path, model, tokenizer, pair_rows, ref_model=ref_model)
    assert any(p.requires_grad for p in model.parameters())


def test_init__a_reference_may_share_weights_that_stay(tmp_path, tiny_model, tokenizer, pair_rows):
    ref_model = copy.deepcopy(tiny_model)
    model = get_peft_model(tiny_model, copy.deepcopy(LORA))
    ref_model.lm_head = tiny_model.lm_head
    trainer = trainer_of(tmp_path, model, tokenizer, pair_rows, ref_model=ref_model, max_steps=1)
    trainer.train()
    assert logged(trainer, "rewards/margins") == [0.0]


def test_init__refuses_a_reference_in_another_dtype(tmp_path, tiny_model, tokenizer, pair_rows):
    with pytest.raises(ValueError, match=r"ref_model has parameters in .*bfloat16"):
        trainer_of(
            tmp_path, tiny_model, tokenizer, pair_rows, ref_model=copy.deepcopy(tiny_model).to(torch.bfloat16)
        )


def test_init__refuses_a_reference_with_another_attention(tmp_path, tiny_model, tokenizer, pair_rows):
    reference = copy.deepcopy(tiny_model)
    reference.set_attn_implementation("vrpo_sdpa")
    with pytest.raises(
        ValueError, match="ref_model computes attention with 'vrpo_sdpa', the policy with 'vrpo'"
    ):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, ref_model=reference)


def test_init__refuses_a_reference_with_another_vocabulary(tmp_path, tiny_model, tokenizer, pair_rows):
    reference = copy.deepcopy(tiny_model)
    reference.resize_token_embeddings(310)
    with pytest.raises(ValueError, match="ref_model has a vocabulary of 310, the policy of 300"):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, ref_model=reference)


def test_init__refuses_a_trained_adapter_without_a_reference(tmp_path, tiny_model, tokenizer, pair_rows):
    adapted = get_peft_model(tiny_model, LORA)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    with pytest.raises(ValueError, match="starts from a trained adapter"):
        trainer_of(tmp_path, adapted, tokenizer, pair_rows)


def test_init__refuses_a_missing_tokenizer(tmp_path, tiny_model, pair_rows):
    with pytest.raises(ValueError, match="processing_class is needed"):
        trainer_of(tmp_path, tiny_model, None, pair_rows)


def test_init__refuses_a_pair_larger_than_the_token_budget(tmp_path, tiny_model, tokenizer, pair_rows):
    budget = {"max_tokens_per_pack": 20}
    trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, **budget)
    with pytest.raises(ValueError, match=r"its num_samples=2 masked copies take .* max_tokens_per_pack=20"):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, gradient_mode="joint", **budget)
    with pytest.raises(ValueError, match=r"one masked copy takes .* max_tokens_per_pack=2"):
        trainer_of(tmp_path, tiny_model, tokenizer, pair_rows, max_tokens_per_pack=2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"sft_weight": -0.1}, "sft_weight must not be negative"),
        ({"num_samples": 0}, "num_samples must be at least 1"),
        ({"num_samples": 4, "masks_per_level": 3}, "masks_per_level must divide num_samples = 4"),
        ({"num_samples": 4, "num_replicates": 3}, "num_replicates must divide the number of levels"),
        ({"pair_masks": "same"}, "pair_masks must be one of"),
        ({"mask_design": "papre"}, "mask_design must be one of"),
        ({"max_length": 1}, "max_length must be at least 2"),
        ({"max_prompt_length": 4096}, "max_prompt_length must be in"),
        ({"remove_unused_columns": True}, "remove_unused_columns must be False"),
        ({"seed": -1}, "seed must be in"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_config__refuses_bad_fields(tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **fields)


def test_config__refuses_an_unwritable_output_dir(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    with pytest.raises(ValueError, match="output_dir must be a writable directory"):
        config(tmp_path, output_dir=str(blocked / "run"))


def test_config__defaults_are_the_recipe_of_the_paper_but_for_the_mask_draw(tmp_path):
    recipe = VRPOConfig(output_dir=str(tmp_path), use_cpu=True)
    assert (recipe.beta, recipe.sft_weight, recipe.num_samples, recipe.masks_per_level) == (0.2, 0.05, 8, 1)
    assert (recipe.learning_rate, recipe.weight_decay, recipe.adam_beta1, recipe.adam_beta2) == (
        5e-7,
        0.01,
        0.9,
        0.95,
    )
    assert (recipe.lr_scheduler_type, recipe.warmup_steps, recipe.num_train_epochs) == ("cosine", 15, 1.0)
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 64
    assert (recipe.mask_design, recipe.pair_masks, recipe.num_replicates) == (
        "graded-balanced",
        "positions",
        2,
    )


@pytest.mark.parametrize("kind", [VRPOTrainer, DiffusionKTOTrainer])
def test_init__takes_its_arguments_in_the_order_of_trl(kind):
    names = list(inspect.signature(kind).parameters)
    assert names[:7] == [
        "model", "ref_model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class"
    ]  # fmt: skip
