"""One process of test_precomputed_processes.py: trains a tiny fp64 model with precomputed references.

Run by `python -m torch.distributed.run --nproc_per_node N precompute_two_processes.py OUT BATCH_SIZE`.
"""

import sys

import torch
import torch.distributed as dist
from datasets import Dataset
from peft import LoraConfig
from torch.distributed.tensor import DTensor
from train_sharded import ROWS, ShardedTrainer, full

from vrpo import VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model
from vrpo.training import reference_cache
from vrpo.training.sync_reference import _sharded

reference_cache.PART_EXAMPLES = (
    3  # eight rows: parts of unequal numbers of passes, and an odd number of parts
)


def build(kind: type[VRPOTrainer], output_dir: str, batch_size: int, adapter: bool, **fields) -> VRPOTrainer:
    tokenizer = train_tokenizer([text for row in ROWS for text in row.values()], vocab_size=300)
    model = create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.2, seed=3).double()
    return kind(
        model,
        args=VRPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=1,
            num_train_epochs=1.5,  # of the second, only half of the rows are computed
            num_samples=2,
            max_tokens_per_pack=110,
            learning_rate=1e-2,
            warmup_steps=0,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            **fields,
        ),
        train_dataset=Dataset.from_list(ROWS),
        eval_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=2, target_modules=["q_proj"]) if adapter else None,
    )


def train(*args, **fields) -> dict:
    trainer = build(*args, **fields)
    trainer.train()
    metrics = trainer.evaluate()
    weights = {name: full(p.detach()).clone() for name, p in trainer.model.named_parameters()}
    return {"weights": weights, "log": trainer.state.log_history, "eval_loss": metrics["eval_loss"]}


def follow(kind: type[VRPOTrainer], output_dir: str, batch_size: int) -> dict:
    """A reference that follows the policy: its end, and what comes back of a save."""
    place = f"{output_dir}/follows-{kind.__name__}"
    sync = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}
    trainer = build(kind, place, batch_size, adapter=False, **sync)
    trainer.train()
    trainer.evaluate()  # leaves parts of a sharded model gathered
    trainer._sync.save(place, is_writer=trainer.is_world_process_zero())
    trainer.accelerator.wait_for_everyone()
    found = {}
    for moment in ("end", "loaded"):
        weights = dict(_sharded(trainer.ref_model))
        found[moment] = {name: full(weight.detach()).clone() for name, weight in weights.items()}
        for parameter in weights.values():
            torch.nn.init.zeros_(parameter.to_local() if isinstance(parameter, DTensor) else parameter)
        trainer._sync.load(place)
    return found


def main(output_dir: str, batch_size: str) -> None:
    """One process trains with and without the cache, two with it, by DDP and by FSDP2."""
    ends = {}
    is_alone = not dist.is_initialized() and batch_size == "4"
    for adapter in (False, True):
        for name in ("plain", "known") if is_alone else ("known", "sharded"):
            kind = ShardedTrainer if name == "sharded" else VRPOTrainer
            known = {"precompute_ref_log_probs": name != "plain"}
            place = f"{'adapter' if adapter else 'full'}-{name}"
            ends[place] = train(kind, f"{output_dir}/{place}", int(batch_size), adapter, **known)
    for kind in (VRPOTrainer,) if is_alone else (VRPOTrainer, ShardedTrainer):
        ends[f"follows-{kind.__name__}"] = follow(kind, output_dir, int(batch_size))
    if is_alone or dist.get_rank() == 0:
        torch.save(ends, f"{output_dir}/end.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
