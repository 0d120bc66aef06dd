"""Calls into the C++ backend (`csrc/linear_cross_entropy.cpp`), and what its choices depend on.

`forward`, `dhidden`, `dweight`, `sweep` and `kept_shapes` are the contract every fused backend of this op
fulfils.
"""

import time

import torch
from torch import Tensor

from vrpo_kernels.backend import extension_loaded

TILE = 512  # vocabulary rows per tile; kTile in csrc must be the same
LANES = 16  # kept tiles are padded to whole vectors of rows
GEMMS = ("fp32", "onednn", "bf16")
"""Matrix multiplications of the C++ backend. "fp32" is torch.mm (MKL on x86) and "onednn" drives oneDNN's
micro-kernels on packed panels, both in fp32: 16-bit inputs are upcast tile by tile, which is exact. "bf16",
for bfloat16 inputs on x86 processors with AVX512_BF16, multiplies bf16 by bf16 into fp32: logits, sums and
nll are as exact as with the others, and probabilities are rounded to bf16 before they enter a gradient's
matmul. "fp32" obeys torch.set_float32_matmul_precision as torch.mm does: below "highest", nll may lose its
fp32 accuracy."""

_LOADED = extension_loaded()
_BF16_RUNS = _LOADED and torch.ops.vrpo.linear_cross_entropy_bf16_route_runs()
_DEFAULT_GEMM = {
    dtype: torch.ops.vrpo.linear_cross_entropy_default_gemm(dtype) if _LOADED else "fp32"
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
}  # asked once: torch.compile cannot trace ops that return strings


def gemms(dtype: torch.dtype) -> tuple[str, ...]:
    """The names of GEMMS that run for inputs of this dtype on this machine."""
    return GEMMS if dtype is torch.bfloat16 and _BF16_RUNS else GEMMS[:2]


def resolve_gemm(requested: str, dtype: torch.dtype, device: torch.device | None = None) -> str:
    """ "auto" -> the matrix multiplication for this machine; explicit names are checked.

    "auto" is "bf16" for bfloat16 inputs on processors with AMX and on AMD processors with AVX512_BF16, else
    "onednn" on AMD processors with AVX-512 and "fp32" elsewhere: a pure function of processor and dtype,
    never of a timing, so that every process and every resumed run on equal machines takes the same one (the
    choice changes the last bits). `probe_gemms` measures; a better choice is then set by hand.

    Errors:
        ValueError if the name is unknown, or cannot run with this dtype or on this processor.
    """
    if requested == "auto":
        return _DEFAULT_GEMM[dtype]
    if requested not in GEMMS:
        raise ValueError(f"gemm must be one of {('auto', *GEMMS)} on the cpu backend, got {requested!r}")
    if requested == "bf16" and dtype is not torch.bfloat16:
        raise ValueError(f"gemm 'bf16' needs bfloat16 inputs, got {dtype}")
    if requested not in gemms(dtype):
        raise ValueError(
            "gemm 'bf16' needs Linux on x86-64 with AVX512_BF16, a torch with bf16 micro-kernels, and "
            "ONEDNN_MAX_CPU_ISA not below that; "
            f"here gemm may be one of {('auto', *gemms(dtype))}"
        )
    return requested


def probe_gemms(dtype: torch.dtype, *, repeats: int = 3) -> dict[str, float]:
    """Seconds of one frozen-head forward pass per choice of `gemm`, best of `repeats`, on this machine.

    For people: print it, then pass the faster name as `gemm=` in every process of a run. Not called by ops.

    Args:
        dtype: float32, bfloat16 or float16. The problem is N=256, D=1024, V=8192.
    """
    hidden = torch.linspace(-1, 1, 256 * 1024).view(256, 1024).to(dtype)
    weight = torch.linspace(-1, 1, 8192 * 1024).view(8192, 1024).to(dtype)
    targets = torch.arange(256)
    seconds = {}
    plain = {"bias": None, "softcap": 0.0, "scale": 1.0, "keep_tiles": False, "want_metrics": False}
    for name in gemms(dtype):
        forward(hidden, weight, targets, gemm=name, want_dhidden=True, **plain)
        samples = []
        for _ in range(repeats):
            start = time.perf_counter()
            forward(hidden, weight, targets, gemm=name, want_dhidden=True, **plain)
            samples.append(time.perf_counter() - start)
        seconds[name] = min(samples)
    return seconds


def kept_shapes(num_rows: int, num_classes: int, gemm: str, input_dtype: torch.dtype):
    """((shape, dtype) of the kept tiles, (shape, dtype) of their shifts)."""
    padded = (num_rows + LANES - 1) // LANES * LANES
    dtype = torch.bfloat16 if gemm == "bf16" else torch.float32
    num_tiles = (num_classes + TILE - 1) // TILE
    return ((num_classes, padded), dtype), ((num_tiles, padded), torch.float32)


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    gemm: str,
    want_dhidden: bool,
    keep_tiles: bool,
    want_metrics: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(nll, statistics, expected, kept, kept_shift, metrics); see `op._forward`."""
    return torch.ops.vrpo.linear_cross_entropy_forward(
        hidden, weight, targets, bias, softcap, scale, gemm, want_dhidden, keep_tiles, want_metrics
    )


def target_logits(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """(N,) fp32 logit of each row's target before the soft-cap, the same bits as in `forward`."""
    return torch.ops.vrpo.linear_cross_entropy_target_logits(hidden, weight, targets, bias, scale)


def dhidden(
    dnll: Tensor,
    expected: Tensor,
    statistics: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    scale: float,
) -> Tensor:
    """(N, D) gradient of hidden from what the forward pass left; see `op._dhidden`."""
    return torch.ops.vrpo.linear_cross_entropy_dhidden(
        dnll, expected, statistics, weight, targets, softcap, scale
    )


def dweight(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    kept: Tensor,
    kept_shift: Tensor,
    *,
    softcap: float,
    scale: float,
    gemm: str,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor]:
    """((V, D) gradient of weight, (V,) gradient of bias) from kept tiles; see `op._dweight`."""
    return torch.ops.vrpo.linear_cross_entropy_dweight(
        dnll, hidden, weight, targets, statistics, kept, kept_shift, softcap, scale, gemm, want_dweight,
        want_dbias,
    )  # fmt: skip


def sweep(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    *,
    bias: Tensor | None,
    softcap: float,
    scale: float,
    gemm: str,
    want_dhidden: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """All gradients in one sweep over the vocabulary, from known statistics; see `op._sweep`."""
    return torch.ops.vrpo.linear_cross_entropy_sweep(
        dnll, hidden, weight, targets, statistics, bias, softcap, scale, gemm, want_dhidden, want_dweight,
        want_dbias,
    )  # fmt: skip
