// From what the matmul gives, h . w, to the logit of a head with bias, scale and soft-cap:
//   logit = softcap * tanh(u / softcap),   u = scale * (h . w + bias)
#pragma once

#include <cmath>

#include "common.h"

namespace vrpo {

// The number of operations per logit differs, and a plain head pays for nothing that it has not.
enum class Form {
  kPlain,  // logit = h . w
  kAffine,  // logit = u
  kCapped,
};

// One logit in double: there are N of them per call, and they meet large numbers.
struct LogitMap {
  double softcap, scale;  // softcap 0: none

  double logit(double u) const {
    return softcap == 0 ? u : softcap * std::tanh(u / softcap);
  }
  // dlogit / du = sech^2(u / softcap), without the cancellation of 1 - tanh^2.
  double slope(double u) const {
    if (softcap == 0) return 1;
    const double t = std::exp(-2 * std::abs(u) / softcap);
    return 4 * t / ((1 + t) * (1 + t));
  }
};

// The same for the lanes of a vector.
struct VectorMap {
  Floats scale, softcap, to_ratio, to_exponent;

  explicit VectorMap(const LogitMap& map)
      : scale(splat(static_cast<float>(map.scale))),
        softcap(splat(static_cast<float>(map.softcap))),
        to_ratio(map.softcap == 0 ? Floats{} : splat(static_cast<float>(map.scale / map.softcap))),
        to_exponent(map.softcap == 0 ? Floats{} : splat(static_cast<float>(-2 / M_LN2 * map.scale / map.softcap))) {}
};

// What follows handles kCount vectors side by side, step by step: one after the other, each would wait for itself.
#define VRPO_EACH _Pragma("GCC unroll 8") for (int i = 0; i < kCount; ++i)

// 2^y = power (1 + f g) for -127 <= y <= 126: power = 2^n with n = y rounded, 0 for -127; f = y - n; and
// g = (2^f - 1) / f by Chebyshev's interpolation on [-1/2, 1/2], to 2^-27. NaN gives NaN.
template <int kCount>
VRPO_INLINE void exp2_parts(const Floats (&y)[kCount], Floats (&power)[kCount], Floats (&f)[kCount],
                            Floats (&g)[kCount]) {
  constexpr float kRound = 12582912.0f + 127.0f;  // as in exp, with the exponent's bias
  Floats shifted[kCount];
  VRPO_EACH shifted[i] = y[i] + kRound;
  VRPO_EACH power[i] = (Floats)((Ints)shifted[i] << 23);
  VRPO_EACH f[i] = y[i] - (shifted[i] - kRound);
  VRPO_EACH g[i] = f[i] * 1.54531629e-4f + 1.33908634e-3f;
  VRPO_EACH g[i] = g[i] * f[i] + 9.61808256e-3f;
  VRPO_EACH g[i] = g[i] * f[i] + 5.55035711e-2f;
  VRPO_EACH g[i] = g[i] * f[i] + 2.40226508e-1f;
  VRPO_EACH g[i] = g[i] * f[i] + 6.93147188e-1f;
}

// |tanh x| and sech^2 x from |x| = |u / softcap| > 3/4 and t = exp(-2 |x|) = 2^y: tanh = (1 - t) / (1 + t), where t is
// too small to cancel; sech^2 = 4 t / (1 + t)^2 = t (1 + tanh)^2 keeps its relative accuracy where tanh is almost 1.
template <int kCount>
VRPO_INLINE void tanh_by_exp(const Floats (&unscaled)[kCount], const VectorMap& map, Floats (&tanh)[kCount],
                             Floats (&slope)[kCount]) {
  Floats y[kCount], power[kCount], f[kCount], g[kCount];
  VRPO_EACH y[i] = (Floats)((Ints)unscaled[i] & INT32_MAX) * map.to_exponent;
  VRPO_EACH y[i] = y[i] < -127.0f ? splat(-127.0f) : y[i];  // NaN stays
  exp2_parts(y, power, f, g);
  VRPO_EACH y[i] = (g[i] * f[i] + 1.0f) * power[i];
  VRPO_EACH tanh[i] = (1.0f - y[i]) / (y[i] + 1.0f);
  VRPO_EACH slope[i] = tanh[i] + 1.0f;
  VRPO_EACH slope[i] = y[i] * slope[i] * slope[i];
}

// Whether the sign bit of every lane of every vector is set. By halves: taken out lane by lane, the lanes would cost
// more than the test saves.
template <int kCount>
VRPO_INLINE bool all_negative(const Ints (&value)[kCount]) {
  using Half = int64_t __attribute__((vector_size(sizeof(Ints) / 2)));
  using Quarter = int64_t __attribute__((vector_size(sizeof(Ints) / 4)));
  Ints both = value[0];
  VRPO_EACH both &= value[i];
  Half half[2];
  std::memcpy(half, &both, sizeof(both));
  half[0] &= half[1];
  Quarter quarter[2];
  std::memcpy(quarter, half, sizeof(half[0]));
  quarter[0] &= quarter[1];
  constexpr int64_t kSigns = INT64_MIN | INT64_C(0x80000000);
  return (quarter[0][0] & quarter[0][1] & kSigns) == kSigns;
}

// a where the mask has all bits set, b where it has none: without a comparison, which gcc takes apart lane by lane
// where the processor's vectors are shorter than Floats.
VRPO_INLINE Floats blend(Ints mask, Floats a, Floats b) { return (Floats)(((Ints)a & mask) | ((Ints)b & ~mask)); }

// tanh x and dlogit / du = sech^2 x of x = u / softcap, from u / scale. Up to |x| = 3/4, which is where almost all
// logits of a trained head lie, without a division or an exponential: tanh x = x + x^3 P(x^2), P by Remez' algorithm,
// to 2^-29 relative; and 1 - tanh^2 does not cancel yet. Only where a lane lies beyond, the other formula runs too, and
// each lane takes the one of its own x: its bits do not depend on its neighbours. Where u is -inf stood a target,
// which stays out: tanh is -inf there, and exp(logit) 0.
template <int kCount>
VRPO_INLINE void softcap_parts(const Floats (&unscaled)[kCount], const VectorMap& map, Floats (&tanh)[kCount],
                               Floats (&slope)[kCount]) {
  constexpr int32_t kLimit = 0x3f100000;  // the bits of 0.75^2: those of floats >= 0 are ordered as they are
  Floats x[kCount], square[kCount], p[kCount];
  Ints below[kCount];
  VRPO_EACH x[i] = unscaled[i] * map.to_ratio;
  VRPO_EACH square[i] = x[i] * x[i];
  VRPO_EACH below[i] = (Ints)square[i] - kLimit;  // < 0 up to there
  VRPO_EACH p[i] = square[i] * 1.73693484e-3f - 7.65725368e-3f;
  VRPO_EACH p[i] = p[i] * square[i] + 2.14520332e-2f;
  VRPO_EACH p[i] = p[i] * square[i] - 5.38927240e-2f;
  VRPO_EACH p[i] = p[i] * square[i] + 1.33326941e-1f;
  VRPO_EACH p[i] = p[i] * square[i] - 3.33333151e-1f;
  VRPO_EACH square[i] = square[i] * x[i];
  VRPO_EACH tanh[i] = p[i] * square[i] + x[i];
  VRPO_EACH slope[i] = 1.0f - tanh[i] * tanh[i];
  if (__builtin_expect(all_negative(below), true)) return;
  Floats exact[kCount], exact_slope[kCount];
  tanh_by_exp(unscaled, map, exact, exact_slope);
  VRPO_EACH exact[i] = (Floats)((Ints)exact[i] | ((Ints)unscaled[i] & INT32_MIN));
  VRPO_EACH exact[i] = unscaled[i] == kMinusInfinity ? unscaled[i] : exact[i];
  VRPO_EACH below[i] >>= 31;
  VRPO_EACH tanh[i] = blend(below[i], tanh[i], exact[i]);
  VRPO_EACH slope[i] = blend(below[i], slope[i], exact_slope[i]);
}

// e = exp(above), above = logit - subtract, and slope = dlogit / du from u / scale below a soft-cap; 0 at a target.
template <int kCount>
VRPO_INLINE void capped_exp(const Floats (&unscaled)[kCount], const VectorMap& map, Floats subtract,
                            Floats (&above)[kCount], Floats (&e)[kCount], Floats (&slope)[kCount]) {
  Floats power[kCount], f[kCount], g[kCount];
  softcap_parts(unscaled, map, above, slope);
  VRPO_EACH above[i] = map.softcap * above[i] - subtract;
  VRPO_EACH e[i] = above[i] * 1.44269504088896341f;
  VRPO_EACH e[i] = e[i] < -127.0f ? splat(-127.0f) : e[i];
  exp2_parts(e, power, f, g);
  VRPO_EACH e[i] = (g[i] * f[i] + 1.0f) * power[i];
}

// u / scale from h . w. The bias is added first, and by itself: where the two cancel, u is as exact as they are.
template <Form kForm>
VRPO_INLINE Floats unscaled(Floats z, const float* bias, int64_t v) {
  return kForm == Form::kPlain || bias == nullptr ? z : z + bias[v];
}

// The same for any head, without a slope where there is no soft-cap.
template <Form kForm, int kCount>
VRPO_INLINE void shifted_exp(const Floats (&unscaled)[kCount], const VectorMap& map, Floats subtract,
                             Floats (&above)[kCount], Floats (&e)[kCount], Floats (&slope)[kCount]) {
  if constexpr (kForm == Form::kCapped) {
    capped_exp(unscaled, map, subtract, above, e, slope);
  } else {
    for (int i = 0; i < kCount; ++i) {
      above[i] = (kForm == Form::kAffine ? unscaled[i] * map.scale : unscaled[i]) - subtract;
      e[i] = exp(above[i]);
    }
  }
}

// The logit from u / scale; -inf stays.
template <Form kForm>
VRPO_INLINE Floats to_logit(Floats unscaled, const VectorMap& map) {
  if constexpr (kForm == Form::kPlain) return unscaled;
  if constexpr (kForm == Form::kAffine) return unscaled * map.scale;
  const Floats one[1] = {unscaled};
  Floats tanh[1], slope[1];
  softcap_parts(one, map, tanh, slope);
  return map.softcap * tanh[0];
}

// The shift m follows the largest logit lazily: it moves only when a tile exceeds it by more than this, because each
// move rescales a row of the accumulator. e^16 * V stays far inside fp32.
constexpr float kSlack = 16.0f;

// The shift after a tile in which u / scale is at most `largest`: tanh is monotone.
template <Form kForm>
VRPO_INLINE Floats next_shift(Floats shift, Floats largest, const VectorMap& map) {
  const Floats logit = to_logit<kForm>(largest, map);
  if constexpr (kForm != Form::kCapped) return logit > shift + kSlack ? logit : shift;
  // An overflow is NaN as without a soft-cap: tanh would hide it.
  const Floats checked = logit + (largest == -kMinusInfinity ? largest - largest : Floats{});
  return checked <= shift + kSlack ? shift : checked;
}

// factor * (moment + (m_old - m_new) * total): the moment about the new shift
VRPO_INLINE Floats moved_moment(Floats moment, Floats total, Floats old_shift, Floats new_shift, Floats factor) {
  const Floats step = new_shift == old_shift ? Floats{} : old_shift - new_shift;
  return factor == 0.0f ? Floats{} : factor * (moment + step * total);  // nothing summed yet: step may be -inf
}

}  // namespace vrpo
