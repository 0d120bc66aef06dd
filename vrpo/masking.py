"""Mask draws: which tokens of which sample are masked, and what each masked row weighs.

A draw is made once, from integers (Philox4x32-10), and handed to the policy and to the reference; nothing
downstream draws random numbers or compares a token with the mask id. It is a pure function of
(seed, epoch, example, side, sample, position): batch order, micro-batches, world size and resume do not
appear in it. The designs themselves are in designs.py.
"""

from dataclasses import replace

import torch

from vrpo.batch import MaskDraw, ResponseBatch
from vrpo.designs import DESIGNS
from vrpo.levels import PURPOSE_POSITIONS, WORD, Levels, Uniform, stream_counter
from vrpo_kernels import mask_select

EVALUATION_EPOCH = 2**32 - 1
"""The epoch of evaluation draws: the same masks each time, and never those of training."""

_MAX_STREAM = 2**24


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


def check_design(design: str, num_samples: int, masks_per_level: int) -> None:
    """ValueError unless (design, K, n_yt) can be drawn."""
    if design not in DESIGNS:
        raise ValueError(f"mask_design must be one of {sorted(DESIGNS)}, got {design!r}")
    if not 1 <= num_samples < _MAX_STREAM:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if masks_per_level < 1 or num_samples % masks_per_level:
        raise ValueError(f"masks_per_level must divide num_samples = {num_samples}, got {masks_per_level}")
    if masks_per_level > 1 and not DESIGNS[design].iid:
        raise ValueError(f"masks_per_level = {masks_per_level} needs an iid mask_design, got {design!r}")


def check_loss(loss_type: str, design: str, num_levels: int) -> None:
    """ValueError unless the loss exists and the design's samples allow it."""
    if loss_type not in ("sigmoid", "sigmoid_jackknife"):
        raise ValueError(f"loss_type must be 'sigmoid' or 'sigmoid_jackknife', got {loss_type!r}")
    if loss_type == "sigmoid":
        return
    per_replicate = DESIGNS[design].samples_per_replicate
    if per_replicate is None:
        able = sorted(name for name, known in DESIGNS.items() if known.samples_per_replicate)
        raise ValueError(
            f"loss_type='sigmoid_jackknife' needs a mask_design with independent samples, one of {able}, got "
            f"{design!r}"
        )
    if num_levels < 2 * per_replicate or num_levels % per_replicate:
        raise ValueError(
            f"loss_type='sigmoid_jackknife' needs at least 2 whole replicates of {per_replicate} levels of "
            f"{design!r}, got {num_levels} levels"
        )


def draw(
    batch: ResponseBatch,
    *,
    design: str = "paper",
    num_samples: int = 8,
    masks_per_level: int = 1,
    share_levels: bool = False,
    seed: int,
    epoch: int,
) -> MaskDraw:
    """Draw the masks of every response of the batch: K samples each, levels first, then positions.

    Args:
        batch: only its lengths and identities are read, never a token.
        design: a key of DESIGNS.
        num_samples: K = n_t * n_yt, at least 1.
        masks_per_level: n_yt, masks drawn at each level; divides num_samples; iid designs only.
        share_levels: the two sides of a pair get the same levels, as fractions of their lengths.
        seed: 64-bit key. epoch: in [0, 2**32), EVALUATION_EPOCH for evaluation.
    Returns: a MaskDraw on the CPU. The same object must go to the policy and to the reference.
    Errors: ValueError naming the argument.
    """
    check_design(design, num_samples, masks_per_level)
    if not 0 <= epoch < WORD:
        raise ValueError(f"epoch must be in [0, 2**32), got {epoch}")
    side_R = torch.zeros_like(batch.side_R) if share_levels else batch.side_R
    uniform = Uniform(seed, epoch, batch.example_R, side_R)
    levels = DESIGNS[design].levels(uniform, batch.response_length_R, num_samples // masks_per_level)
    if masks_per_level > 1:
        levels = _repeat_levels(levels, masks_per_level)
    drawn = select(levels, batch, num_samples=num_samples, seed=seed, epoch=epoch)
    reweight = DESIGNS[design].row_weights
    if reweight is None or num_samples == 1:
        return drawn
    # The new weights of a sample depend on the masks of the others: no two are independent any more.
    return replace(
        drawn,
        weight_N=reweight(drawn, batch.response_length_R),
        replicate_K=(0,) * num_samples,
    )


def select(levels: Levels, batch: ResponseBatch, *, num_samples: int, seed: int, epoch: int) -> MaskDraw:
    """Turn levels into positions and row weights."""
    counter_RK = stream_counter(PURPOSE_POSITIONS, batch.side_R[:, None], levels.stream_RK)
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
