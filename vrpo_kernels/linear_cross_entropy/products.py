"""Matrix products of the Triton backend, and how its work is cut into tiles."""

import contextlib
import functools

import torch
from torch import Tensor

LANES = 64  # kept tiles and workspaces are padded to whole 128-byte lines per row


@functools.cache
def device_facts(device: torch.device) -> tuple[tuple[int, int], int]:
    """(compute capability, number of SMs); the interpreter poses as a Hopper GPU with four."""
    if device.type != "cuda":
        return (9, 0), 4
    properties = torch.cuda.get_device_properties(device)
    return (properties.major, properties.minor), properties.multi_processor_count


def unit_rows(matrix: Tensor) -> Tensor:
    """The kernels step along rows with stride 1; any row stride will do."""
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def spans_of(total: int, size: int) -> list[tuple[int, int]]:
    """[(start, end), ...] of at most `size` each."""
    return [(start, min(start + size, total)) for start in range(0, total, size)]


def padded_width(size: int, limit: int) -> int:
    """Columns of a workspace: the tile, or what there is, in whole lines."""
    return (min(size, limit) + LANES - 1) // LANES * LANES


def product(a: Tensor, b: Tensor, out: Tensor, *, accumulate: bool) -> None:
    """out (fp32) = a @ b, or out += a @ b, summed in fp32. Output arguments keep autocast away."""
    if a.dtype is torch.float32:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda:
        if accumulate:
            torch.addmm(out, a, b, torch.float32, out=out)
        else:
            torch.mm(a, b, torch.float32, out=out)
    else:  # the interpreter's CPU tensors: PyTorch has no 16-bit CPU product with an fp32 result
        product(a.float(), b.float(), out, accumulate=accumulate)


@contextlib.contextmanager
def _full_precision_sums():
    """Inside, cuBLAS adds the partial sums of a 16-bit result in fp32, also where it splits K."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_bf16_reduced_precision_reduction", "allow_fp16_reduced_precision_reduction")
    before = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names]
    try:
        for name in names:
            setattr(matmul, name, False)  # (False, False), no split-K either, only cuBLASLt takes
        yield
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(matmul, name, value)


def rounded_product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b in the dtype of all three: one fp32 sum over K, one rounding."""
    if out.is_cuda:
        with _full_precision_sums():
            torch.mm(a, b, out=out)
    else:  # the interpreter's CPU tensors
        out.copy_(a.float() @ b.float())
