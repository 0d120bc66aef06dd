"""The step as others compute it, on the masks of a pack: public code, and assemblies by hand.

All get their inputs laid out and on the device before the clock starts, the same model body, and the fused
attention of torch with a mask where there is padding. Only their batching and their head differ from ours.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from vrpo.batch import PackedBatch
from vrpo.models import LLaDAForMaskedDiffusion

BETA = 0.2


@dataclass(frozen=True)
class Padded:
    """Some masked copies of a pack as rows of a padded batch (S, longest).

    rows: (N,) positions of the masked tokens among all S * longest; segment_N: the row that each stands in.
    """

    inputs: dict[str, Tensor]
    rows: Tensor
    targets: Tensor
    weight_N: Tensor
    segment_N: Tensor

    @property
    def num_segments(self) -> int:
        return len(self.inputs["input_ids"])


def padded(pack: PackedBatch, segments: Sequence[int], device: str) -> Padded:
    """These segments, padded to the longest of them; without an attention mask if they are equally long."""
    starts, ends = pack.cu_seqlens_S1[:-1].tolist(), pack.cu_seqlens_S1[1:].tolist()
    longest = max(ends[s] - starts[s] for s in segments)
    ids = torch.zeros(len(segments), longest, dtype=torch.int64)
    attend = torch.zeros_like(ids)
    rows, targets, weights, inside = [], [], [], []
    for place, s in enumerate(segments):
        length = ends[s] - starts[s]
        ids[place, :length] = pack.tokens_T[starts[s] : ends[s]]
        attend[place, :length] = 1
        own = slice(int(pack.offsets_S1[s]), int(pack.offsets_S1[s + 1]))
        rows.append(pack.row_N[own] - starts[s] + place * longest)
        targets.append(pack.target_N[own])
        weights.append(pack.weight_N[own])
        inside.append(torch.full_like(rows[-1], place))
    inputs = {"input_ids": ids.to(device)}
    if not attend.all():
        inputs["attention_mask"] = attend.to(device)
    joined = (torch.cat(parts).to(device) for parts in (rows, targets, weights, inside))
    return Padded(inputs, *joined)


def elbos(model: LLaDAForMaskedDiffusion, batch: Padded, *, head: str) -> Tensor:
    """elbo_S: sum of weight * log p over the masked tokens of each segment.

    head: "full logits" of all positions, or "masked logits" of the rows asked for.
    """
    if head == "full logits":
        logits_NV = model(**batch.inputs).logits.flatten(0, 1)[batch.rows].float()
    else:
        logits_NV = model.lm_head(last_hidden(model, batch)[batch.rows]).float()
    nll_N = F.cross_entropy(logits_NV, batch.targets, reduction="none")
    # In float64, as ours: sums of thousands of nats in float32 put the gradient off by 3e-4 of its norm.
    weighted_N = (-batch.weight_N * nll_N).double()
    return weighted_N.new_zeros(batch.num_segments).index_add(0, batch.segment_N, weighted_N)


def last_hidden(model: LLaDAForMaskedDiffusion, batch: Padded) -> Tensor:
    """The body's output at all positions, (S * longest, D)."""
    inputs = dict(batch.inputs)
    if (attend := inputs.pop("attention_mask", None)) is not None:
        inputs["attention_mask"] = attend.bool()[:, None, None, :]
    return model.model(**inputs, use_cache=False).last_hidden_state.flatten(0, 1)


def dpo_loss(policy_RK: Tensor, reference_RK: Tensor) -> Tensor:
    """-log sigmoid(beta * (log-ratio of chosen - log-ratio of rejected)), summed over the pairs."""
    ratio_R = policy_RK.mean(1) - reference_RK.mean(1)
    return -F.logsigmoid(BETA * (ratio_R[0::2] - ratio_R[1::2])).sum()
