"""mask_select: checks, backend choice and registration. The formula is in `reference.py`."""

from types import ModuleType

import torch
from torch import Tensor

from vrpo_kernels import checks
from vrpo_kernels.backend import choose
from vrpo_kernels.checks import require_dim, require_int64, require_same

_U32_END = 2**32


def _check(length_S: Tensor, counter_S3: Tensor, first_S: Tensor, count_S: Tensor, seed: int) -> None:
    require_dim("length_S", length_S, "S")
    require_dim("counter_S3", counter_S3, "S", "3")
    require_dim("first_S", first_S, "S")
    require_dim("count_S", count_S, "S")
    require_same("size", "counter_S3's second axis", counter_S3.shape[1], "the counter words", 3)
    require_int64("length_S", length_S)
    for name, tensor in (("counter_S3", counter_S3), ("first_S", first_S), ("count_S", count_S)):
        require_int64(name, tensor)
        require_same("size S", name, tensor.shape[0], "length_S", length_S.shape[0])
        require_same("device", name, tensor.device, "length_S", length_S.device)
    checks.require_seed(seed)


def _check_values(
    length_S: Tensor, counter_S3: Tensor, first_S: Tensor, count_S: Tensor, by_rank: bool
) -> None:
    def need(good: Tensor, name: str, value: Tensor, wanted: str) -> None:
        if not bool(good.all()):
            segment = int((~good).flatten().nonzero()[0, 0])
            raise ValueError(f"{name} must be {wanted}, got {value.flatten()[segment].item()}")

    need((length_S >= 1) & (length_S < 2**31), "length_S", length_S, "in [1, 2**31)")
    need((counter_S3 >= 0) & (counter_S3 < _U32_END), "counter_S3", counter_S3, "in [0, 2**32)")
    need((first_S >= 0) & (first_S <= _U32_END), "first_S", first_S, "in [0, 2**32]")
    limit_S = length_S if by_rank else torch.full_like(length_S, _U32_END)
    wanted = "in [0, length_S]" if by_rank else "in [0, 2**32]"
    need((count_S >= 0) & (count_S <= limit_S), "count_S", count_S, wanted)


def _backend(name: str) -> ModuleType:
    if name == "triton":
        from vrpo_kernels.mask_select import kernel as module
    elif name == "cpu":
        from vrpo_kernels.mask_select import cpu as module
    else:
        from vrpo_kernels.mask_select import reference as module
    return module


# Opaque to torch.compile: the checks of values and the choice of backend run inside it.
@torch.library.custom_op("vrpo_kernels::mask_select", mutates_args=())
def _mask_select(
    length_S: Tensor,
    counter_S3: Tensor,
    first_S: Tensor,
    count_S: Tensor,
    key: int,
    by_rank: bool,
    num_rows: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    if checks.values_are_checked(length_S.device):
        _check_values(length_S, counter_S3, first_S, count_S, by_rank)
    name = choose("mask_select", device=length_S.device.type, dtype=None, requested=backend)
    position_N, offsets_S1 = _backend(name).mask_select(
        length_S, counter_S3, first_S, count_S, key % 2**64, by_rank, num_rows
    )
    if num_rows is not None and position_N.shape[0] != num_rows:
        raise ValueError(f"num_rows must be the total of masked rows, {position_N.shape[0]}, got {num_rows}")
    return position_N, offsets_S1


@_mask_select.register_fake
def _(length_S, counter_S3, first_S, count_S, key, by_rank, num_rows, backend):
    # Without num_rows the number of rows depends on the data: an unbacked size under torch.compile.
    if num_rows is None:
        num_rows = torch.library.get_ctx().new_dynamic_size()
    return length_S.new_empty(num_rows), length_S.new_empty(length_S.shape[0] + 1)


def mask_select(
    length_S: Tensor,
    counter_S3: Tensor,
    first_S: Tensor,
    count_S: Tensor,
    *,
    seed: int,
    by_rank: bool,
    num_rows: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Masked positions of every segment, a pure function of integers.

        word_p = lane p & 3 of philox4x32(seed, p >> 2, *counter_S3[s])    (unsigned 32 bits)
        by_rank:  rank_p = rank of (word_p, p), ascending, among the segment's L_s positions
                  p masked iff (rank_p - first_s) mod L_s < count_s      exactly count_s of them
        else:     p masked iff (word_p - first_s) mod 2**32 < count_s    chance count_s / 2**32

    By rank with first_s = 0 the count_s smallest words are masked: a uniform subset of that size.
    Windows [first, first + count) that tile the circle give complementary or tiled subsets of one
    permutation; segments with equal counters see the same words.

    Args:
        length_S: (S,) int64, maskable positions of each segment, in [1, 2**31).
        counter_S3: (S, 3) int64, Philox counter words c1, c2, c3 of each segment, in [0, 2**32).
        first_S: (S,) int64, start of the window in ranks or words, in [0, 2**32].
        count_S: (S,) int64, width of the window: in [0, length] by rank, in [0, 2**32] else.
        seed: Philox key, in [0, 2**64).
        by_rank: exact counts (True) or Bernoulli (False).
        num_rows: total of masked rows when the caller knows it (sum of count_S by rank). On a
            device it spares the synchronisation that finds the size of the output.
        backend: "auto", "triton", "cpu" or "reference". All give the same bits.
    Returns:
        position_N: (N,) int64, masked positions within their segment, ascending in each segment.
        offsets_S1: (S + 1,) int64, rows of segment s are offsets_S1[s] : offsets_S1[s + 1].
    Errors:
        ValueError naming the argument, what it got and what it needs. Values (not shapes) are
        checked for CPU tensors, where reading them does not synchronise, and elsewhere after
        `vrpo_kernels.set_debug(True)`; without it bad values give other positions, or -1.
    """
    _check(length_S, counter_S3, first_S, count_S, seed)
    key = seed - 2**64 if seed >= 2**63 else seed  # operator schemas have signed integers only
    return _mask_select(length_S, counter_S3, first_S, count_S, key, by_rank, num_rows, backend)
