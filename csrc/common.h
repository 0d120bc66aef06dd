// What the floating-point kernels share: portable 16-lane vectors, exp, and one compiled copy per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#if defined(__x86_64__) && defined(__gnu_linux__)
// The loader picks the copy this machine can run; a wheel needs no -march flag and runs on any x86-64.
#define VRPO_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define VRPO_CLONES
#endif
#define VRPO_INLINE __attribute__((always_inline)) inline


namespace vrpo {

constexpr int64_t kLanes = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Lowered by the compiler to one zmm, two ymm or four xmm registers.
using Floats = float __attribute__((vector_size(kLanes * sizeof(float))));
using Ints = int32_t __attribute__((vector_size(kLanes * sizeof(int32_t))));

VRPO_INLINE Floats load(const float* from) {
  Floats value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

VRPO_INLINE void store(float* to, Floats value) { std::memcpy(to, &value, sizeof(value)); }

VRPO_INLINE Floats splat(float value) { return Floats{} + value; }

// e^x for x <= 80, about 1 ulp; 0 below -87.3; NaN stays NaN. Cephes' expf: 2^n times a polynomial on
// [-ln2/2, ln2/2], with ln2 in two parts.
VRPO_INLINE Floats exp(Floats x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, kept in the low bits
  const Floats shifted = x * 1.44269504088896341f + kRound;
  const Floats n = shifted - kRound;
  Floats f = x - n * 0.693359375f;
  f = f + n * 2.12194440e-4f;
  Floats p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  const Ints exponent = (Ints)shifted << 23;  // the bits of kRound itself leave at the top
  const Floats value = (Floats)((Ints)p + exponent) + (x - x);  // x - x: NaN and +inf give NaN
  return x < -87.3f ? Floats{} : value;
}

}  // namespace vrpo
