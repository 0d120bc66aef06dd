"""Mask draws: which tokens of which sample are masked, and what each masked row weighs.

A draw is made once, from integers (Philox4x32-10), and handed to the policy and to the reference; nothing
downstream draws random numbers or compares a token with the mask id. It is a pure function of
(seed, epoch, example, side, sample, position): batch order, micro-batches, world size and resume do not
appear in it. The designs themselves are in designs.py.
"""

from dataclasses import replace

import torch
from torch import Tensor

from vrpo.batch import MaskDraw, ResponseBatch
from vrpo.estimator.designs import DESIGNS, Design
from vrpo.estimator.levels import PURPOSE_POSITIONS, WORD, Levels, Uniform, stream_counter
from vrpo_kernels import mask_select

EVALUATION_EPOCH = 2**32 - 1
"""The epoch of evaluation draws: the same masks each time, and never those of training."""

_MAX_STREAM = 2**24
_CELLS_AT_ONCE = 2**22


def _repeat_levels(levels: Levels, masks_per_level: int) -> Levels:
    """n_t levels with n_yt fresh masks each: the allocation n_t x n_yt of arXiv 2505.19223 Eq. (5)."""
    repeated = [
        tensor.repeat_interleave(masks_per_level, dim=1)
        for tensor in (levels.first_RK, levels.count_RK, levels.weight_RK)
    ]
    num_responses, num_levels = levels.count_RK.shape
    return Levels(
        torch.arange(num_levels * masks_per_level).expand(num_responses, -1),
        *repeated,
        replicate_K=tuple(j for j in levels.replicate_K for _ in range(masks_per_level)),
        by_rank=levels.by_rank,
    )


PAIR_MASKS = ("independent", "levels", "positions")


def check_design(
    design: str,
    num_samples: int,
    masks_per_level: int,
    num_replicates: int = 1,
    pair_masks: str = "independent",
) -> None:
    """ValueError unless (design, K, n_yt, replicates, coupling of the sides) can be drawn."""
    if design not in DESIGNS:
        raise ValueError(f"mask_design must be one of {sorted(DESIGNS)}, got {design!r}")
    if not 1 <= num_samples < _MAX_STREAM:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if masks_per_level < 1 or num_samples % masks_per_level:
        raise ValueError(f"masks_per_level must divide num_samples = {num_samples}, got {masks_per_level}")
    if masks_per_level > 1 and not DESIGNS[design].iid:
        raise ValueError(f"masks_per_level = {masks_per_level} needs an iid mask_design, got {design!r}")
    num_levels = num_samples // masks_per_level
    if num_replicates < 1 or num_levels % num_replicates:
        raise ValueError(
            f"num_replicates must divide the number of levels, num_samples / masks_per_level = {num_levels}, "
            f"got {num_replicates}"
        )
    if pair_masks not in PAIR_MASKS:
        raise ValueError(f"pair_masks must be one of {PAIR_MASKS}, got {pair_masks!r}")


def default_replicates(design: str, num_samples: int) -> int:
    """2 where a design without independent samples of its own can spare them, so that noise is measured."""
    dependent = design in DESIGNS and DESIGNS[design].samples_per_replicate is None
    return 2 if dependent and num_samples >= 8 and num_samples % 2 == 0 else 1


def has_replicates(design: str, num_levels: int, num_replicates: int) -> bool:
    """True if a draw consists of two or more independent, identically distributed parts."""
    size = DESIGNS[design].samples_per_replicate
    own = size is not None and num_levels >= 2 * size and num_levels % size == 0
    return num_replicates > 1 or own


def independent_replicates(design: str, num_samples: int, num_replicates: int) -> tuple[int, ...]:
    """replicate_K of a draw with one mask per level: the finest parts that are independent, alike and equal.

    Strata are no such parts, although MaskDraw counts them as replicates: those of a score differ little, but
    those of one model's ELBO differ by what a level is worth, many times the noise of their mean.
    """
    per_replicate = num_samples // num_replicates
    size = DESIGNS[design].samples_per_replicate
    if size is None or per_replicate % size:
        size = per_replicate
    return tuple(k // size for k in range(num_samples))


def check_replicates(loss_type: str, design: str, num_levels: int, num_replicates: int = 1) -> None:
    """ValueError unless the draw has the independent replicates that the loss needs."""
    if has_replicates(design, num_levels, num_replicates):
        return
    per_replicate = DESIGNS[design].samples_per_replicate
    if per_replicate is None:
        able = sorted(name for name, known in DESIGNS.items() if known.samples_per_replicate)
        raise ValueError(
            f"loss_type={loss_type!r} needs num_replicates of 2 or more, or a mask_design with "
            f"independent samples, one of {able}, got {design!r}"
        )
    raise ValueError(
        f"loss_type={loss_type!r} needs at least 2 whole replicates of {per_replicate} levels of "
        f"{design!r}, got {num_levels} levels"
    )


def _concatenate(parts: list[Levels], design: Design) -> Levels:
    """Independent repetitions of a design as one; their random words are kept apart by their streams."""
    size = parts[0].count_RK.shape[1]
    if design.samples_per_replicate is None:
        replicate_K = [g for g in range(len(parts)) for _ in range(size)]
    else:
        each = max(parts[0].replicate_K) + 1
        replicate_K = [g * each + j for g, part in enumerate(parts) for j in part.replicate_K]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts], dim=1)

    return Levels(
        stream_RK=torch.cat([part.stream_RK + g * (size + 1) for g, part in enumerate(parts)], dim=1),
        first_RK=joined("first_RK"),
        count_RK=joined("count_RK"),
        weight_RK=joined("weight_RK"),
        replicate_K=tuple(replicate_K),
        by_rank=parts[0].by_rank,
    )


def draw(
    batch: ResponseBatch,
    *,
    design: str = "paper",
    num_samples: int = 8,
    masks_per_level: int = 1,
    num_replicates: int = 1,
    pair_masks: str = "independent",
    seed: int,
    epoch: int,
) -> MaskDraw:
    """Draw the masks of every response of the batch: K samples each, levels first, then positions.

    Args:
        batch: only its lengths and identities are read, never a token.
        design: a key of DESIGNS.
        num_samples: K = n_t * n_yt, at least 1.
        masks_per_level: n_yt, masks drawn at each level; divides num_samples; iid designs only.
        num_replicates: independent repetitions of the design that share the K samples. With 2 or more every
            design tells its own noise (MaskDraw.replicate_K); each has fewer samples to balance.
        pair_masks: what the two responses of a pair have in common. "independent": nothing, as in the
            paper. "levels": the levels, as fractions of their lengths. "positions": levels and random words,
            so that token i is masked in both or in neither, up to the difference of their lengths: what they
            share from the start meets the same masks. Each response alone has the same law in all three, so
            a score, the difference of two expectations, stays unbiased if it was; its variance loses twice
            the covariance of the two sides.
        seed: 64-bit key. epoch: in [0, 2**32), EVALUATION_EPOCH for evaluation.
    Returns: a MaskDraw on the CPU. The same object must go to the policy and to the reference.
    Errors: ValueError naming the argument.
    """
    check_design(design, num_samples, masks_per_level, num_replicates, pair_masks)
    if not 0 <= epoch < WORD:
        raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
    common_R = torch.zeros_like(batch.side_R)
    side_R = batch.side_R if pair_masks == "independent" else common_R
    known, num_levels = DESIGNS[design], num_samples // masks_per_level // num_replicates
    parts = []
    for first_index in range(0, num_replicates * (num_levels + 1), num_levels + 1):
        uniform = Uniform(seed, epoch, batch.example_R, side_R, first_index)
        parts.append(known.levels(uniform, batch.response_length_R, num_levels))
    levels = parts[0] if num_replicates == 1 else _concatenate(parts, known)
    if masks_per_level > 1:
        levels = _repeat_levels(levels, masks_per_level)
    words_R = common_R if pair_masks == "positions" else batch.side_R
    drawn = select(levels, batch, words_R, num_samples=num_samples, seed=seed, epoch=epoch)
    if known.row_weights is None or num_levels == 1:
        return drawn
    # Replicates are re-weighted apart, as if each were a response of its own. Inside one, the new weights of
    # a sample depend on the masks of the others: no two samples are independent any more.
    apart = replace(drawn, num_samples=num_levels, replicate_K=parts[0].replicate_K)
    return replace(
        drawn,
        weight_N=known.row_weights(apart, batch.response_length_R.repeat_interleave(num_replicates)),
        replicate_K=tuple(g for g in range(num_replicates) for _ in range(num_levels)),
    )


def masked_share(design: str, num_samples: int, num_replicates: int = 1, *, length: int = 1024) -> float:
    """Mean share of a response's tokens that a sample masks, over 4096 draws of levels: rows for the head.

    About 1/2 for uniform levels and for couples; less where small levels come more often.
    """
    total = 0.0
    # A few draws at a time: some designs hold a table over the levels of every one.
    for response_R in torch.arange(4096).split(max(1, _CELLS_AT_ONCE // max(length, num_samples))):
        length_R = torch.full_like(response_R, length)
        uniform = Uniform(0, 0, response_R, torch.zeros_like(response_R))
        levels = DESIGNS[design].levels(uniform, length_R, num_samples // num_replicates)
        share_R = levels.count_RK.double().mean(1) / (length if levels.by_rank else WORD)
        total += float(share_R.sum())
    return total / 4096


def select(
    levels: Levels, batch: ResponseBatch, words_R: Tensor, *, num_samples: int, seed: int, epoch: int
) -> MaskDraw:
    """Turn levels into positions and row weights. Responses with equal words_R read the same random words."""
    counter_RK = stream_counter(PURPOSE_POSITIONS, words_R[:, None], levels.stream_RK)
    example_RK = batch.example_R[:, None].expand_as(counter_RK)
    epoch_RK = torch.full_like(counter_RK, epoch)
    counter_S3 = torch.stack([counter_RK, example_RK, epoch_RK], dim=-1).reshape(-1, 3)
    position_N, offsets_S1 = mask_select(
        batch.response_length_R.repeat_interleave(num_samples),
        counter_S3,
        levels.first_RK.reshape(-1),
        levels.count_RK.reshape(-1),
        seed=seed,
        by_rank=levels.by_rank,
    )
    weight_S = levels.weight_RK.reshape(-1)
    return MaskDraw(
        position_N=position_N,
        weight_N=weight_S.repeat_interleave(offsets_S1.diff()).float(),
        offsets_S1=offsets_S1,
        num_samples=num_samples,
        replicate_K=levels.replicate_K,
    )
