"""linear_cross_entropy with the head's rows spread over a process group (tensor-parallel heads).

Each rank runs the same backend functions on its shard; two collectives of N and 2 N numbers join the softmax
sums, and one in backward adds the partial hidden gradients. Nothing of size N x V leaves a rank.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from vrpo_kernels import autograd, checks
from vrpo_kernels.linear_cross_entropy import op
from vrpo_kernels.linear_cross_entropy.api import _autocast
from vrpo_kernels.linear_cross_entropy.metrics import cap_slope, capped, softplus
from vrpo_kernels.linear_cross_entropy.plan import KEPT_TILE_BYTES, Plan, make_plan


def vocab_parallel_linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    group: "dist.ProcessGroup",
    first_class: int,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float = 1.0,
    backend: str = "auto",
    gemm: str = "auto",
    kept_tile_bytes: int = KEPT_TILE_BYTES,
) -> Tensor:
    """Negative log-likelihood under a linear head of which every rank of `group` holds some rows.

        nll_n = logsumexp_v z_nv - z_n,target_n,   z as in `linear_cross_entropy`, head = shards of all ranks

    Args:
        hidden: (N, D), the same on every rank.
        weight: (V_rank, D), this rank's rows of the head, V_rank >= 1; shards may differ in size.
        targets: (N,) int64, the same on every rank, indices into the whole head.
        group: the process group over which the head is spread.
        first_class: index in the whole head of this rank's first row. The shards of all ranks together must
            be the classes 0 .. V - 1, each once, in any order of ranks; V <= 2**24.
        bias: (V_rank,), this rank's part of the bias, or None, the same on every rank.
        softcap, scale: as `linear_cross_entropy`, the same on every rank.
        backend, gemm, kept_tile_bytes: as `linear_cross_entropy`; backends "triton" and "cpu". Beyond the
            budget: 2 units forward, 2 backward.
    Returns:
        nll (N,) float32, the same bits on every rank.
    Numerics:
        As `linear_cross_entropy`. The gradient of `hidden` is complete on every rank (summed over the group
        in fp32, rounded once); those of `weight` and `bias` are this shard's. nll is bitwise the same with
        and without gradients. Every rank must run backward, because it communicates.
    Differentiation: once, in reverse mode, outside of `torch.func` transforms; else a RuntimeError.
    Errors:
        ValueError as `linear_cross_entropy`, for backend "reference" (which has no shards), and for shards
        that overlap or leave gaps. What concerns values (targets out of range, shards) is raised on every
        rank alike, after the collectives of the forward pass, where values are checked (see `set_debug`,
        which must then be the same on every rank). Elsewhere it is NaN: the row of a target out of range, and
        every row if the shards do not fit together.
    """
    if autograd.is_transformed():
        raise RuntimeError(
            "vocab_parallel_linear_cross_entropy communicates, which torch.func transforms and forward-mode "
            "AD cannot follow; apply them to linear_cross_entropy on the whole head"
        )
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.require_head(hidden, weight, targets, bias)
    settings = checks.logit_settings(softcap, scale)
    plan = make_plan(hidden, weight, bias, backend=backend, gemm=gemm, kept_tile_bytes=kept_tile_bytes)
    if plan.backend == "reference":
        raise ValueError(
            "vocab_parallel_linear_cross_entropy: backend 'reference' has no sharded form; it needs the C++ "
            "or the Triton backend (see vrpo_kernels.describe())"
        )
    # Unlike on one device, the hidden gradient is always formed in forward: its parts are summed in fp32.
    plan = dataclasses.replace(
        plan,
        want_dhidden=torch.is_grad_enabled() and hidden.requires_grad,
    )
    return _VocabParallel.apply(hidden, weight, bias, targets, first_class, settings, group, plan)


def _local(targets: Tensor, first_class: int, num_classes: int) -> Tensor:
    """Targets as indices into this shard; ABSENT where they lie in another."""
    local = targets - first_class
    return torch.where((local >= 0) & (local < num_classes), local, op.ABSENT)


def _own_place(first_class: int, num_classes: int, group: "dist.ProcessGroup", like: Tensor) -> Tensor:
    """(2 W,): this rank's first class and size in its own places, else -1, for a maximum over ranks."""
    here = torch.arange(dist.get_world_size(group), device=like.device) == dist.get_rank(group)
    values = (float(first_class), float(num_classes))
    return torch.cat([torch.where(here, value, -1.0) for value in values]).to(like.dtype)


@torch.library.custom_op("vrpo_kernels::vocab_parallel_faults", mutates_args=())
def _faults(targets: Tensor, shards: Tensor) -> Tensor:
    """(N,) float32: 0 for a target that is a class of the joined head, else NaN, or ValueError where values
    are checked. shards (2 W,): every rank's first class, then every rank's size. The same on every rank.
    """
    first, size = shards.view(2, -1)
    order = first.argsort()
    begin, end = first[order], (first + size)[order]
    fits = (begin[0] == 0) & (begin[1:] == end[:-1]).all()
    if checks.values_are_checked(targets.device):
        if not bool(fits):
            listed = ", ".join(
                f"[{a:.0f}, {b:.0f})" for a, b in zip(begin.tolist(), end.tolist(), strict=True)
            )
            raise ValueError(
                "first_class must make the shards of all ranks follow each other from class 0 on, without "
                f"overlap or gap, got shards {listed}"
            )
        checks.require_targets(targets, int(end[-1]))
    known = (targets >= 0) & (targets < end[-1].long()) & fits
    return torch.where(known, 0.0, torch.nan)


@_faults.register_fake
def _(targets, shards):
    return targets.new_empty(targets.shape, dtype=torch.float32)


def _join(statistics: Tensor, targets: Tensor, own_place: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """(3, N) statistics of the whole head from those of the shards; ValueError or NaN for bad targets."""
    target_logit, shift, total = statistics.clone()
    # A shard whose only class is the target has s = 0, and its shift says nothing.
    lowest = torch.finfo(shift.dtype).min
    maxima = torch.cat([torch.where(total == 0, lowest, shift), own_place])
    dist.all_reduce(maxima, dist.ReduceOp.MAX, group)
    highest, shards = maxima.split([shift.shape[0], own_place.shape[0]])
    scale = torch.where(total == 0, 0.0, (shift - highest).exp())
    sums = torch.stack([target_logit, total * scale])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    target_logit = sums[0] + _faults(targets, shards.clone())
    return torch.stack([target_logit, torch.where(sums[1] == 0, 0.0, highest), sums[1]])


class _VocabParallel(torch.autograd.Function):
    """The collectives around `op._forward`, `_dhidden`, `_dweight` and `_sweep`."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        first_class: int,
        settings: tuple[float, float],
        group: "dist.ProcessGroup",
        plan: Plan,
    ) -> Tensor:
        here = _local(targets, first_class, weight.shape[0])
        _, local, expected, kept, kept_shift, _ = op._forward(
            hidden,
            weight,
            bias,
            here,
            *settings,
            plan.backend,
            plan.gemm,
            plan.want_dhidden,
            plan.keep_tiles,
            False,
            True,
        )
        own_place = _own_place(first_class, weight.shape[0], group, local)
        statistics = tile_statistics = _join(local, targets, own_place, group)
        if plan.keep_tiles and plan.backend == "triton":
            tile_statistics = op._rebase_kept(
                kept, here, local, statistics, weight.shape[0], settings[0], plan.backend
            )
        ctx.settings, ctx.group, ctx.plan = settings, group, plan
        ctx.save_for_backward(
            hidden, weight, bias, here, statistics, local, expected, kept, kept_shift, tile_statistics
        )
        return softplus(_log_odds(statistics, settings[0])).float()

    @staticmethod
    def backward(ctx, dnll):
        return _once_backward(ctx, dnll)


def _backward(ctx, saved, dnll):
    hidden, weight, bias, targets, statistics, local, expected, kept, kept_shift, tile_statistics = saved
    need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
    plan = ctx.plan
    settings = (*ctx.settings, plan.backend)
    dhidden = dweight = dbias = None
    if need_hidden:
        # What this shard adds to the mean head row among all other classes.
        share = local[2] / statistics[2] * (local[1] - statistics[1]).exp()
        share = torch.where(local[2] == 0, 0.0, share)
        mean = share[:, None] * expected
        dhidden = _shard_dhidden(dnll, mean, statistics, weight, targets, *ctx.settings)
        dist.all_reduce(dhidden, dist.ReduceOp.SUM, ctx.group)
        dhidden = dhidden.to(hidden.dtype)
    if plan.keep_tiles:
        dweight, dbias = op._dweight(
            dnll, hidden, weight, targets, tile_statistics, kept, kept_shift, *settings, plan.gemm,
            need_weight, need_bias,
        )  # fmt: skip
    elif need_weight or need_bias:
        _, dweight, dbias = op._sweep(
            dnll, hidden, weight, bias, targets, statistics, *settings, plan.gemm, False, need_weight,
            need_bias,
        )  # fmt: skip
    return dhidden, dweight if need_weight else None, dbias if need_bias else None, *(None,) * 5


_once_backward = autograd.once_differentiable(
    "vocab_parallel_linear_cross_entropy",
    _backward,
    "Call linear_cross_entropy(..., backend='reference') on the whole head, or leave the derivative out",
)


def _log_odds(statistics: Tensor, softcap: float) -> Tensor:
    """(N,) float64: log of the odds against the target."""
    target_logit, shift, total = statistics.double()
    return (shift - capped(target_logit, softcap)) + total.log()


def _shard_dhidden(
    dnll: Tensor,
    expected: Tensor,
    statistics: Tensor,
    weight: Tensor,
    targets: Tensor,
    softcap: float,
    scale: float,
) -> Tensor:
    """This shard's part of dhidden in fp32: dnll q scale (expected - D_y weight_y if y lives here)."""
    factor = dnll * (torch.sigmoid(_log_odds(statistics, softcap)) * scale).float()
    owned = (targets != op.ABSENT)[:, None]
    head_row = torch.where(owned, weight[targets.clamp(min=0)].float(), 0.0)
    slope = cap_slope(statistics[0].double(), softcap).float()
    return factor[:, None] * (expected - slope[:, None] * head_row)
