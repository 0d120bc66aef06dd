"""Micro benchmarks of what a layer of the model needs beside its products: attention in segments, norms."""

import functools

import torch
from torch import Tensor

import vrpo_kernels
from benchmarks.micro.micro import Micro, Prepared, Sizes, Where
from vrpo_kernels import testing


def _held(found: tuple[Tensor, ...], truth: tuple[Tensor, ...], baseline: tuple[Tensor, ...]) -> None:
    """Fails where an output is off by more than the policy allows, beside the formula in its dtype."""
    ratios = {}
    for index, parts in enumerate(zip(found, truth, baseline, strict=True)):
        rows = [part.reshape(-1, part.shape[-1]) for part in parts]
        is_float32 = rows[0].dtype is torch.float32
        policy = testing.fp32_error_ratio if is_float32 else testing.matrix_error_ratio
        ratios[f"output {index}"] = policy(*rows)
    testing.assert_ratios(ratios)


def _prepare_attention(where: Where, backward: bool) -> Prepared:
    sizes = where.sizes
    segments = max(1, sizes.segments // 8)
    shape = (segments * sizes.length, sizes.heads, sizes.head_size)
    inputs = [where.normal(*shape, seed=seed) for seed in range(3)]
    upstream = where.normal(*shape, seed=3)
    cu_seqlens = sizes.length * torch.arange(segments + 1, dtype=torch.int32, device=where.device)

    def run(dtype: torch.dtype = where.dtype, backend: str = "auto") -> tuple[Tensor, ...]:
        leaves = [part.to(dtype).requires_grad_(backward) for part in inputs]
        scale = sizes.head_size**-0.5
        out = vrpo_kernels.segment_attention(*leaves, cu_seqlens, scale=scale, backend=backend)
        return (out, *(torch.autograd.grad(out, leaves, upstream.to(dtype)) if backward else ()))

    return Prepared(run, lambda: _held(run(), run(torch.float64, "reference"), run(backend="reference")))


def _prepare_norm(where: Where, backward: bool) -> Prepared:
    sizes = where.sizes
    hidden, weight = where.normal(4 * sizes.rows, sizes.hidden), 1 + where.normal(sizes.hidden, scale=0.1)
    upstream = where.normal(4 * sizes.rows, sizes.hidden, seed=1)

    def run(dtype: torch.dtype = where.dtype, backend: str = "auto") -> tuple[Tensor, ...]:
        leaves = [part.to(dtype).requires_grad_(backward) for part in (hidden, weight)]
        out = vrpo_kernels.rms_norm(*leaves, eps=1e-5, backend=backend)
        return (out, *(torch.autograd.grad(out, leaves, upstream.to(dtype)) if backward else ()))

    return Prepared(run, lambda: _held(run(), run(torch.float64, "reference"), run(backend="reference")))


def _attention_shape(sizes: Sizes) -> str:
    return f"{max(1, sizes.segments // 8)} x {sizes.length} tokens, {sizes.heads} heads of {sizes.head_size}"


def _norm_shape(sizes: Sizes) -> str:
    return f"{4 * sizes.rows} rows, D={sizes.hidden}"


MICROS = [
    Micro(op, mode, shape, functools.partial(prepare, backward=backward))
    for op, shape, prepare in (
        ("segment_attention", _attention_shape, _prepare_attention),
        ("rms_norm", _norm_shape, _prepare_norm),
    )
    for mode, backward in (("forward", False), ("forward and backward", True))
]
