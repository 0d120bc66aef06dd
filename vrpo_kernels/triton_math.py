"""Functions that Triton's kernels share."""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_LN2_HIGH = tl.constexpr(0.693359375)
_LN2_LOW = tl.constexpr(-2.12194440054690583e-4)
_LOWEST = tl.constexpr(-3.4028234663852886e38)  # the least fp32 number: the maximum of nothing

# tanh(x) = x + x^3 (_TANH_1 + x^2 (_TANH_3 + x^2 _TANH_5)) within 2^-24 of itself for |x| < _TANH_SMALL.
_TANH_SMALL = tl.constexpr(0.35)
_TANH_1 = tl.constexpr(-0.33332652)
_TANH_3 = tl.constexpr(0.13299560)
_TANH_5 = tl.constexpr(-0.04913432)
_SIGN = tl.constexpr(-(2**31))
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


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
def reciprocal(x):
    """1 / x within an ulp for fp32 x, 1 / x no denormal; one instruction, where division takes eight."""
    if _INTERPRETED:
        result = 1.0 / x
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def cap(u, softcap, EXACT: tl.constexpr):
    """(logit, slope) = (softcap * tanh(u / softcap), its derivative 1 - tanh^2), together.

    With t = exp(-2 |u| / softcap), tanh = (1 - t) / (1 + t), and the derivative is 4 t / (1 + t)^2, which
    does not cancel where the cap saturates. u in fp64, or in fp32: if EXACT (for fp32 results), the logit is
    within 4.5 roundings, else within 8, in fewer instructions. -inf gives (-softcap, 0), as the formula does.
    """
    if u.dtype == tl.float64:
        x = tl.abs(u) / softcap
        t = tl.exp(-2.0 * x)
        tanh = tl.where(x < 1e-4, x - x * x * x / 3.0, (1.0 - t) / (1.0 + t))  # 1 - t cancels for small x
        slope = 4.0 * t / ((1.0 + t) * (1.0 + t))
        logit = tl.where(u < 0.0, -softcap * tanh, softcap * tanh)
    elif EXACT:
        gap, power = _exp_parts(-2.0 * tl.abs(tl.div_rn(u, softcap + tl.zeros_like(u))))
        one_plus = 1.0 + (1.0 + gap) * power
        tanh = tl.div_rn((1.0 - power) - gap * power, one_plus)  # expm1: no cancellation for small u
        slope = tl.div_rn(4.0 * ((1.0 + gap) * power), one_plus * one_plus)
        logit = tl.where(u < 0.0, -softcap * tanh, softcap * tanh)
    else:
        x = u * (1.0 / softcap)
        t = tl.exp2(tl.abs(x) * (-2.0 * _LOG2_E))
        twice = reciprocal(
            0.5 + 0.5 * t
        )  # tanh = twice - 1 cancels for small x, where a polynomial takes over
        slope = t * twice * twice
        square = x * x
        p = tl.fma(tl.fma(square, _TANH_5, _TANH_3), square, _TANH_1) * square
        sign = u.to(tl.int32, bitcast=True) & _SIGN
        large = ((softcap * (twice - 1.0)).to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
        logit = tl.where(tl.abs(x) < _TANH_SMALL, tl.fma(u, p, u), large)
    return logit, slope


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
