"""A reference that follows the policy (TR-DPO, arXiv 2404.09656), its state saved with every checkpoint."""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import TrainerCallback

from vrpo.training.trainer import DiffusionTrainer

REFERENCE_FILE = "reference_model.safetensors"


class SyncReference(TrainerCallback):
    """Every ref_model_sync_steps optimizer steps: reference = alpha * policy + (1 - alpha) * reference."""

    def __init__(self, trainer: DiffusionTrainer, reference: nn.Module):
        _check_possible(trainer, reference)
        self.accelerator, self.reference = trainer.accelerator, reference

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            policy = self.accelerator.unwrap_model(model)
            mix(policy, self.accelerator.unwrap_model(self.reference), args.ref_model_mixup_alpha)

    def save(self, folder: str, *, is_writer: bool) -> None:
        """The reference's weights, whole; called in every process, written by one."""
        weights = {}
        for name, parameter in _sharded(self.accelerator.unwrap_model(self.reference)):
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            if is_writer:
                weights[name] = whole.detach().cpu().contiguous().clone()  # tied or shared: once each
        if is_writer:
            save_file(weights, Path(folder, REFERENCE_FILE), metadata={"format": "pt"})

    def load(self, folder: str) -> None:
        """Errors: ValueError where the checkpoint has none, or that of another model."""
        path = Path(folder, REFERENCE_FILE)
        if not path.is_file():
            raise ValueError(
                f"{folder} has no {REFERENCE_FILE}: it is of a run without sync_ref_model; "
                "resume without it, or start anew in another output_dir"
            )
        saved = load_file(path)
        parameters = dict(_sharded(self.accelerator.unwrap_model(self.reference)))
        if {name: tuple(p.shape) for name, p in parameters.items()} != {
            n: tuple(w.shape) for n, w in saved.items()
        }:
            raise ValueError(f"{path} is not of this reference: other weights or other shapes")
        with torch.no_grad():
            for name, parameter in parameters.items():
                whole = saved[name].to(parameter.device)
                if isinstance(parameter, DTensor):
                    part = distribute_tensor(whole, parameter.device_mesh, parameter.placements)
                    parameter.to_local().copy_(part.to_local())
                else:
                    parameter.copy_(whole)


@torch.no_grad()
def mix(policy: nn.Module, reference: nn.Module, alpha: float) -> None:
    """reference <- alpha * policy + (1 - alpha) * reference, weight by weight, in place, in its dtype.

    Sharded models: both are sharded alike, so each process mixes what it holds. Weights that the two share
    (frozen ones) are left alone.
    """
    for (_, target), (_, source) in zip(_sharded(reference), _sharded(policy), strict=True):
        target, source = _local(target), _local(source)
        if target.data_ptr() != source.data_ptr():
            target.mul_(1.0 - alpha).add_(source, alpha=alpha)


def _sharded(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters, those of FSDP2 as shards: a forward pass may leave some gathered, in a copy."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    yield from model.named_parameters()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.data


def _check_possible(trainer: DiffusionTrainer, reference: nn.Module | None) -> None:
    if reference is None:
        raise ValueError(
            "sync_ref_model needs a second model that can follow; here the reference is the model with its "
            "adapter switched off: train all weights, or leave sync_ref_model unset"
        )
    if trainer.is_deepspeed_enabled:
        raise ValueError(
            "sync_ref_model is not supported under DeepSpeed, whose engine keeps weights in its own form: "
            "use DDP or FSDP2"
        )
    shapes = [
        {name: tuple(p.shape) for name, p in trainer.accelerator.unwrap_model(model).named_parameters()}
        for model in (trainer.model, reference)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "sync_ref_model mixes the policy into the reference weight by weight, and ref_model has other "
            "weights or shapes than the policy"
        )
