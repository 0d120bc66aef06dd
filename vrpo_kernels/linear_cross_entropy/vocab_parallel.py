"""linear_cross_entropy with the head's rows spread over a process group (tensor-parallel heads).

Each rank runs the same backend functions on its shard; two collectives of N and 2 N numbers join the softmax
sums, and one in backward adds the partial hidden gradients. Nothing of size N x V leaves a rank.
"""

import dataclasses

import torch
import torch.distributed as dist
from torch import Tensor

from vrpo_kernels import checks
from vrpo_kernels.linear_cross_entropy import op
from vrpo_kernels.linear_cross_entropy.api import _autocast
from vrpo_kernels.linear_cross_entropy.metrics import cap_slope, capped
from vrpo_kernels.linear_cross_entropy.plan import KEPT_TILE_BYTES, Plan, plan_linear_cross_entropy


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
        first_class: index in the whole head of this rank's first row. Every target must lie in one shard.
        bias: (V_rank,), this rank's part of the bias, or None, the same on every rank.
        softcap, scale: as `linear_cross_entropy`, the same on every rank.
        backend, gemm, kept_tile_bytes: as `linear_cross_entropy`; backends "triton" and "cpu". Beyond the
            budget, and always with "triton": 2 units forward, 2 backward.
    Returns:
        nll (N,) float32, the same bits on every rank.
    Numerics:
        As `linear_cross_entropy`. The gradient of `hidden` is complete on every rank (summed over the group
        in fp32, rounded once); those of `weight` and `bias` are this shard's. nll is bitwise the same with
        and without gradients. Every rank must run backward, because it communicates.
    Errors:
        ValueError as `linear_cross_entropy`, and for backend "reference" (which has no shards).
    """
    hidden, weight, bias = _autocast(hidden, weight, bias)
    checks.require_head(hidden, weight, targets, bias)
    settings = checks.logit_settings(softcap, scale)
    plan = plan_linear_cross_entropy(
        hidden, weight, bias=bias, backend=backend, gemm=gemm, kept_tile_bytes=kept_tile_bytes
    )
    if plan.backend == "reference":
        raise ValueError(
            "vocab_parallel_linear_cross_entropy: backend 'reference' has no sharded form; it needs the C++ "
            "or the Triton backend (see vrpo_kernels.describe())"
        )
    # Unlike on one device, the hidden gradient is always formed in forward: its parts are summed in fp32.
    # Triton's kept tiles hold the target's entry relative to the shard's own sums, so they are not kept here.
    plan = dataclasses.replace(
        plan,
        want_dhidden=torch.is_grad_enabled() and hidden.requires_grad,
        keep_tiles=plan.keep_tiles and plan.backend != "triton",
    )
    local = _local(targets, first_class, weight.shape[0])
    return _VocabParallel.apply(hidden, weight, bias, local, settings, group, plan)


def _local(targets: Tensor, first_class: int, num_classes: int) -> Tensor:
    """Targets as indices into this shard; ABSENT where they lie in another."""
    local = targets - first_class
    return torch.where((local >= 0) & (local < num_classes), local, op.ABSENT)


def _join(statistics: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """(3, N) statistics of the whole head from those of the shards."""
    target_logit, shift, total = statistics.clone()
    # A shard whose only class is the target has s = 0, and its shift says nothing.
    lowest = torch.finfo(shift.dtype).min
    highest = torch.where(total == 0, lowest, shift)
    dist.all_reduce(highest, dist.ReduceOp.MAX, group)
    scale = torch.where(total == 0, 0.0, (shift - highest).exp())
    sums = torch.stack([target_logit, total * scale])
    dist.all_reduce(sums, dist.ReduceOp.SUM, group)
    return torch.stack([sums[0], torch.where(sums[1] == 0, 0.0, highest), sums[1]])


class _VocabParallel(torch.autograd.Function):
    """The collectives around `op._forward`, `_dhidden`, `_dweight` and `_sweep`."""

    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        settings: tuple[float, float],
        group: "dist.ProcessGroup",
        plan: Plan,
    ) -> Tensor:
        _, local, expected, kept, kept_shift, _ = op._forward(
            hidden,
            weight,
            bias,
            targets,
            *settings,
            plan.backend,
            plan.gemm,
            plan.want_dhidden,
            plan.keep_tiles,
            False,
        )
        statistics = _join(local, group)
        ctx.settings, ctx.group, ctx.plan = settings, group, plan
        ctx.save_for_backward(hidden, weight, bias, targets, statistics, local, expected, kept, kept_shift)
        return torch.nn.functional.softplus(_log_odds(statistics, settings[0]), threshold=1e9).float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dnll):
        hidden, weight, bias, targets, statistics, local, expected, kept, kept_shift = ctx.saved_tensors
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
                dnll, hidden, weight, targets, statistics, kept, kept_shift, *settings, plan.gemm,
                need_weight, need_bias,
            )  # fmt: skip
        elif need_weight or need_bias:
            _, dweight, dbias = op._sweep(
                dnll, hidden, weight, bias, targets, statistics, *settings, plan.gemm, False, need_weight,
                need_bias,
            )  # fmt: skip
        return dhidden, dweight if need_weight else None, dbias if need_bias else None, *(None,) * 4


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
