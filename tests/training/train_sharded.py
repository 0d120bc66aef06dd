"""One process of test_fsdp.py: trains a tiny fp64 model with FSDP2 and with DDP and saves both ends.

Run by `python -m torch.distributed.run --nproc_per_node 2 train_sharded.py OUT`; the models are saved, too.
"""

import sys

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor

from vrpo import VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model

ROWS = [
    # Lengths differ, so that the token budget cuts the ranks' batches into different numbers of packs.
    {"prompt": f"What is {n}?", "chosen": "one " * (1 + n % 7), "rejected": f"two {n}"}
    for n in range(8)
]


class ShardedTrainer(VRPOTrainer):
    """VRPOTrainer as fsdp=True makes it on accelerators; accelerate ignores that setting on the CPU."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        # Every AcceleratorState() starts from the PartialState, so both must know.
        for state in (PartialState(), self.accelerator.state):
            state.distributed_type = DistributedType.FSDP
        self.accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="FULL_STATE_DICT"
        )
        if self.args.bf16:
            self.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
        self.is_fsdp_enabled = True


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train(trainer_class: type[VRPOTrainer], output_dir: str, reference: str, bf16: bool = False) -> dict:
    tokenizer = train_tokenizer([text for row in ROWS for text in row.values()], vocab_size=300)
    model = create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.2, seed=3)
    model = model if bf16 else model.double()
    peft_config = LoraConfig(r=2, target_modules=["q_proj"]) if reference == "adapter" else None
    trainer = trainer_class(
        model,
        args=VRPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=1,
            num_train_epochs=2,
            eval_strategy="epoch",  # between steps: what an evaluation leaves gathered must not go stale
            num_samples=2,
            max_tokens_per_pack=110,
            learning_rate=1e-2,
            warmup_steps=0,
            max_grad_norm=0.05,
            logging_steps=1,
            bf16=bf16,
            save_strategy="no",
            report_to="none",
            training_report=False,
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=peft_config,
    )
    trainer.train()
    whole_weights = {
        f"{name} {weight}"
        for name, model in (("policy", trainer.model), ("reference", trainer.ref_model))
        if model is not None
        for weight, p in model.named_parameters()
        if not isinstance(p, DTensor)
    }
    trainer.evaluate()
    trainer.save_model(f"{output_dir}/{'bf16' if bf16 else reference}-{trainer_class.__name__}")
    weights = {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    return {"weights": weights, "log": trainer.state.log_history, "whole_weights": whole_weights}


def main(output_dir: str) -> None:
    ends = {
        reference: {
            "whole": train(VRPOTrainer, output_dir, reference),
            "sharded": train(ShardedTrainer, output_dir, reference),
        }
        for reference in ("frozen", "adapter")
    }
    ends["bf16"] = {
        "whole": train(VRPOTrainer, output_dir, "frozen", bf16=True)["log"],
        "sharded": train(ShardedTrainer, output_dir, "frozen", bf16=True)["log"],
    }
    if dist.get_rank() == 0:
        torch.save(ends, f"{output_dir}/trained.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
