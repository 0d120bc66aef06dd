"""Functions that Triton's kernels share."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least fp32 number: the maximum of nothing


@triton.jit
def _exp_parts(x):
    """(t, 2^n) with exp(x) = (1 + t) 2^n, t within 2^-25; 2^n is 0 for x < -87.7, infinite for x > 88.3."""
    # |r| <= ln 2 / 2; n * _LN2_HIGH is exact for |n| < 2^15 (9 bits of mantissa).
    x = tl.where(x < -150.0, -150.0, tl.where(x > 150.0, 150.0, x))  # as good as infinite; NaN stays
    n = tl.floor(x * _LOG2_E + 0.5)
    r = (x - n * _LN2_HIGH) - n * _LN2_LOW
    p = 1.0 / 720.0 + r * (1.0 / 5040.0)
    p = 1.0 / 24.0 + r * (1.0 / 120.0 + r * p)
    t = r + r * r * (0.5 + r * (1.0 / 6.0 + r * p))
    power = tl.maximum(n, -127.0).to(tl.int32) + 127  # biased; 0 without a mantissa is 0.0
    return t, (tl.minimum(power, 255) << 23).to(tl.float32, bitcast=True)


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """exp(x); EXACT, for fp32 results: within 1.5 roundings for -87.3 < x < 88.3; 0 below, infinite above.

    Triton's own is ex2.approx(x * log2 e): two ulp, and |x| / 2 more from rounding the product. Below the
    rounding of a 16-bit result that is nothing; fp32 gradients came out at 1.1 times what the policy allows.
    """
    if EXACT:
        t, power = _exp_parts(x)
        result = (1.0 + t) * power
    else:
        result = tl.exp(x)
    return result


@triton.jit
def scaled_exp(x, scale):
    """scale * exp(x) in fp32 for a scalar in fp64: within 1.5 roundings, where two products make three."""
    t, power = _exp_parts(x)
    high = scale.to(tl.float32)
    low = (scale - high.to(tl.float64)).to(tl.float32)
    one_plus = 1.0 + t
    lost = t - (one_plus - 1.0)  # exact: what the sum dropped
    return tl.fma(one_plus, high + tl.zeros_like(t), high * lost + low * one_plus) * power


@triton.jit
def sum_lanes(lanes, EXACT: tl.constexpr):
    """Sum of a block of fp32 numbers; EXACT, for fp32 results: added in fp64, rounded once."""
    if EXACT:  # noqa: SIM108 - only a statement leaves the other side out of the compilation
        total = tl.sum(lanes.to(tl.float64), axis=0).to(tl.float32)
    else:
        total = tl.sum(lanes, axis=0)
    return total


@triton.jit
def as_reference(maximum):
    """The least multiple of ln 2 above a maximum, which serves as m.

    Factors between two of them are powers of two, so that correcting a 16-bit E does not round it again.
    """
    return tl.where(maximum > _LOWEST, tl.ceil(maximum * _LOG2_E) * _LN2, _LOWEST)


@triton.jit
def is_class(target, V):
    """False for op.ABSENT, and for a target out of range, which makes NaN of its row."""
    return (target >= 0) & (target < V)


@triton.jit
def log_odds_of(target_logit, max_n, sum_n):
    """d = log(sum over v != y of exp(z_v)) - z_y. The difference first: m and z_y may be large."""
    return (max_n - target_logit) + tl.log(sum_n)
