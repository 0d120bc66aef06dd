"""The gradient of one micro-batch, as shares that are added up: one graph, or a replay pack by pack.

The loss depends on the model only through the ELBOs of the samples, so by the chain rule

    grad loss = sum over segments s of c_s * grad elbo_s,    c_s = d loss / d elbo_s

`JointStep` keeps the graph of all samples until the loss is known. `ReplayStep` first runs all packs without
a graph, takes the numbers c_s from the loss, and runs the same packs again, each with backward: the memory is
that of one pack whatever the number of samples, the gradient is the same (the two-pass form of the gradient
in arXiv 2505.19223 section 4), and it costs one more forward pass of the policy. A loss that is linear in the
ELBOs has its c_s from the start: `LinearStep` needs no first pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from vrpo.batch import PackedBatch
from vrpo.estimator.elbo import elbo, segment_elbo
from vrpo.step import NLL, Objective


class TwoPassNLL(Protocol):
    """A model that can be asked twice for the NLLs of a pack, (N,) float32 in nats."""

    def __call__(self, pack: PackedBatch) -> Tensor:
        """nll_N, in one pass."""

    def first(self, pack: PackedBatch) -> tuple[Tensor, Tensor]:
        """(nll_N, statistics) without gradient; the statistics are for `again`."""

    def again(self, pack: PackedBatch, nll_N: Tensor, statistics: Tensor) -> tuple[Tensor, Tensor]:
        """(the same nll_N with gradient, drift): how far the model has moved from its first pass, 0-dim."""


@dataclass(frozen=True)
class Parts:
    """What a step is made of.

    reference: None where the objective needs none, or its ELBOs are known.
    prepare: brings a pack from the CPU to the device.
    reference_RK: the reference's ELBOs, where they are known.
    """

    policy: TwoPassNLL
    reference: NLL | None
    objective: Objective
    prepare: Callable[[PackedBatch], PackedBatch]
    reference_RK: Tensor | None = None

    @property
    def runs_reference(self) -> bool:
        return self.reference is not None and self.reference_RK is None

    def known_reference(self, device: torch.device) -> Tensor | None:
        return None if self.reference_RK is None else self.reference_RK.to(device)


@dataclass(frozen=True)
class StepResult:
    """What a micro-batch gave, detached: loss_B (B,), ELBOs (R, K) in nats, sums over the response.

    reference_RK: None if the objective needs no reference.
    num_tokens: of the packs, each counted once.
    drift: 0-dim; how much a target's logit differed between the two passes at most. None without a replay.
        Anything but 0 means that a pass is not deterministic, and the gradient that of other values.
    """

    loss_B: Tensor
    policy_RK: Tensor
    reference_RK: Tensor | None
    replicate_K: tuple[int, ...]
    num_tokens: int
    drift: Tensor | None = None


class JointStep:
    """One pack, one graph, one share: the sum of the losses. `result` is there after it."""

    num_shares = 1
    result: StepResult

    def __init__(self, parts: Parts, pack: PackedBatch):
        self.parts, self.packs = parts, [pack]

    def losses(self) -> Tensor:
        """loss_B (B,), with its graph."""
        parts, pack = self.parts, self.parts.prepare(self.packs[0])
        reference_RK = parts.known_reference(pack.tokens_T.device)
        if parts.runs_reference:
            with torch.no_grad():
                reference_RK = elbo(parts.reference(pack), pack)
        policy_RK = elbo(parts.policy(pack), pack)
        loss_B = parts.objective(policy_RK, reference_RK)
        self.result = _result(self.packs, loss_B, policy_RK, reference_RK)
        return loss_B

    def share(self, index: int) -> Tensor:
        return self.losses().sum()


class ReplayStep:
    """Several packs of whole segments that together are whole responses; as many shares as packs.

    Args:
        packs: in order, on the CPU.
        num_shares: at least len(packs). Further shares run the last pack again and are 0: processes that
            shard a model must make the same number of passes.
    """

    result: StepResult

    def __init__(self, parts: Parts, packs: Sequence[PackedBatch], *, num_shares: int = 0):
        self.parts, self.packs = parts, packs
        self.num_shares = max(num_shares, len(packs))
        self._known: list[tuple[Tensor, Tensor]] = []
        self._coefficients: tuple[Tensor, ...] = ()

    def share(self, index: int) -> Tensor:
        """c_s * elbo_s, summed over the segments of one pack. Call them in order."""
        if index == 0:
            self._coefficients = self._start().split([pack.num_segments for pack in self.packs])
        place = min(index, len(self.packs) - 1)
        pack = self.parts.prepare(self.packs[place])
        elbo_S = segment_elbo(self._nll(pack, place), pack)
        if index > place:
            return 0.0 * elbo_S.sum()
        return (self._coefficients[place].to(elbo_S.dtype) * elbo_S).sum()

    def _start(self) -> Tensor:
        """The first pass: the result, and coefficient_S."""

        def first(pack: PackedBatch) -> Tensor:
            self._known.append(self.parts.policy.first(pack))
            return self._known[-1][0]

        policy_RK, reference_RK = _elbos(self.parts, self.packs, self.num_shares, first)
        loss_B, coefficient_RK = _derivative(self.parts.objective, policy_RK, reference_RK)
        self.result = _result(self.packs, loss_B, policy_RK, reference_RK)
        return coefficient_RK.flatten()

    def _nll(self, pack: PackedBatch, place: int) -> Tensor:
        nll_N, drift = self.parts.policy.again(pack, *self._known[place])
        before = self.result.drift
        self.result = replace(self.result, drift=drift if before is None else torch.maximum(before, drift))
        return nll_N


class LinearStep(ReplayStep):
    """The same for an objective that is linear in the policy's ELBOs and needs no reference: one pass.

    `result` is there after the last share.
    """

    def __init__(self, parts: Parts, packs: Sequence[PackedBatch], *, num_shares: int = 0):
        super().__init__(parts, packs, num_shares=num_shares)
        self._elbos: list[Tensor] = []

    def share(self, index: int) -> Tensor:
        share = super().share(index)
        if index == self.num_shares - 1:
            policy_RK = torch.cat(self._elbos).view(-1, self.packs[0].num_samples)
            loss_B = self.parts.objective(policy_RK, None)
            self.result = _result(self.packs, loss_B, policy_RK, None)
        return share

    def _start(self) -> Tensor:
        # The derivative of a linear function is the same everywhere, at 0 too.
        first = self.parts.prepare(self.packs[0].segments(0, 1))
        num_segments = sum(pack.num_segments for pack in self.packs)
        zeros_RK = first.weight_N.new_zeros(num_segments, dtype=torch.float64).view(-1, first.num_samples)
        return _derivative(self.parts.objective, zeros_RK, None)[1].flatten()

    def _nll(self, pack: PackedBatch, place: int) -> Tensor:
        nll_N = self.parts.policy(pack)
        if len(self._elbos) == place:
            self._elbos.append(segment_elbo(nll_N.detach(), pack))
        return nll_N


def evaluate(parts: Parts, packs: Sequence[PackedBatch], *, num_passes: int = 0) -> StepResult:
    """A micro-batch in one or several packs, without gradient; num_passes as num_shares of `ReplayStep`."""
    policy_RK, reference_RK = _elbos(parts, packs, num_passes, parts.policy)
    with torch.no_grad():
        return _result(packs, parts.objective(policy_RK, reference_RK), policy_RK, reference_RK)


@torch.no_grad()
def _elbos(
    parts: Parts, packs: Sequence[PackedBatch], num_passes: int, policy: NLL
) -> tuple[Tensor, Tensor | None]:
    """(policy_RK, reference_RK) of the responses that the packs hold, pack by pack."""
    policy_S, reference_S = [], []
    for index in range(max(num_passes, len(packs))):
        pack = parts.prepare(packs[min(index, len(packs) - 1)])
        if parts.runs_reference:
            reference_S.append(segment_elbo(parts.reference(pack), pack))
        policy_S.append(segment_elbo(policy(pack), pack))

    def joined(elbos: list[Tensor]) -> Tensor:
        return torch.cat(elbos[: len(packs)]).view(-1, packs[0].num_samples)

    known_RK = parts.known_reference(policy_S[0].device)
    return joined(policy_S), joined(reference_S) if parts.runs_reference else known_RK


def _derivative(
    objective: Objective, policy_RK: Tensor, reference_RK: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(loss_B, d sum(loss_B) / d policy_RK)."""
    with torch.enable_grad():
        leaf_RK = policy_RK.clone().requires_grad_()
        loss_B = objective(leaf_RK, reference_RK)
        (coefficient_RK,) = torch.autograd.grad(loss_B.sum(), leaf_RK)
    return loss_B.detach(), coefficient_RK


def _result(
    packs: Sequence[PackedBatch], loss_B: Tensor, policy_RK: Tensor, reference_RK: Tensor | None
) -> StepResult:
    num_tokens = sum(len(pack.tokens_T) for pack in packs)
    return StepResult(loss_B.detach(), policy_RK.detach(), reference_RK, packs[0].replicate_K, num_tokens)
