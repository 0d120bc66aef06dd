"""The pipeline, read first: everything between a batch of pairs and a loss, in order.

    pairs -> mask draw -> packed batch -> model body -> masked rows -> NLL -> ELBO -> score -> loss

One draw and one pack serve the policy and the reference: the shared masks are the variance reduction of
VRPO (arXiv 2505.19223 section 3.3, there called antithetic). Models come in as callables pack -> nll_N;
this file knows neither optimizer nor logging nor the Hugging Face stack. gradient.py takes the gradient,
from one graph or from several packs.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vrpo.batch import PackedBatch, ResponseBatch
from vrpo.estimator import masking
from vrpo.estimator.elbo import elbo
from vrpo.estimator.packing import pack
from vrpo.estimator.row_weights import desensitised
from vrpo.objectives.pairs import PairObjective

NLL = Callable[[PackedBatch], Tensor]
"""A model as the step sees it: a packed batch in, nll_N (N,) float32 in nats out."""

Objective = Callable[[Tensor, Tensor | None], Tensor]
"""A loss as the step sees it: ELBO estimates (R, K) of policy and reference in nats, None where it needs no
reference; out comes loss_B (B,), differentiable in the policy's."""


@dataclass(frozen=True)
class Estimator:
    """How ELBOs are estimated: the fields of the config that the draw needs."""

    mask_token_id: int
    num_samples: int
    mask_design: str
    masks_per_level: int
    seed: int
    num_replicates: int = 1
    pair_masks: str = "independent"
    ld_alpha: float | None = None

    def pack(self, batch: ResponseBatch, epoch: int, device: torch.device | str) -> PackedBatch:
        """Draw the masks of a batch once and lay out all its masked copies."""
        drawn = masking.draw(
            batch,
            design=self.mask_design,
            num_samples=self.num_samples,
            masks_per_level=self.masks_per_level,
            num_replicates=self.num_replicates,
            pair_masks=self.pair_masks,
            seed=self.seed,
            epoch=epoch,
        )
        if self.ld_alpha is not None:
            drawn = desensitised(drawn, batch, self.ld_alpha)
        return pack(batch, drawn, self.mask_token_id).to(device)


@dataclass(frozen=True)
class PreferenceResult:
    """loss_B carries the gradient; everything else is detached. ELBOs in nats, sums over the response."""

    loss_B: Tensor
    score_B: Tensor
    score_std_B: Tensor
    sft_loss_B: Tensor
    policy_B2: Tensor
    reference_B2: Tensor | None
    num_tokens: int


def preference_step(
    batch: ResponseBatch,
    policy: NLL,
    reference: NLL | None,
    *,
    estimator: Estimator,
    beta: float,
    sft_weight: float,
    epoch: int,
    device: torch.device | str,
    loss_type: str = "sigmoid",
    **options: float,
) -> PreferenceResult:
    """One VRPO step up to the per-pair loss, in one graph; for training loops of one's own.

    loss_type, options: as in PairObjective, which says what the loss is. reference: None if that needs none.
    """
    packed = estimator.pack(batch, epoch, device)
    objective = PairObjective(
        batch.response_length_R,
        packed.replicate_K,
        loss_type=(loss_type,),
        beta=beta,
        sft_weight=sft_weight,
        **options,
    )
    reference_RK = None
    if objective.uses_reference:
        with torch.no_grad():
            reference_RK = elbo(reference(packed), packed)
    policy_RK = elbo(policy(packed), packed)
    loss_B = objective(policy_RK, reference_RK)
    with torch.no_grad():
        score_B = objective.score(policy_RK, reference_RK)
        sft_loss_B = objective.sft_loss(policy_RK)
    noise = objective.noise(policy_RK, reference_RK)
    return PreferenceResult(
        loss_B=loss_B,
        score_B=score_B,
        score_std_B=noise.get("score_std", torch.full_like(score_B, torch.nan)),
        sft_loss_B=sft_loss_B,
        policy_B2=policy_RK.detach().mean(dim=1).view(-1, 2),
        reference_B2=None if reference_RK is None else reference_RK.mean(dim=1).view(-1, 2),
        num_tokens=len(packed.tokens_T),
    )


def split_by_tokens(
    batch: ResponseBatch, num_samples: int, max_tokens: int, at_least: int = 1
) -> Iterator[ResponseBatch]:
    """Cut a batch into micro-batches of whole examples whose packs hold at most max_tokens tokens.

    Greedy and in order; an example that is longer alone is a micro-batch of its own. The loss is a sum over
    examples, so the cut does not change the gradient. `at_least` micro-batches come out where the batch has
    as many examples: ranks that must run the same number of forward passes agree on it beforehand.
    """
    tokens_E = num_samples * batch.length_R.view(-1, batch.num_sides).sum(dim=1)
    for start, stop in _cuts(tokens_E.tolist(), max_tokens, at_least):
        yield batch.examples(start, stop)


def split_segments(packed: PackedBatch, max_tokens: int, at_least: int = 1) -> list[PackedBatch]:
    """Cut a pack, on the CPU, into packs of whole segments with at most max_tokens tokens; as above."""
    tokens_S = packed.cu_seqlens_S1.diff().tolist()
    return [packed.segments(start, stop) for start, stop in _cuts(tokens_S, max_tokens, at_least)]


def num_cuts(batch: ResponseBatch, num_samples: int, max_tokens: int) -> int:
    """How many packs `split_segments` makes of a batch; 1 where all of it fits."""
    tokens_S = batch.length_R.repeat_interleave(num_samples)
    return sum(1 for _ in _cuts(tokens_S.tolist(), max_tokens, 1))


def _cuts(tokens: Sequence[int], max_tokens: int, at_least: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive groups whose sums stay within max_tokens, at least one item each."""
    starts = [0]
    used = 0
    for item, size in enumerate(tokens):
        must_cut = at_least - len(starts) >= len(tokens) - item and item > starts[-1]
        if item > starts[-1] and (used + size > max_tokens or must_cut):
            starts.append(item)
            used = 0
        used += size
    yield from zip(starts, [*starts[1:], len(tokens)], strict=True)
