"""QLoRA: adapters on a base in 4 or 8 bits (bitsandbytes), where the package is installed."""

import copy

import pytest
import torch
from trainers import LORA, config, logged

from vrpo import VRPOTrainer
from vrpo.models import create_model, load_model
from vrpo.models.adapters import load_adapter

pytest.importorskip("bitsandbytes")


def quantized(folder, **bits):
    from peft import prepare_model_for_kbit_training
    from transformers import BitsAndBytesConfig

    from vrpo.models import LLaDAForMaskedDiffusion

    model = LLaDAForMaskedDiffusion.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**bits), attn_implementation="vrpo"
    )
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


@pytest.mark.parametrize(
    "bits",
    [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}],
    ids=["nf4", "int8"],
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_train__an_adapter_on_a_quantized_base(tmp_path, tokenizer, pair_rows, bits):
    base = create_model(tokenizer, d_model=64, n_layers=2, n_heads=2, init_std=0.2, seed=0)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    trainer = VRPOTrainer(
        quantized(tmp_path / "base", **bits),
        args=config(tmp_path, max_steps=3),
        train_dataset=pair_rows,
        processing_class=tokenizer,
        peft_config=copy.deepcopy(LORA),
    )
    trainer.train()
    assert logged(trainer, "rewards/margins")[0] == 0.0  # the reference is the same base, adapter off
    assert min(logged(trainer, "grad_norm")) > 0
    assert logged(trainer, "rewards/margins")[-1] != 0.0
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = load_adapter(load_model(str(tmp_path / "base")), str(tmp_path / "adapter"))
    trained = dict(trainer.model.named_parameters())
    kept = {name: p for name, p in loaded.named_parameters() if "lora_" in name}
    assert kept and all(torch.equal(p, trained[name]) for name, p in kept.items())
