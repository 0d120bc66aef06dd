"""What vocab_parallel_linear_cross_entropy asks of the Triton backend, without a process group."""

import torch

from vrpo_kernels.linear_cross_entropy.op import ABSENT


def two_shards(gemm, cut, hidden, weight, targets, upstream):
    """(nll, dhidden, dweight) of a head whose first `cut` classes are one shard and the others another."""
    from vrpo_kernels.linear_cross_entropy import kernel  # needs Triton

    shards, local, expected = [], [], []
    for first, last in ((0, cut), (cut, weight.shape[0])):
        here = torch.where((targets >= first) & (targets < last), targets - first, ABSENT)
        shards.append((weight[first:last], here))
        wanted = {"want_dhidden": True, "keep_tiles": False}
        _, statistics, mean_row, *_ = kernel.forward(hidden, weight[first:last], here, gemm=gemm, **wanted)
        local.append(statistics)
        expected.append(mean_row)
    highest = torch.maximum(local[0][1], local[1][1])
    totals = [part[2] * (part[1] - highest).exp() for part in local]
    joined = torch.stack([local[0][0] + local[1][0], highest, totals[0] + totals[1]])
    whole = sum((total / joined[2])[:, None] * row for total, row in zip(totals, expected, strict=True))
    dhidden = kernel.dhidden(upstream, whole, joined, weight, targets)
    wanted = {"want_dhidden": False, "want_dweight": True}
    dweight = torch.cat(
        [kernel.sweep(upstream, hidden, *shard, joined, gemm=gemm, **wanted)[1] for shard in shards]
    )
    nll = torch.nn.functional.softplus((joined[1] - joined[0]) + joined[2].log())
    return nll, dhidden, dweight
