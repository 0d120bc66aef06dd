"""LoRA through the trainers: the base that is kept, names on disk, resume, the reference, seeds."""

import json

import pytest
import torch
from original_llada import OriginalLLaDA
from peft import AutoPeftModelForCausalLM, IA3Config, LoHaConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from vrpo import DiffusionSFTConfig, DiffusionSFTTrainer, VRPOConfig, VRPOTrainer
from vrpo.models import load_model, load_tokenizer
from vrpo.models.adapters import load_adapter
from vrpo.models.checkpoint import load_policy

IDS = torch.arange(20, 40)[None]
LORA = dict(r=2, lora_alpha=4, target_modules="all-linear")


@pytest.fixture
def base(tmp_path, tiny_model, tokenizer):
    tiny_model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


def settings(folder, **more):
    return {
        "output_dir": str(folder),
        "max_steps": 2,
        "learning_rate": 5e-2,
        "warmup_steps": 0,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    } | more


def vrpo(model, folder, rows, tokenizer=None, ref_model=None, peft_config=None, **fields):
    return VRPOTrainer(
        model,
        ref_model=ref_model,
        args=VRPOConfig(num_samples=2, **settings(folder, **fields)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def sft(model, folder, rows, tokenizer=None, peft_config=None, **fields):
    return DiffusionSFTTrainer(
        model,
        args=DiffusionSFTConfig(num_samples=2, **settings(folder, **fields)),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=peft_config,
    )


def run(trainer):
    trainer.train()
    trainer.save_model()
    return trainer


def logits(model):
    with torch.no_grad():
        output = model.eval()(input_ids=IDS)
    return output if isinstance(output, torch.Tensor) else output.logits


def assert_opens_everywhere(folder, trained):
    """Our loaders, PEFT's and LLaDA's class give the trained policy from the folder alone."""
    want = logits(trained)
    base = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert load_tokenizer(str(folder)).mask_token_id is not None
    # Merged weights round differently from base + adapter.
    close = {"rtol": 0, "atol": 1e-5 * want.abs().max().item()}
    torch.testing.assert_close(logits(load_policy(str(folder))), want, **close)
    assert torch.equal(logits(load_adapter(load_model(base), folder)), want)
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder)), want)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(OriginalLLaDA(base), folder)), want, **close)


def test_train__adapter_on_a_saved_base_names_it(tmp_path, base, completion_rows):
    trainer = run(sft(base, tmp_path / "out", completion_rows, peft_config=LoraConfig(**LORA)))
    assert not (tmp_path / "out" / "base_model").exists()
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == base
    assert_opens_everywhere(tmp_path / "out", trainer.model)


def test_train__adapter_on_an_adapter_keeps_the_first(tmp_path, base, completion_rows, pair_rows):
    first = run(sft(base, tmp_path / "first", completion_rows, peft_config=LoraConfig(**LORA)))
    second = vrpo(str(tmp_path / "first"), tmp_path / "second", pair_rows, peft_config=LoraConfig(**LORA))
    start = logits(second.model)
    torch.testing.assert_close(start, logits(first.model), rtol=0, atol=1e-4)
    assert (start - logits(load_model(base))).abs().max() > 0.1
    run(second)
    entry = second.state.log_history[0]
    assert entry["rewards/margins"] == 0 and entry["logps/chosen"] == entry["elbo/ref_chosen"]
    assert (logits(second.model) - start).abs().max() > 1e-3
    assert_opens_everywhere(tmp_path / "second", second.model)
    # A third on top, and one whose start is the second's folder trained in full.
    third = run(vrpo(str(tmp_path / "second"), tmp_path / "third", pair_rows, peft_config=LoraConfig(**LORA)))
    assert_opens_everywhere(tmp_path / "third", third.model)
    full = run(vrpo(str(tmp_path / "second"), tmp_path / "full", pair_rows, max_steps=1))
    assert torch.equal(logits(load_policy(str(tmp_path / "full"))), logits(full.model))


def test_train__the_second_adapter_stays_when_the_first_goes(tmp_path, base, completion_rows, pair_rows):
    run(sft(base, tmp_path / "first", completion_rows, peft_config=LoraConfig(**LORA)))
    second = run(
        vrpo(str(tmp_path / "first"), tmp_path / "second", pair_rows, peft_config=LoraConfig(**LORA))
    )
    for folder in ("first", "base"):
        (tmp_path / folder).rename(tmp_path / f"{folder} moved")
    (tmp_path / "second").rename(tmp_path / "second moved")
    moved = load_policy(str(tmp_path / "second moved"))
    torch.testing.assert_close(logits(moved), logits(second.model), rtol=0, atol=1e-4)


def test_train__adapter_on_a_new_model_keeps_it(tmp_path, tiny_model, tokenizer, completion_rows):
    trainer = run(sft(tiny_model, tmp_path, completion_rows, tokenizer, peft_config=LoraConfig(**LORA)))
    assert (tmp_path / "base_model" / "config.json").is_file()
    assert_opens_everywhere(tmp_path, trainer.model)


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["embed_tokens", "lm_head"]}])
def test_train__adapter_after_new_tokens_opens(tmp_path, base, completion_rows, options):
    model, tokenizer = load_model(base), load_tokenizer(base)
    tokenizer.add_tokens(["<new>", "<newer>"])
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    config = LoraConfig(**LORA | options)
    trainer = run(sft(model, tmp_path / "out", completion_rows, tokenizer, peft_config=config))
    assert_opens_everywhere(tmp_path / "out", trainer.model)
    assert len(load_tokenizer(str(tmp_path / "out"))) == len(tokenizer)


def test_save_model__without_training_keeps_the_base(tmp_path, tiny_model, tokenizer, completion_rows):
    trainer = sft(tiny_model, tmp_path, completion_rows, tokenizer, peft_config=LoraConfig(**LORA))
    trainer.save_model()
    assert_opens_everywhere(tmp_path, trainer.model)


@pytest.mark.parametrize(
    ("options", "merged_base"),
    [({}, True), ({"modules_to_save": ["lm_head"]}, False), ({"use_dora": True}, False)],
)
def test_train__resumed_with_an_adapter_is_the_straight_run_bitwise(
    tmp_path, base, completion_rows, pair_rows, options, merged_base
):
    if merged_base:
        run(sft(base, tmp_path / "first", completion_rows, peft_config=LoraConfig(**LORA)))
        base = str(tmp_path / "first")

    def trainer(name, **fields):
        # Another global state each time: nothing may hang on it.
        torch.manual_seed(len(name))
        config = LoraConfig(**LORA | options)
        return vrpo(
            base, tmp_path / name, pair_rows, peft_config=config, save_strategy="steps", save_steps=1,
            lr_scheduler_type="constant", **fields,
        )  # fmt: skip

    straight = trainer("straight", max_steps=3)
    straight.train()
    trainer("stopped", max_steps=2).train()
    resumed = trainer("stopped", max_steps=3)
    resumed.train(resume_from_checkpoint=str(tmp_path / "stopped" / "checkpoint-2"))
    a, b = (
        load_file(tmp_path / name / "checkpoint-3" / "adapter_model.safetensors")
        for name in ("straight", "stopped")
    )
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert all(name.startswith("base_model.model.model.transformer.") for name in a)
    assert_opens_everywhere(tmp_path / "stopped" / "checkpoint-3", resumed.model)


def test_train__load_best_model_at_end_reads_the_adapter_back(tmp_path, base, pair_rows):
    trainer = VRPOTrainer(
        base,
        args=VRPOConfig(
            num_samples=2,
            **settings(
                tmp_path / "out", save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1,
                load_best_model_at_end=True, metric_for_best_model="eval_loss", greater_is_better=True,
            ),
        ),
        train_dataset=pair_rows,
        eval_dataset=pair_rows,
        peft_config=LoraConfig(**LORA),
    )  # fmt: skip
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best is not None
    assert torch.equal(logits(load_adapter(load_model(base), best)), logits(trainer.model))


def test_resume__from_a_checkpoint_without_the_adapter_is_refused(tmp_path, base, pair_rows):
    vrpo(base, tmp_path / "full", pair_rows, save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = vrpo(base, tmp_path / "lora", pair_rows, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match=r"checkpoint-1 has .*no adapter_model.safetensors"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "full" / "checkpoint-1"))


def test_resume__with_an_adapter_of_other_layers_is_refused(tmp_path, base, pair_rows):
    save = dict(save_strategy="steps", save_steps=1)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    vrpo(base, tmp_path / "out", pair_rows, peft_config=config, max_steps=1, **save).train()
    trainer = vrpo(base, tmp_path / "out", pair_rows, peft_config=LoraConfig(**LORA), **save)
    with pytest.raises(ValueError, match=r"of another run: the adapter \(target_modules"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))


def test_init__equal_seeds_draw_equal_adapters(tmp_path, base, pair_rows):
    def adapter(noise, seed):
        torch.manual_seed(noise)
        model = vrpo(base, tmp_path, pair_rows, peft_config=LoraConfig(**LORA), seed=seed).model
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if "lora_" in n])

    assert torch.equal(adapter(1, seed=7), adapter(2, seed=7))
    assert not torch.equal(adapter(1, seed=7), adapter(1, seed=8))


# The reference.

KINDS = {
    "ia3": IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "loha": LoHaConfig(r=2, target_modules=["q_proj", "up_proj"]),
    "lora": LoraConfig(r=2, target_modules=["q_proj"]),
    "head": LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[40, 41]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_init__a_trained_adapter_needs_a_reference(tmp_path, base, completion_rows, pair_rows, kind):
    run(sft(base, tmp_path / "first", completion_rows, peft_config=KINDS[kind]))
    trained = load_adapter(load_model(base), tmp_path / "first", is_trainable=True)
    with pytest.raises(ValueError, match="starts from a trained adapter"):
        vrpo(trained, tmp_path / "second", pair_rows, load_tokenizer(base))
    reference = load_policy(str(tmp_path / "first"))
    trainer = run(vrpo(trained, tmp_path / "second", pair_rows, load_tokenizer(base), ref_model=reference))
    assert trainer.state.log_history[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert_opens_everywhere(tmp_path / "second", trainer.model)


def test_init__a_new_adapter_beside_a_trained_one(tmp_path, base, pair_rows):
    model = get_peft_model(load_model(base), LoraConfig(r=2, target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(parameter)
    model.add_adapter("second", LoraConfig(r=2, target_modules=["q_proj"]))
    model.set_adapter("second")  # it alone is active, and it is new
    trainer = vrpo(model, tmp_path / "out", pair_rows, load_tokenizer(base))
    run(trainer)
    assert trainer.state.log_history[0]["rewards/margins"] == 0
    with pytest.raises(ValueError, match="starts from a trained adapter"):
        model.set_adapter("default")
        vrpo(model, tmp_path / "out", pair_rows, load_tokenizer(base))


def test_init__a_changed_base_is_kept(tmp_path, base, pair_rows):
    model = load_model(base)
    model.model.layers[0].mlp.up_proj.weight.data *= 1.5  # says where it comes from, and is something else
    trainer = run(
        vrpo(model, tmp_path / "out", pair_rows, load_tokenizer(base), peft_config=LoraConfig(**LORA))
    )
    assert_opens_everywhere(tmp_path / "out", trainer.model)


def test_train__a_frozen_adapter_is_refused(tmp_path, base, completion_rows, pair_rows):
    run(sft(base, tmp_path / "first", completion_rows, peft_config=LoraConfig(**LORA)))
    frozen = load_adapter(load_model(base), tmp_path / "first")
    trainer = sft(frozen, tmp_path / "second", completion_rows, load_tokenizer(base))
    with pytest.raises(ValueError, match="is_trainable=True"):
        trainer.train()


def test_init__a_merged_adapter_is_refused(tmp_path, base, completion_rows):
    model = get_peft_model(load_model(base), LoraConfig(**LORA))
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        sft(model, tmp_path, completion_rows, load_tokenizer(base))


def test_train__another_base_under_old_adapters_is_refused(tmp_path, tiny_model, tokenizer, pair_rows):
    run(vrpo(tiny_model, tmp_path, pair_rows, tokenizer, peft_config=LoraConfig(**LORA)))
    other = load_policy(str(tmp_path))  # merged: not the base that lies there
    trainer = vrpo(other, tmp_path, pair_rows, tokenizer, peft_config=LoraConfig(**LORA))
    with pytest.raises(ValueError, match="choose another output_dir"):
        trainer.train()
