"""One of two processes of test_faults.py; in FAULT "kill" or "term" the second is stopped, in "none" no one.

Run by `python -m torch.distributed.run --nproc_per_node 2 fault_two_processes.py OUT FAULT`.
"""

import os
import signal
import sys

import torch
from datasets import Dataset
from fault_kinds import curve
from transformers import TrainerCallback

from vrpo import VRPOConfig, VRPOTrainer
from vrpo.commands.new_model import train_tokenizer
from vrpo.models import create_model

ROWS = [{"prompt": f"{n}?", "chosen": "one " * (1 + n % 7), "rejected": f"two {n}"} for n in range(8)]


class TermAtStep(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)


def main(output_dir: str, fault: str) -> None:
    tokenizer = train_tokenizer([text for row in ROWS for text in row.values()], vocab_size=300)
    trainer = VRPOTrainer(
        create_model(tokenizer, d_model=16, n_layers=1, n_heads=2, init_std=0.2, seed=3),
        args=VRPOConfig(
            output_dir=output_dir,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            max_steps=6,
            save_steps=2,
            logging_steps=5,
            num_samples=2,
            learning_rate=1e-2,
            warmup_steps=0,
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list(ROWS),
        processing_class=tokenizer,
    )
    save = torch.save
    is_second = trainer.args.process_index == 1
    if is_second and fault == "term":
        trainer.add_callback(TermAtStep())

    def save_or_die(*args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return save(*args, **kwargs)

    if is_second and fault == "kill":
        torch.save = save_or_die
    trainer.train(resume_from_checkpoint="auto")
    if not is_second:
        save({"weights": trainer.model.state_dict(), "log": curve(trainer)}, f"{output_dir}/end.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
