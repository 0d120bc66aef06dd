"""The public functions, what is saved for backward, and the registration with torch.library.

No tiles, pointers or arithmetic here: a backend is a module (`cpu.py`, `kernel.py`) with the functions
`resolve_gemm`, `kept_shapes`, `forward`, `target_logits`, `dhidden`, `dweight` and `sweep`.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from vrpo_kernels import backend as backends
from vrpo_kernels import checks
from vrpo_kernels.linear_cross_entropy import cpu, reference

KEPT_TILE_BYTES = 2**30
"""Default budget for the tiles a trained head keeps between forward and backward: 1 GiB."""

ABSENT = torch.iinfo(torch.int64).min
"""Target of a row whose target is not among these classes, because it lies in another shard of the head."""


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


def _module(backend: str) -> ModuleType:
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

    Args, Errors: as `linear_cross_entropy`.
    """
    chosen = backends.choose(
        "linear_cross_entropy", device=hidden.device.type, dtype=hidden.dtype, requested=backend
    )
    grad = torch.is_grad_enabled()
    need_hidden, need_weight = grad and hidden.requires_grad, grad and weight.requires_grad
    if chosen == "reference":
        return Plan(chosen, "", False, False, 0, 1, int(need_hidden) + int(need_weight))
    module = _module(chosen)
    resolved = module.resolve_gemm(gemm, hidden.dtype, hidden.device)
    kept_bytes = _bytes(module.kept_shapes(hidden.shape[0], weight.shape[0], resolved, hidden.dtype))
    if not need_weight:
        return Plan(chosen, resolved, need_hidden, False, 0, 1 + int(need_hidden), 0)
    if kept_bytes <= kept_tile_bytes:
        return Plan(chosen, resolved, need_hidden, True, kept_bytes, 1 + int(need_hidden), 1)
    return Plan(chosen, resolved, False, False, 0, 1, 2 + int(need_hidden))


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    backend: str = "auto",
    gemm: str = "auto",
    kept_tile_bytes: int = KEPT_TILE_BYTES,
) -> Tensor:
    """Negative log-likelihood of one target per row under a linear head.

        nll_n = logsumexp_v(hidden_n . weight_v) - hidden_n . weight_{targets_n}

    Exact for any outer loss: backward takes an arbitrary, signed gradient per row. The gradient of `hidden`
    is linear in the row's upstream gradient, so it is formed in the forward pass and scaled in the backward
    pass: 2 matmul units with a frozen head and 3 with a trained one, where recomputation needs 3 and 4
    (`plan_linear_cross_entropy` lists every case and says which one a call takes).

    Args:
        hidden: (N, D) float32, bfloat16 or float16 (float64: reference only); the rows to score, already
            selected. Under autocast, cast as `torch.nn.functional.linear` would cast it. N = 0 is allowed.
        weight: (V, D), the head, same dtype and device; V >= 1. No DTensor: gather it first.
        targets: (N,) int64 in [0, V).
        backend: "auto", "triton", "cpu" or "reference" (see `vrpo_kernels.choose`).
        gemm: matrix multiplication inside the backend. "auto" depends on dtype and machine model only. Other
            names (`cpu.GEMMS`) change the last bits, so a run must keep one choice on all its processes.
        kept_tile_bytes: budget in bytes for the N x V tiles that a trained head keeps from forward to
            backward.
            Beyond it the tiles are computed again (one more unit, no memory).
    Returns:
        nll (N,) float32 (float64 for float64), nats, >= 0.
    Numerics:
        Logits, sums and the result in fp32 also for 16-bit inputs; softplus of the log-odds, so that rows
        with p close to 1 keep their relative accuracy. nll is bitwise the same whether or not gradients are
        wanted, and from run to run. Gradients are summed in fp32 and rounded once. Where the matmuls take
        16-bit factors (Triton; gemm "bf16" on CPUs), probabilities enter them rounded to the input dtype. No
        atomics: every output has one owner.
    Errors:
        ValueError naming the argument and both shapes, for a target out of range (CPU), or listing every
        reason why a requested backend cannot run. In the Triton backend, where raising would mean waiting
        for the GPU, a row with a target out of range has nll NaN, and so have the gradients it enters;
        nothing out of bounds is read or written. The reference on a GPU ends in torch's device-side assert.
    Source: per-term log-probability of the l-form ELBO, arXiv 2505.19223, Eq. (14)-(15).
    """
    hidden, weight = _autocast(hidden, weight)
    checks.require_head(hidden, weight, targets)
    plan = plan_linear_cross_entropy(
        hidden, weight, backend=backend, gemm=gemm, kept_tile_bytes=kept_tile_bytes
    )
    if plan.backend == "reference":
        return reference.exactly(reference.linear_cross_entropy, hidden, weight, targets)
    outputs = _forward(hidden, weight, targets, plan.backend, plan.gemm, plan.want_dhidden, plan.keep_tiles)
    return outputs[0]


@torch.no_grad()
def linear_cross_entropy_statistics(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, backend: str = "auto", gemm: str = "auto"
) -> tuple[Tensor, Tensor]:
    """First pass of a replay: nll without gradients, and what the second pass needs to know. 1 unit.

    Args, Errors: as `linear_cross_entropy`.
    Returns:
        nll (N,), with the same bits as `linear_cross_entropy`, and statistics (3, N), both float32 (float64
        for float64): the target's logit, a shift m, and s = sum over the other classes of exp(logit - m). 12
        bytes per row.
    """
    hidden, weight = _autocast(hidden, weight)
    checks.require_head(hidden, weight, targets)
    plan = plan_linear_cross_entropy(hidden, weight, backend=backend, gemm=gemm)
    if plan.backend == "reference":
        return reference.exactly(reference.statistics, hidden, weight, targets)
    nll, statistics, *_ = _forward(hidden, weight, targets, plan.backend, plan.gemm, False, False)
    return nll, statistics


def linear_cross_entropy_replay(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    nll: Tensor,
    statistics: Tensor,
    *,
    backend: str = "auto",
    gemm: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Second pass of a replay: the nll known from `linear_cross_entropy_statistics`, now with gradients.

    Forward costs no matmul; backward is one sweep over the vocabulary, 3 units (2 with a frozen head), with
    tile-sized workspace and nothing of size N x V or N x D saved. Gradients are those of
    `linear_cross_entropy`.

    Args:
        hidden, weight, targets: as in the first pass, bit for bit (same batching, deterministic body, no
        dropout).
        nll, statistics: what the first pass returned.
        backend, gemm: as in the first pass.
    Returns:
        nll (N,), the known values, differentiable in hidden and weight; and drift, a 0-dim float32 tensor:
        the largest difference between the target logits of the two passes. It is 0 if hidden and weight did
        not change; anything else means that the gradients belong to other values than the nll. Not checked
        here, because that would stall a GPU.
    Errors: as `linear_cross_entropy`, and ValueError if nll or statistics have the wrong shape.
    Source: the two-pass form of the gradient in arXiv 2505.19223, section 4: row weights are known before
    pass 2.
    """
    hidden, weight = _autocast(hidden, weight)
    checks.require_head(hidden, weight, targets)
    num_rows = hidden.shape[0]
    checks.require_same("shape", "nll", tuple(nll.shape), "(N,)", (num_rows,))
    checks.require_same("shape", "statistics", tuple(statistics.shape), "(3, N)", (3, num_rows))
    plan = plan_linear_cross_entropy(hidden, weight, backend=backend, gemm=gemm)
    if plan.backend == "reference":
        fresh = reference.exactly(reference.linear_cross_entropy, hidden, weight, targets)
        target_logit = reference.exactly(reference.target_logits, hidden, weight, targets)
        return fresh, _drift(target_logit.detach(), statistics)
    return _replay(hidden, weight, targets, nll, statistics, plan.backend, plan.gemm)


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """What autocast does to the arguments of F.linear: float inputs become the autocast dtype, float64
    stays.
    """
    device = hidden.device.type
    if not torch.is_autocast_enabled(device) or torch.float64 in (hidden.dtype, weight.dtype):
        return hidden, weight
    dtype = torch.get_autocast_dtype(device)
    return hidden.to(dtype), weight.to(dtype)


def _drift(target_logit: Tensor, statistics: Tensor) -> Tensor:
    difference = (target_logit - statistics[0]).abs().float()
    return torch.cat([difference, difference.new_zeros(1)]).amax()  # N = 0 has drift 0


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    backend: str,
    gemm: str,
    want_dhidden: bool,
    keep_tiles: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(nll (N,), statistics (3, N), expected (N, D) fp32 or empty, kept tiles or empty, their shifts or
    empty).

    statistics: target logit, shift m, s = sum over v != target of exp(z_v - m). A target may be ABSENT (in
    vocab-parallel shards): its logit is then 0, s runs over all classes, and nll is meaningless.
    expected: sum over v != target of exp(z_v - m) / s * weight_v, the mean head row among the other classes,
    so that with q = 1 - p(target) the unscaled hidden gradient is q * (expected - weight[target]).
    """
    return _module(backend).forward(
        hidden, weight, targets, gemm=gemm, want_dhidden=want_dhidden, keep_tiles=keep_tiles
    )


@_forward.register_fake
def _(hidden, weight, targets, backend, gemm, want_dhidden, keep_tiles):
    num_rows, num_hidden = hidden.shape
    nll = hidden.new_empty(num_rows, dtype=torch.float32)
    statistics = hidden.new_empty(3, num_rows, dtype=torch.float32)
    expected_shape = (num_rows, num_hidden) if want_dhidden else (0, 0)
    expected = hidden.new_empty(expected_shape, dtype=torch.float32)
    shapes = _module(backend).kept_shapes(num_rows, weight.shape[0], gemm, hidden.dtype)
    kept, kept_shift = (
        hidden.new_empty(shape if keep_tiles else (0, 0), dtype=dtype) for shape, dtype in shapes
    )
    return nll, statistics, expected, kept, kept_shift


def _forward_context(ctx, inputs, output):
    hidden, weight, targets, ctx.backend, ctx.gemm, ctx.want_dhidden, ctx.keep_tiles = inputs
    _nll, statistics, expected, kept, kept_shift = output
    ctx.mark_non_differentiable(statistics, expected, kept, kept_shift)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, statistics, expected, kept, kept_shift)


def _forward_backward(ctx, dnll, *_unused):
    if dnll is None:
        return (None,) * 7
    hidden, weight, targets, statistics, expected, kept, kept_shift = ctx.saved_tensors
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    dhidden = dweight = None
    if need_hidden and ctx.want_dhidden:
        dhidden = _dhidden(dnll, expected, statistics, weight, targets, ctx.backend)
    if need_weight and ctx.keep_tiles:
        dweight = _dweight(dnll, hidden, weight, targets, statistics, kept, kept_shift, ctx.backend, ctx.gemm)
    # Whatever forward left no material for is computed again, both in the same sweep.
    sweep_hidden, sweep_weight = need_hidden and dhidden is None, need_weight and dweight is None
    if sweep_hidden or sweep_weight:
        swept = _sweep(
            dnll, hidden, weight, targets, statistics, ctx.backend, ctx.gemm, sweep_hidden, sweep_weight
        )
        dhidden = swept[0] if sweep_hidden else dhidden
        dweight = swept[1] if sweep_weight else dweight
    return dhidden, dweight, None, None, None, None, None


_forward.register_autograd(_forward_backward, setup_context=_forward_context)


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_dhidden", mutates_args=())
def _dhidden(
    dnll: Tensor, expected: Tensor, statistics: Tensor, weight: Tensor, targets: Tensor, backend: str
) -> Tensor:
    """dhidden_n = dnll_n q_n (expected_n - weight_{targets_n}), (N, D) in the head's dtype, rounded once."""
    return _module(backend).dhidden(dnll, expected, statistics, weight, targets)


@_dhidden.register_fake
def _(dnll, expected, statistics, weight, targets, backend):
    return weight.new_empty(expected.shape)


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_dweight", mutates_args=())
def _dweight(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    kept: Tensor,
    kept_shift: Tensor,
    backend: str,
    gemm: str,
) -> Tensor:
    """dweight_v = sum_n dnll_n (p_nv - [v = target_n]) hidden_n, (V, D) in the head's dtype, rounded once."""
    return _module(backend).dweight(dnll, hidden, weight, targets, statistics, kept, kept_shift, gemm=gemm)


@_dweight.register_fake
def _(dnll, hidden, weight, targets, statistics, kept, kept_shift, backend, gemm):
    return weight.new_empty(weight.shape)


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_sweep", mutates_args=())
def _sweep(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    statistics: Tensor,
    backend: str,
    gemm: str,
    want_dhidden: bool,
    want_dweight: bool,
) -> tuple[Tensor, Tensor]:
    """(dhidden (N, D) or empty, dweight (V, D) or empty) from known statistics, in one pass over the
    vocabulary.
    """
    return _module(backend).sweep(
        dnll,
        hidden,
        weight,
        targets,
        statistics,
        gemm=gemm,
        want_dhidden=want_dhidden,
        want_dweight=want_dweight,
    )


@_sweep.register_fake
def _(dnll, hidden, weight, targets, statistics, backend, gemm, want_dhidden, want_dweight):
    dhidden = hidden.new_empty(hidden.shape if want_dhidden else (0, 0))
    return dhidden, weight.new_empty(weight.shape if want_dweight else (0, 0))


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_replay", mutates_args=())
def _replay(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    nll: Tensor,
    statistics: Tensor,
    backend: str,
    gemm: str,
) -> tuple[Tensor, Tensor]:
    """(a copy of nll, drift ())."""
    target_logit = _module(backend).target_logits(hidden, weight, targets)
    return nll.clone(), _drift(target_logit, statistics)


@_replay.register_fake
def _(hidden, weight, targets, nll, statistics, backend, gemm):
    return torch.empty_like(nll), nll.new_empty(())


def _replay_context(ctx, inputs, output):
    hidden, weight, targets, _nll, statistics, ctx.backend, ctx.gemm = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, targets, statistics)


def _replay_backward(ctx, dnll, _ddrift):
    need_hidden, need_weight = ctx.needs_input_grad[:2]
    if dnll is None or not (need_hidden or need_weight):
        return (None,) * 7
    hidden, weight, targets, statistics = ctx.saved_tensors
    dhidden, dweight = _sweep(
        dnll, hidden, weight, targets, statistics, ctx.backend, ctx.gemm, need_hidden, need_weight
    )
    return (
        dhidden if need_hidden else None,
        dweight if need_weight else None,
        *(None,) * 5,
    )


_replay.register_autograd(_replay_backward, setup_context=_replay_context)
