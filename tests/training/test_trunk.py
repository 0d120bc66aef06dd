"""Frozen lowest layers run once for policy and reference: the same bits as two full passes."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from trainers import config, logged, parameters, trainer_of

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer
from vrpo.models import create_model
from vrpo.training.trunk import frozen_layers, shared_layers, train_top_layers

LAYERS = 4
TOP = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], layers_to_transform=[2, 3])
EVERYWHERE = LoraConfig(r=2, target_modules=["q_proj"])


@pytest.fixture
def model(tokenizer):
    return create_model(tokenizer, d_model=32, n_layers=LAYERS, n_heads=4, init_std=0.3, seed=0)


def run(tmp_path, model, tokenizer, rows, **fields):
    """(trainer, log) of six steps from a copy of the model."""
    trainer = trainer_of(tmp_path, copy.deepcopy(model), tokenizer, rows, num_train_epochs=2, **fields)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    "fields",
    [
        {"train_top_layers": 2},
        {"peft_config": TOP},
        {"peft_config": TOP, "gradient_mode": "replay", "max_tokens_per_pack": 40},
        {"train_top_layers": 2, "bf16": True},
        {"peft_config": TOP, "bf16": True, "gradient_checkpointing": True},
        {"peft_config": TOP, "gradient_checkpointing": True,
         "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["top", "lora", "lora-replay", "top-bf16", "lora-bf16-checkpointing", "lora-reentrant"],
)  # fmt: skip
@pytest.mark.filterwarnings(
    # transformers 5.23 renamed it; packages it works with read the old name.
    "ignore:.gradient_checkpointing.* is deprecated:FutureWarning"
)
def test_train__a_shared_trunk_gives_the_bits_of_two_passes(tmp_path, model, tokenizer, pair_rows, fields):
    apart = run(tmp_path / "apart", model, tokenizer, pair_rows, share_trunk=False, **fields)
    shared = run(tmp_path / "shared", model, tokenizer, pair_rows, share_trunk=True, **fields)
    assert shared._trunk_layers == 2 and apart._trunk_layers == 0
    assert logged(shared, "loss") == logged(apart, "loss")
    assert logged(shared, "rewards/margins") == logged(apart, "rewards/margins")
    assert torch.equal(parameters(shared.model), parameters(apart.model))
    assert len(set(logged(shared, "loss"))) == 6  # it learns


def test_train__bf16_weights_share_their_trunk_in_bf16(tmp_path, model, tokenizer, pair_rows):
    """Mixed precision widens what a model returns; the second half must start from what the first had."""
    model = model.bfloat16()
    ends = [
        run(tmp_path / str(on), model, tokenizer, pair_rows, share_trunk=on, train_top_layers=2, bf16=True)
        for on in (True, False)
    ]
    assert torch.equal(*(parameters(end.model) for end in ends))
    assert logged(ends[0], "rewards/chosen") == logged(ends[1], "rewards/chosen")


def test_train__the_reference_runs_the_upper_layers_alone(tmp_path, model, tokenizer, pair_rows):
    """Upper half trained: 2 + .5 passes of the body for 4, heads apart; with LoRA a trifle more."""
    flops = []
    for on in (True, False):
        trainer = trainer_of(
            tmp_path / str(on), copy.deepcopy(model), tokenizer, pair_rows, train_top_layers=2, share_trunk=on
        )
        batch = next(iter(trainer.get_train_dataloader()))
        trainer.create_optimizer()
        trainer.model.train()
        with FlopCounterMode(display=False) as counter:
            trainer.training_step(trainer.model, batch, 4)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.85 * flops[1]  # 2.5 for 3: the lower half has no backward either way


def test_train_top_layers__freezes_what_is_below(tmp_path, model, tokenizer, pair_rows):
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = run(tmp_path, model, tokenizer, pair_rows, train_top_layers=1)
    moved = {name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])}
    top = {name for name in start if name.startswith(("model.layers.3.", "model.norm", "lm_head"))}
    assert moved == top
    frozen = [p for name, p in trainer.model.named_parameters() if name not in top]
    copies = dict(trainer.ref_model.named_parameters())
    assert all(any(p is other for other in copies.values()) for p in frozen)  # not a second time in memory
    assert not any(copies[name] is p for name, p in trainer.model.named_parameters() if name in top)
    resumed = trainer_of(tmp_path, copy.deepcopy(model), tokenizer, pair_rows, train_top_layers=1)
    assert resumed._trunk_layers == 3


@pytest.mark.parametrize("targets", [["q_proj"], "all-linear"])
def test_train_top_layers__places_the_adapter(tmp_path, model, tokenizer, pair_rows, targets):
    adapter = LoraConfig(r=2, target_modules=targets)
    trainer = trainer_of(
        tmp_path, model, tokenizer, pair_rows, peft_config=adapter, train_top_layers=1, share_trunk=True
    )
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    assert trained and all(".layers.3." in name for name in trained)
    assert len(trained) == 2 * (1 if isinstance(targets, list) else 7)
    assert adapter.layers_to_transform is None and trainer._trunk_layers == 3


def test_sft__trains_the_top_layers(tmp_path, model, tokenizer):
    rows = [{"prompt_ids": [7, 8], "completion_ids": [9, 10, 11]}] * 4
    args = config(tmp_path, DiffusionSFTConfig, train_top_layers=2, max_eos_fill=0)
    trainer = DiffusionSFTTrainer(model, args=args, train_dataset=rows, processing_class=tokenizer)
    before = model.model.layers[1].mlp.up_proj.weight.clone()
    trainer.train()
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, before)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"share_trunk": True}, "no lowest layers in common: the embedding is trained"),
        ({"train_top_layers": 5}, r"train_top_layers must be in \[1, 4\], the model's layers, got 5"),
        ({"train_top_layers": 4, "share_trunk": True}, "in common: layer 0 is trained"),
        ({"train_top_layers": 2, "peft_config": TOP}, "both say which layers train"),
        ({"share_trunk": True, "peft_config": EVERYWHERE}, "layer 0 is trained"),
    ],
    ids=["full", "beyond", "all", "twice", "lora-everywhere"],
)  # fmt: skip
def test_init__says_why_there_is_no_trunk(tmp_path, model, tokenizer, pair_rows, fields, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, model, tokenizer, pair_rows, **fields)


def test_shared_layers__of_another_reference_are_those_with_equal_weights(model, tokenizer):
    other = copy.deepcopy(model)
    train_top_layers(model, 1)
    assert frozen_layers(model)[0] == 3
    assert shared_layers(model, other, None) == 3
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-3
    assert shared_layers(model, other, None) == 1
    smaller = create_model(tokenizer, d_model=16, n_layers=2, n_heads=2, seed=0)
    assert shared_layers(model, smaller, None) == 0
    with pytest.raises(ValueError, match="the reference is another model"):
        shared_layers(model, smaller, True)
    frozen_head = copy.deepcopy(model).requires_grad_(False)
    assert frozen_layers(frozen_head)[0] == LAYERS - 1


def test_frozen_layers__end_below_a_frozen_adapter(model):
    """It tells the policy from the model with its adapter off, although it does not train."""
    adapted = get_peft_model(model, EVERYWHERE)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_(".layers.3." in name and "lora_" in name)
    assert frozen_layers(adapted) == (0, "layer 0 has an adapter")
    assert frozen_layers(adapted.unload())[0] == LAYERS - 1


def test_model__refuses_a_trunk_without_a_pack(model):
    ids = torch.tensor([[5, 6, 7]])
    with pytest.raises(ValueError, match="trunk_layers need a pack"):
        model(input_ids=ids, trunk_layers=2)
    cu = torch.tensor([0, 3], dtype=torch.int32)
    pack = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 3, "max_length_k": 3}
    with pytest.raises(ValueError, match=r"trunk_layers must be in \[0, 4\)"):
        model(input_ids=ids, position_ids=torch.arange(3)[None], trunk_layers=4, **pack)
