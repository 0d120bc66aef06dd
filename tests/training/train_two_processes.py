"""One process of test_distributed.py: trains a tiny fp64 model for each kind of reference, and saves the end.

Run by `python -m torch.distributed.run --nproc_per_node N train_two_processes.py OUT BATCH_SIZE`.
"""

import sys

import torch
from datasets import Dataset
from peft import LoraConfig

from vrpo import (
    DiffusionKTOConfig,
    DiffusionKTOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    VRPOConfig,
    VRPOTrainer,
)
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model


def train(output_dir: str, batch_size: int, reference: str) -> dict:
    """reference: "frozen" or "adapter" of VRPO, "sft" for fine-tuning with EOS fill, or "kto"."""
    rows = [
        # Lengths differ, so that the token budget cuts the ranks' batches into different numbers of packs.
        {"prompt": f"What is {n}?", "chosen": "one " * (1 + n % 7), "rejected": f"two {n}"}
        for n in range(12)
    ]
    tokenizer = train_tokenizer([text for row in rows for text in row.values()], vocab_size=300)
    model = create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.2, seed=3).double()
    peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if reference == "adapter" else None
    kinds = {
        "sft": (DiffusionSFTTrainer, DiffusionSFTConfig),
        "kto": (DiffusionKTOTrainer, DiffusionKTOConfig),
    }
    kind, config = kinds.get(reference, (VRPOTrainer, VRPOConfig))
    if reference == "sft":
        rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    trainer = kind(
        model,
        args=config(
            output_dir=output_dir,
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size + 1,  # of an evaluation, no metric depends on it
            gradient_accumulation_steps=1,
            num_train_epochs=2,
            num_samples=2,
            max_tokens_per_pack=110,
            learning_rate=1e-2,
            warmup_steps=0,
            max_grad_norm=0.05,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.evaluate()  # before training: what it prepares must not keep training from wrapping the model
    trainer.train()
    trainer.evaluate()
    weights = {name: p.detach() for name, p in trainer.model.named_parameters()}
    return {"weights": weights, "log": trainer.state.log_history}


def main(output_dir: str, batch_size: str) -> None:
    ends = {name: train(output_dir, int(batch_size), name) for name in ("frozen", "adapter", "sft", "kto")}
    if torch.distributed.get_rank() == 0:
        torch.save(ends, f"{output_dir}/end.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
