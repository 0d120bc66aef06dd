"""Which passes and how many matmuls one call of `linear_cross_entropy` takes: a pure decision."""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from vrpo_kernels import backend as backends
from vrpo_kernels import checks
from vrpo_kernels.linear_cross_entropy import cpu

KEPT_TILE_BYTES = 2**30
"""Default budget for the tiles a trained head keeps between forward and backward: 1 GiB."""


@dataclass(frozen=True)
class Plan:
    """What one call of `linear_cross_entropy` does. 1 unit = one matmul of 2 * N * D * V floating-point
    operations.

    Attributes:
        backend: "triton", "cpu" or "reference".
        gemm: the matrix multiplication the backend uses (`cpu.GEMMS`); "" for reference.
        want_dhidden: True if forward also forms the hidden gradient, unscaled by the upstream gradient.
        keep_tiles: True if forward keeps its tiles for the head's gradient.
        kept_bytes: bytes of those tiles, 0 if none are kept.
        forward_units, backward_units: matmul units of the two passes.
    """

    backend: str
    gemm: str
    want_dhidden: bool
    keep_tiles: bool
    kept_bytes: int
    forward_units: int
    backward_units: int


def backend_module(backend: str) -> ModuleType:
    """The module of a fused backend; Triton is imported when it is first chosen, and only then."""
    if backend == "cpu":
        return cpu
    from vrpo_kernels.linear_cross_entropy import kernel

    return kernel


def _bytes(shapes) -> int:
    return sum(shape[0] * shape[1] * dtype.itemsize for shape, dtype in shapes)


def plan_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    backend: str = "auto",
    gemm: str = "auto",
    kept_tile_bytes: int = KEPT_TILE_BYTES,
) -> Plan:
    """What `linear_cross_entropy` will do with these arguments, under the current grad mode.

    | gradients wanted        | kept tiles        | forward + backward, in units |
    |-------------------------|-------------------|------------------------------|
    | none                    | -                 | 1 + 0                        |
    | hidden (frozen head)    | -                 | 2 + 0                        |
    | hidden and weight       | fit the budget    | 2 + 1                        |
    | hidden and weight       | do not fit        | 1 + 3                        |
    | weight only             | fit / do not fit  | 1 + 1 / 1 + 2                |

    The gradient of a bias comes from the same tiles as that of weight and adds no unit; without a weight's
    gradient beside it, it needs tiles all the same (1 + 0 kept, 1 + 1 computed again). Soft-cap and scale
    change nothing here.

    Args, Errors: as `linear_cross_entropy`. Dtypes count as they are: under autocast, which casts before it
    computes, pass tensors of the dtype that it casts to.
    """
    checks.require_linear(hidden, weight, bias)
    return make_plan(hidden, weight, bias, backend=backend, gemm=gemm, kept_tile_bytes=kept_tile_bytes)


def make_plan(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    backend: str,
    gemm: str,
    kept_tile_bytes: int = KEPT_TILE_BYTES,
) -> Plan:
    """`plan_linear_cross_entropy` of tensors that are checked."""
    chosen = backends.choose(
        "linear_cross_entropy", device=hidden.device.type, dtype=hidden.dtype, requested=backend
    )
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    if chosen == "reference":
        return Plan(chosen, "", False, False, 0, 1, int(need_hidden) + int(need_weight))
    need_tiles = need_weight or (grad and bias is not None and bias.requires_grad)
    module = backend_module(chosen)
    resolved = module.resolve_gemm(gemm, hidden.dtype, hidden.device)
    kept_bytes = _bytes(module.kept_shapes(hidden.shape[0], weight.shape[0], resolved, hidden.dtype))
    if not need_tiles:
        return Plan(chosen, resolved, need_hidden, False, 0, 1 + int(need_hidden), 0)
    if kept_bytes <= kept_tile_bytes:
        return Plan(chosen, resolved, need_hidden, True, kept_bytes, 1 + int(need_hidden), int(need_weight))
    return Plan(chosen, resolved, False, False, 0, 1, 1 + int(need_hidden) + int(need_weight))
