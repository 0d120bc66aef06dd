"""Functions that Triton's kernels share."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least fp32 number: the maximum of nothing


@triton.jit
def exp(x, EXACT: tl.constexpr):
    """exp(x); EXACT, for fp32 results: within 1.5 roundings for -87.3 < x < 88.3; 0 below, infinite above.

    Triton's own is ex2.approx(x * log2 e): two ulp, and |x| / 2 more from rounding the product. Below the
    rounding of a 16-bit result that is nothing; fp32 gradients came out at 1.1 times what the policy allows.
    """
    if EXACT:
        # exp(x) = 2^n exp(r), |r| <= ln 2 / 2; n * _LN2_HIGH is exact for |n| < 2^15 (9 bits of mantissa).
        x = tl.where(x < -150.0, -150.0, tl.where(x > 150.0, 150.0, x))  # as good as infinite; NaN stays
        n = tl.floor(x * _LOG2_E + 0.5)
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        p = 1.0 / 720.0 + r * (1.0 / 5040.0)
        p = 1.0 / 24.0 + r * (1.0 / 120.0 + r * p)
        p = 1.0 + (r + r * r * (0.5 + r * (1.0 / 6.0 + r * p)))
        power = tl.maximum(n, -127.0).to(tl.int32) + 127  # of two, biased; 0 and its mantissa are 0.0
        result = p * (tl.minimum(power, 255) << 23).to(tl.float32, bitcast=True)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def as_reference(maximum):
    """The least multiple of ln 2 above a maximum, which serves as m.

    Factors between two of them are powers of two, so that correcting a stored E does not round it again.
    """
    return tl.where(maximum > _LOWEST, tl.ceil(maximum * _LOG2_E) * _LN2, _LOWEST)
