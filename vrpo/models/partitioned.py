"""Weights of which a process holds a part, as DeepSpeed ZeRO-3 partitions and FSDP2 shards them.

Under ZeRO-3 a parameter between two passes is an empty tensor, to every function that does not know: its
weights look finite, equal to any other's, and hash to the same. Here they are read as what they are.
DeepSpeed need not be installed: without it nothing is partitioned.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor


def is_partitioned(tensor: Tensor) -> bool:
    """Whether DeepSpeed ZeRO-3 keeps the parameter in parts, gathered at the moment or not."""
    return getattr(tensor, "ds_tensor", None) is not None


def any_partitioned(tensors: Iterable[Tensor]) -> bool:
    return any(is_partitioned(tensor) for tensor in tensors)


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor: of one that is whole, all of it. Detached, no copy."""
    if isinstance(tensor, DTensor):
        return tensor.to_local().detach()
    if not is_partitioned(tensor):
        return tensor.detach()
    part = tensor.ds_tensor.detach()
    # The last parts are filled up with whatever the memory held.
    rank = dist.get_rank(tensor.ds_process_group)
    return part[: max(0, min(part.numel(), tensor.ds_numel - rank * part.numel()))]


def whole(tensor: Tensor) -> Tensor:
    """All of a parameter that ZeRO-3 may keep in parts, detached; of another, itself.

    For a partitioned one a copy, and a collective: all processes call it, in the same order.
    """
    if not is_partitioned(tensor):
        return tensor.detach()
    import deepspeed

    with deepspeed.zero.GatheredParameters([tensor]):
        return tensor.detach().clone()


def whole_shape(tensor: Tensor) -> tuple[int, ...]:
    """The shape of a parameter, that of the whole where it is partitioned."""
    return tuple(tensor.ds_shape if is_partitioned(tensor) else tensor.shape)


def in_any_process(found: Iterable[str]) -> Iterator[str]:
    """What any process found, each once, in the order of the processes; a collective."""
    everywhere: list[list[str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, list(found))
    yield from dict.fromkeys(name for names in everywhere for name in names or ())


def same_everywhere(is_true: bool, device: torch.device) -> bool:
    """Whether it is true in all processes; a collective."""
    flag = torch.tensor(int(is_true), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())
