"""What vocab_parallel_linear_cross_entropy asks of the Triton backend, without a process group."""

import torch

from vrpo_kernels import testing
from vrpo_kernels.linear_cross_entropy.metrics import capped
from vrpo_kernels.linear_cross_entropy.op import ABSENT


def sharded(gemm, edges, hidden, weight, targets, upstream, *, keep=False, bias=None, softcap=0.0, scale=1.0):
    """(nll, dhidden, dweight, dbias or None) of a head whose shards end at `edges`.

    keep: the head's gradients come from kept tiles, brought under the joined softmax; else from the sweep.
    """
    from vrpo_kernels.linear_cross_entropy import kernel  # needs Triton

    head = {"softcap": softcap, "scale": scale}
    wanted = {"want_dweight": True, "want_dbias": bias is not None}
    shards = []
    for first, last in zip((0, *edges[:-1]), edges, strict=True):
        here = torch.where((targets >= first) & (targets < last), targets - first, ABSENT)
        part = {"bias": None if bias is None else bias[first:last], **head}
        out = kernel.forward(
            hidden, weight[first:last], here, gemm=gemm, want_dhidden=True, keep_tiles=keep, **part
        )
        shards.append((weight[first:last], here, part, out))
    joined = _join([out[1] for *_, out in shards])
    mean, dweight, dbias = 0.0, [], []
    for rows, here, part, (_, local, expected, kept, shift, _) in shards:
        share = torch.where(local[2] == 0, 0.0, local[2] * (local[1] - joined[1]).exp() / joined[2])
        mean = mean + share[:, None] * expected
        if keep:
            under = kernel.rebase_kept(kept, here, local, joined, len(rows), softcap)
            found = kernel.dweight(
                upstream, hidden, rows, here, under, kept, shift, gemm=gemm, **head, **wanted
            )
        else:
            known = (upstream, hidden, rows, here, joined)
            found = kernel.sweep(*known, gemm=gemm, want_dhidden=False, **part, **wanted)[1:]
        dweight.append(found[0])
        dbias.append(found[1])
    dhidden = kernel.dhidden(upstream, mean, joined, weight, targets, **head)
    log_odds = (joined[1].double() - capped(joined[0].double(), softcap)) + joined[2].double().log()
    nll = torch.nn.functional.softplus(log_odds, threshold=1e9).float()
    return nll, dhidden, torch.cat(dweight), torch.cat(dbias) if bias is not None else None


def _join(parts):
    """`vocab_parallel._join` of these statistics."""
    sums = [part[2] for part in parts]
    highest = torch.stack([torch.where(part[2] == 0, -3e38, part[1]) for part in parts]).amax(0)
    totals = [
        torch.where(total == 0, 0.0, total * (part[1] - highest).exp())
        for part, total in zip(parts, sums, strict=True)
    ]
    total = torch.stack(totals).sum(0)
    return torch.stack([sum(part[0] for part in parts), torch.where(total == 0, 0.0, highest), total])


def sharded_ratios(gemm, edges, hidden, weight, targets, upstream, *, keep=False, **head):
    """The policy applied to `sharded`."""
    inputs = (hidden, weight, targets, upstream)
    nll, dhidden, dweight, dbias = sharded(gemm, edges, *inputs, keep=keep, **head)
    settings = {
        "bias": head.get("bias"),
        "softcap": head.get("softcap", 0.0),
        "scale": head.get("scale", 1.0),
    }
    return testing.linear_cross_entropy_ratios(nll, dhidden, dweight, *inputs, dbias=dbias, **settings)
