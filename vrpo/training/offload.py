"""activation_offloading: what backward needs of the activations waits in the memory of the host.

Autograd hands over each tensor that it saves, and asks for it again (saved_tensors_hooks of torch).
The copies go the way the computation goes, on its stream, so that nothing has to wait for anything else; they
are exact. Best together with gradient checkpointing, which saves one tensor per layer.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

DEVICE = "cuda"
"""Type of the devices whose tensors are moved."""

LEAST_BYTES = 2**20
"""Smaller tensors stay: a copy takes longer than they are worth."""

Packed = Tensor | tuple[torch.device, Tensor]


def check_offloading(args: TrainingArguments) -> None:
    """ValueError where offloading would do nothing, or was never tried."""
    if not args.activation_offloading:
        return
    if args.device.type != DEVICE:
        raise ValueError(
            f"activation_offloading=True moves activations from a GPU to the host, and this run is on "
            f"{args.device.type}: leave it out"
        )
    if args.torch_compile:
        raise ValueError("activation_offloading=True is not supported with torch_compile: choose one")


class OffloadActivations:
    """A context for the forward passes of a model: `with offload(): loss = model(...)`.

    What has the shape of a weight is a weight, or its 16-bit copy of autocast, and stays. Activations of such
    a shape stay too, which costs memory and nothing else.
    """

    def __init__(self, model: nn.Module):
        shapes = {tuple(p.shape) for p in model.parameters()}
        self._kept = shapes | {shape[::-1] for shape in shapes}

    def __call__(self) -> contextlib.AbstractContextManager:
        return torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack)

    def _pack(self, tensor: Tensor) -> Packed:
        if (
            tensor.device.type != DEVICE
            or tensor.nbytes < LEAST_BYTES
            or tuple(tensor.shape) in self._kept
            or tensor.layout != torch.strided
        ):
            return tensor
        # Pinned memory is filled while the GPU goes on, and not used again before it has been.
        host = torch.empty_like(tensor, device="cpu", pin_memory=torch.cuda.is_available())
        host.copy_(tensor, non_blocking=True)
        return tensor.device, host


def _unpack(packed: Packed) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, host = packed
    return host.to(device, non_blocking=True)


def offloading_of(
    model: nn.Module, args: TrainingArguments
) -> Callable[[], contextlib.AbstractContextManager]:
    """The context of the forward passes that `args` asks for."""
    return OffloadActivations(model) if args.activation_offloading else contextlib.nullcontext
