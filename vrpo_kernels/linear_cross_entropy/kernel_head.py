"""What a head does beyond hidden @ weight^T, and the factors of its rows.

    logit = softcap * tanh(u / softcap), u = scale * (hidden . weight + bias)

Each of the three is a compile-time switch, so that the plain head pays for none of them, and none depends on
which gradients are wanted. Their values are run-time floats: one binary for all soft-caps and scales.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from vrpo_kernels.triton_math import cap, exp, log_odds_of


@dataclass(frozen=True)
class Head:
    """The head of one call.

    Attributes:
        weight: (V, D).
        bias: (V,) in the dtype of weight, or None.
        softcap: 0.0 for none.
        scale: 1.0 for none.
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float = 0.0
    scale: float = 1.0

    @property
    def bias_or_dummy(self) -> Tensor:
        """The bias; without one the weight, whose dtype it would have, and which is then not read."""
        return self.weight if self.bias is None else self.bias

    @property
    def has_cap(self) -> bool:
        """True if the logits are soft-capped."""
        return self.softcap != 0.0

    @property
    def scaled(self) -> bool:
        """True if the scale is one that changes anything."""
        return self.scale != 1.0

    def switches(self) -> dict[str, bool]:
        """The compile-time switches of the kernels that form logits."""
        return {"HAS_BIAS": self.bias is not None, "SCALED": self.scaled, "HAS_CAP": self.has_cap}


@triton.jit
def before_cap(z, bias_ptr, offs, mask, scale, HAS_BIAS: tl.constexpr, SCALED: tl.constexpr):
    """u = scale * (z + bias[offs]) in fp32; offs and mask are z's or broadcast against it."""
    if HAS_BIAS:
        z = z + tl.load(bias_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if SCALED:
        z = z * scale
    return z


@triton.jit
def target_entry(target_logit, softcap, HAS_CAP: tl.constexpr, TILE: tl.constexpr):
    """-slope of the soft-cap at a target: its entry in tiles of dtype TILE, unrounded; -1 without a cap.

    Always exact, and in fp64 for fp32 tiles: an error of a row's target is one of the whole row.
    """
    if HAS_CAP:
        if tl.float32 == TILE:
            target_logit = target_logit.to(tl.float64)
        _, slope = cap(target_logit, softcap, True)
        entry = -slope
    else:
        entry = -1.0
    return entry


@triton.jit
def row_factor(
    statistics_ptr,
    dnll,
    row,
    N,
    softcap,
    scale,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    dtype: tl.constexpr,
):
    """(dnll * q * scale, slope of the soft-cap at the target, s) of one row, q = 1 - p_y.

    From statistics [3, N] = (u_y, m, s). dtype: of the result they enter; for float32 they are fp64, because
    an error of a row's factor is one of all its entries, else fp32.
    """
    target_logit = tl.load(statistics_ptr + row)
    max_n = tl.load(statistics_ptr + N + row)
    sum_n = tl.load(statistics_ptr + 2 * N + row)
    if dtype == tl.float32:
        target_logit, max_n, sum_n = target_logit.to(tl.float64), max_n.to(tl.float64), sum_n.to(tl.float64)
        dnll = dnll.to(tl.float64)
    slope = 1.0
    if HAS_CAP:
        target_logit, slope = cap(target_logit, softcap, True)
    log_odds = log_odds_of(target_logit, max_n, sum_n)
    if dtype == tl.float32:
        small = tl.exp(-tl.abs(log_odds))
        factor = dnll * (tl.where(log_odds >= 0.0, 1.0, small) / (1.0 + small))
    else:
        small = exp(-tl.abs(log_odds), True)
        factor = dnll * tl.div_rn(tl.where(log_odds >= 0.0, 1.0, small), 1.0 + small)
    if SCALED:
        factor = factor * scale
    return factor, slope, sum_n


@triton.jit
def tile_factor(
    statistics_ptr,
    dnll,
    row,
    N,
    softcap,
    scale,
    HAS_CAP: tl.constexpr,
    SCALED: tl.constexpr,
    PER_SUM: tl.constexpr,
    dtype: tl.constexpr,
    TILE: tl.constexpr,
):
    """What a row of a tile is multiplied by in the gradients it enters: dnll * q * scale [/ s].

    TILE: dtype of the tile. Its entry at the target is -slope, or -s * slope if PER_SUM (kept E), rounded to
    that dtype. Dividing by that very number makes the entry's share exact, and costs the others one rounding
    more. Not where the entry has no full mantissa: there the others would pay for bits that it lacks.
    """
    factor, slope, sum_n = row_factor(statistics_ptr, dnll, row, N, softcap, scale, HAS_CAP, SCALED, dtype)
    if HAS_CAP:
        entry = slope
        if PER_SUM:
            entry = sum_n * slope
        rounded = entry.to(tl.float32).to(TILE).to(factor.dtype)
        least: tl.constexpr = 2.0**-14 if tl.float16 == TILE else 2.0**-126
        if PER_SUM:
            divisor = tl.where(rounded >= least, rounded / slope, sum_n)
        else:
            divisor = tl.where(rounded >= least, rounded / slope, 1.0)
        factor = tl.where(divisor == 0.0, 0.0, factor / divisor)  # NaN stays
    elif PER_SUM:
        divisor = sum_n.to(TILE).to(factor.dtype)
        if dtype == tl.float32:
            divisor = sum_n
        factor = tl.where(divisor == 0.0, 0.0, factor / divisor)  # NaN stays
    return factor


def power_of_two(width: int, low: int, high: int) -> int:
    """The least power of two >= width, between low and high."""
    return max(low, min(high, triton.next_power_of_2(width)))


def warps_for(block: int) -> int:
    """Warps that leave each thread 16 fp32 values of a row: 64 registers, 32 warps on an SM."""
    return power_of_two(block // 512, 1, 16)
