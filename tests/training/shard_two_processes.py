"""One process of test_fsdp.py: a tiny LLaDA sharded with FSDP2, and the same model whole, on the same packs.

Run by `python -m torch.distributed.run --nproc_per_node 2 shard_two_processes.py OUT`; rank 0 saves what
both gave.
"""

import gc
import sys

import torch
import torch.distributed as dist
from packs import MASK_ID, VOCAB, pack, random_segments, tiny_model
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from vrpo_kernels import linear_cross_entropy

CASES = {
    "fp32": {},
    "bf16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)},
    "gradient_checkpointing": {},
    "frozen_head": {},
}


def inputs(rank: int) -> dict:
    """A pack whose sizes differ between the ranks, with its masked rows and their targets."""
    segments = random_segments([5 + 3 * rank, 1, 9], seed=rank)
    targets = torch.cat(segments)
    rows = torch.arange(rank, len(targets), 2 + rank)
    arguments = pack(segments)
    arguments["input_ids"][0, rows] = MASK_ID
    return {**arguments, "rows": rows, "targets": targets[rows]}


def upstream(num_rows: int) -> torch.Tensor:
    """Signed gradients of the rows, as they come out of a log-sigmoid of sums."""
    return torch.linspace(-1.0, 2.0, num_rows)


def build(case: str) -> torch.nn.Module:
    model = tiny_model(dtype=torch.float32).train()
    if case == "gradient_checkpointing":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case == "frozen_head":
        model.lm_head.weight.requires_grad_(False)
    return model


def sharded(case: str) -> dict:
    model = build(case)
    for layer in model.model.layers:
        fully_shard(layer, **CASES[case])
    fully_shard(model, **CASES[case])
    held = {name: p.to_local().numel() / p.numel() for name, p in model.named_parameters()}
    arguments = inputs(dist.get_rank())
    nll = model(**arguments).nll
    nll.backward(upstream(len(nll)))
    nlls = [None] * dist.get_world_size()
    dist.all_gather_object(nlls, nll.detach())
    gradients = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    return {"nll": nlls, "gradients": gradients, "held": held}


def whole(case: str) -> dict:
    """The same in one process: NLLs of each rank's pack and the mean of the two gradients."""
    model = build(case)
    if case == "bf16":
        model.bfloat16()
    nlls = []
    total = {}
    for rank in range(2):
        arguments = inputs(rank)
        nll = model(**arguments).nll
        nll.backward(upstream(len(nll)))
        nlls.append(nll.detach())
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0.0) + p.grad.float() / 2
                p.grad = None
    return {"nll": nlls, "gradients": total}


def head_as_dtensor() -> dict:
    """What linear_cross_entropy says to a sharded weight; what it gives for the gathered and a plain one."""
    model = build("fp32")
    plain = model.lm_head.weight.detach().clone().requires_grad_()
    fully_shard(model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(7, plain.shape[1], generator=generator)
    targets = torch.randint(VOCAB, (7,), generator=generator)
    try:
        linear_cross_entropy(hidden, model.lm_head.weight, targets)
        message = ""
    except ValueError as error:
        message = str(error)
    results = []
    for weight in (model.lm_head.weight.full_tensor(), plain):
        nll = linear_cross_entropy(hidden, weight, targets)
        nll.backward(upstream(7))
        results.append(nll.detach())
    gradients = [model.lm_head.weight.grad.full_tensor(), plain.grad]
    return {"message": message, "nll": results, "gradients": gradients}


def main(output_dir: str) -> None:
    dist.init_process_group("gloo")
    found = {case: {"sharded": sharded(case), "whole": whole(case)} for case in CASES}
    found["head"] = head_as_dtensor()
    if dist.get_rank() == 0:
        torch.save(found, f"{output_dir}/sharded.pt")
    # A rank that left at once, its models still holding the group, was seen to abort at exit.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
