"""What is saved for backward, and the registration with torch.library. The public functions are in `api.py`.

No tiles, pointers or arithmetic here: a backend is a module (`cpu.py`, `kernel.py`) with the functions
`resolve_gemm`, `kept_shapes`, `forward`, `target_logits`, `dhidden`, `dweight` and `sweep`; `kernel.py` has
`rebase_kept` too.

Everywhere, with u_nv = scale * (hidden_n . weight_v + bias_v):

    z_nv = softcap * tanh(u_nv / softcap),   D_nv = dz / du = 1 - (z_nv / softcap)^2

and z = u, D = 1 for softcap 0.
"""

import torch
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.linear_cross_entropy.plan import backend_module

ABSENT = torch.iinfo(torch.int64).min
"""Target of a row whose target is not among these classes, because it lies in another shard of the head."""


def drift(target_logit: Tensor, statistics: Tensor) -> Tensor:
    """() float32: the largest difference between a row's target logit now and in the first pass."""
    before = statistics[0]
    # Two infinities are alike: a target that is out (bias -inf) has the same logit in both passes.
    difference = torch.where(target_logit == before, 0.0, (target_logit - before).abs()).float()
    return torch.cat([difference, difference.new_zeros(1)]).amax()  # N = 0 has drift 0


def _present(targets: Tensor, num_classes: int) -> Tensor:
    """Targets of a whole head: ABSENT is out of range there, like any other number that is no class."""
    if checks.values_are_checked(targets.device):
        checks.require_targets(targets, num_classes)
        return targets
    return targets.clamp(min=-1)


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_forward", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    softcap: float,
    scale: float,
    backend: str,
    gemm: str,
    want_dhidden: bool,
    keep_tiles: bool,
    want_metrics: bool,
    sharded: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(nll (N,), statistics (3, N), then each as wanted or empty: expected (N, D) fp32, kept tiles, their
    shifts, metrics (2, N) fp32).

    statistics: u of the target, shift m, s = sum over v != target of exp(z_v - m). In a
    shard of a head (sharded) a target may be ABSENT: its u is then 0, s runs over all classes, and nll is
    meaningless.
    expected: sum over v != target of exp(z_v - m) D_v / s * weight_v, the mean head row among the other
    classes, so that with q = 1 - p(target) the unscaled gradient of hidden is
    q * scale * (expected - D_target * weight[target]).
    kept: exp(z_v - m) D_v under the shift of its time, in the layout of the backend.
    metrics: the largest z of the other classes; sum over them of exp(z_v - m) (z_v - m).
    """
    if not sharded:
        targets = _present(targets, weight.shape[0])
    return backend_module(backend).forward(
        hidden,
        weight,
        targets,
        bias=bias,
        softcap=softcap,
        scale=scale,
        gemm=gemm,
        want_dhidden=want_dhidden,
        keep_tiles=keep_tiles,
        want_metrics=want_metrics,
    )


@_forward.register_fake
def _(
    hidden,
    weight,
    bias,
    targets,
    softcap,
    scale,
    backend,
    gemm,
    want_dhidden,
    keep_tiles,
    want_metrics,
    sharded=False,
):
    num_rows, num_hidden = hidden.shape
    nll = hidden.new_empty(num_rows, dtype=torch.float32)
    statistics = hidden.new_empty(3, num_rows, dtype=torch.float32)
    expected_shape = (num_rows, num_hidden) if want_dhidden else (0, 0)
    expected = hidden.new_empty(expected_shape, dtype=torch.float32)
    shapes = backend_module(backend).kept_shapes(num_rows, weight.shape[0], gemm, hidden.dtype)
    kept, kept_shift = (
        hidden.new_empty(shape if keep_tiles else (0, 0), dtype=dtype) for shape, dtype in shapes
    )
    metrics = hidden.new_empty((2, num_rows) if want_metrics else (0, 0), dtype=torch.float32)
    return nll, statistics, expected, kept, kept_shift, metrics


def _forward_context(ctx, inputs, output):
    hidden, weight, bias, targets, ctx.softcap, ctx.scale, ctx.backend, ctx.gemm = inputs[:8]
    ctx.want_dhidden, ctx.keep_tiles = inputs[8:10]
    _nll, statistics, expected, kept, kept_shift, metrics = output
    ctx.mark_non_differentiable(statistics, expected, kept, kept_shift, metrics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, statistics, expected, kept, kept_shift)


def _forward_backward(ctx, saved, dnll, *_unused):
    nothing = (None,) * 9
    if dnll is None:
        return None, None, None, *nothing
    hidden, weight, bias, targets, statistics, expected, kept, kept_shift = saved
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    settings = (ctx.softcap, ctx.scale, ctx.backend)
    dhidden = dweight = dbias = None
    if need_hidden and ctx.want_dhidden:
        dhidden = _dhidden(dnll, expected, statistics, weight, targets, *settings)
    if ctx.keep_tiles:
        dweight, dbias = _dweight(
            dnll, hidden, weight, targets, statistics, kept, kept_shift, *settings, ctx.gemm, need_weight,
            need_bias,
        )  # fmt: skip
    # Whatever forward left no material for is computed again, all of it in the same sweep.
    sweep_hidden, sweep_head = need_hidden and dhidden is None, dweight is None
    if sweep_hidden or (sweep_head and (need_weight or need_bias)):
        swept = _sweep(
            dnll, hidden, weight, bias, targets, statistics, *settings, ctx.gemm, sweep_hidden,
            need_weight and sweep_head, need_bias and sweep_head,
        )  # fmt: skip
        dhidden = swept[0] if sweep_hidden else dhidden
        dweight, dbias = swept[1:] if sweep_head else (dweight, dbias)
    return dhidden, dweight if need_weight else None, dbias if need_bias else None, *nothing


forward = autograd.register(
    _forward,
    "linear_cross_entropy",
    autograd.once_differentiable("linear_cross_entropy", _forward_backward),
    _forward_context,
)
"""`_forward` for code that may be under torch.func transforms."""


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_dhidden", mutates_args=())
def _dhidden(
    dnll: Tensor,
    expected: Tensor,
    statistics: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    scale: float,
    backend: str,
) -> Tensor:
    """dhidden_n = dnll_n q_n scale (expected_n - D_ny weight_y), y the row's target; (N, D) in the head's
    dtype, rounded once.
    """
    return backend_module(backend).dhidden(dnll, expected, statistics, weight, targets, softcap, scale)


@_dhidden.register_fake
def _(dnll, expected, statistics, weight, targets, softcap, scale, backend):
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
    softcap: float,
    scale: float,
    backend: str,
    gemm: str,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor]:
    """(dweight (V, D), dbias (V,)), each as wanted or empty, in the head's dtype, rounded once; with
    du_nv = dnll_n (p_nv - [v = target_n]) D_nv scale:

    dweight_v = sum_n du_nv hidden_n,   dbias_v = sum_n du_nv
    """
    return backend_module(backend).dweight(
        dnll,
        hidden,
        weight,
        targets,
        statistics,
        kept,
        kept_shift,
        softcap=softcap,
        scale=scale,
        gemm=gemm,
        want_dweight=want_dweight,
        want_dbias=want_dbias,
    )


def _head_gradients(weight: Tensor, want_dweight: bool, want_dbias: bool) -> tuple[Tensor, Tensor]:
    """Fake (dweight, dbias)."""
    return (
        weight.new_empty(weight.shape if want_dweight else (0, 0)),
        weight.new_empty(weight.shape[0] if want_dbias else 0),
    )


@_dweight.register_fake
def _(
    dnll,
    hidden,
    weight,
    targets,
    statistics,
    kept,
    kept_shift,
    softcap,
    scale,
    backend,
    gemm,
    want_dweight,
    want_dbias,
):
    return _head_gradients(weight, want_dweight, want_dbias)


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_rebase_kept", mutates_args=("kept",))
def _rebase_kept(
    kept: Tensor,
    targets: Tensor,
    local: Tensor,
    joined: Tensor,
    num_classes: int,
    softcap: float,
    backend: str,
) -> Tensor:
    """(3, N) statistics with which `_dweight` takes the tiles that a shard of the head kept.

    The shard's tiles hold the target's entry, and in fp16 all entries, relative to its own sums; here they
    come under those of the whole head, in place. Only the Triton backend needs it: the tiles of the C++
    backend wait for the statistics of backward.

    local, joined: (3, N) statistics of this shard and of the whole head. num_classes: of this shard.
    """
    return backend_module(backend).rebase_kept(kept, targets, local, joined, num_classes, softcap)


@_rebase_kept.register_fake
def _(kept, targets, local, joined, num_classes, softcap, backend):
    return torch.empty_like(joined)


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_sweep", mutates_args=())
def _sweep(
    dnll: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    statistics: Tensor,
    softcap: float,
    scale: float,
    backend: str,
    gemm: str,
    want_dhidden: bool,
    want_dweight: bool,
    want_dbias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dhidden (N, D), dweight (V, D), dbias (V,)), each as wanted or empty, from known statistics, in one
    pass over the vocabulary.
    """
    return backend_module(backend).sweep(
        dnll,
        hidden,
        weight,
        targets,
        statistics,
        bias=bias,
        softcap=softcap,
        scale=scale,
        gemm=gemm,
        want_dhidden=want_dhidden,
        want_dweight=want_dweight,
        want_dbias=want_dbias,
    )


@_sweep.register_fake
def _(
    dnll,
    hidden,
    weight,
    bias,
    targets,
    statistics,
    softcap,
    scale,
    backend,
    gemm,
    want_dhidden,
    want_dweight,
    want_dbias,
):
    dhidden = hidden.new_empty(hidden.shape if want_dhidden else (0, 0))
    return dhidden, *_head_gradients(weight, want_dweight, want_dbias)


@torch.library.custom_op("vrpo_kernels::linear_cross_entropy_replay", mutates_args=())
def _replay(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    nll: Tensor,
    statistics: Tensor,
    softcap: float,
    scale: float,
    backend: str,
    gemm: str,
) -> tuple[Tensor, Tensor]:
    """(a copy of nll, drift ())."""
    targets = _present(targets, weight.shape[0])
    target_logit = backend_module(backend).target_logits(hidden, weight, targets, bias, scale)
    return nll.clone(), drift(target_logit, statistics)


@_replay.register_fake
def _(hidden, weight, bias, targets, nll, statistics, softcap, scale, backend, gemm):
    return torch.empty_like(nll), nll.new_empty(())


def _replay_context(ctx, inputs, output):
    hidden, weight, bias, targets, _nll, statistics, ctx.softcap, ctx.scale, ctx.backend, ctx.gemm = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, targets, statistics)


def _replay_backward(ctx, saved, dnll, _ddrift):
    needed = ctx.needs_input_grad[:3]
    if dnll is None or not any(needed):
        return (None,) * 10
    hidden, weight, bias, targets, statistics = saved
    settings = (ctx.softcap, ctx.scale, ctx.backend, ctx.gemm)
    swept = _sweep(dnll, hidden, weight, bias, targets, statistics, *settings, *needed)
    return *(part if need else None for part, need in zip(swept, needed, strict=True)), *(None,) * 7


replay = autograd.register(
    _replay,
    "linear_cross_entropy_replay",
    autograd.once_differentiable("linear_cross_entropy_replay", _replay_backward),
    _replay_context,
)
"""`_replay` for code that may be under torch.func transforms."""

for _gradient in (_dhidden, _dweight, _sweep):
    autograd.register_loop(_gradient)
