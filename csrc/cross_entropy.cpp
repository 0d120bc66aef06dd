// cross_entropy on a CPU: one read of the selected rows forward, one read and one write backward. The contract is
// in vrpo_kernels/cross_entropy/cpu.py. Rows in parallel; the lanes of a vector are classes of one row.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>

#include "common.h"

namespace vrpo {
namespace {

using at::Tensor;
using vrpo::load;  // the fp32 forms, beside the 16-bit ones below
using vrpo::store;

constexpr int64_t kBlock = 2048;  // classes per online step: read twice, the second time from the L1 cache
constexpr float kLowest = std::numeric_limits<float>::lowest();

using Halves = uint16_t __attribute__((vector_size(kLanes * sizeof(uint16_t))));
using Words = uint32_t __attribute__((vector_size(kLanes * sizeof(uint32_t))));

VRPO_INLINE Floats load(const c10::BFloat16* from) {
  Halves bits;
  std::memcpy(&bits, from, sizeof(bits));
  return (Floats)(__builtin_convertvector(bits, Words) << 16);
}

// Exponent and mantissa move to their fp32 places; 2^112 is the difference of the exponents' biases.
VRPO_INLINE Floats load(const c10::Half* from) {
  Halves half;
  std::memcpy(&half, from, sizeof(half));
  const Words bits = __builtin_convertvector(half, Words);
  const Words finite = (Words)((Floats)((bits & 0x7fffu) << 13) * 0x1p112f);
  const Words special = (bits & 0x03ffu) << 13 | 0x7f800000u;  // infinity and NaN
  const Words magnitude = (bits & 0x7c00u) == 0x7c00u ? special : finite;
  return (Floats)(magnitude | (bits & 0x8000u) << 16);
}

// Round to nearest, ties to even; NaN stays NaN.
VRPO_INLINE void store(c10::BFloat16* to, Floats value) {
  const Words bits = (Words)value;
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const Words kept = value == value ? rounded : Words{} + 0x7fc0u;
  const Halves out = __builtin_convertvector(kept, Halves);
  std::memcpy(to, &out, sizeof(out));
}

VRPO_INLINE void store(c10::Half* to, Floats value) {
  const Words bits = (Words)value, sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  const Words normal = (magnitude + 0x0fffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Below 2^-14 the unit is 2^-24, which is that of fp32 numbers next to 0.5: the addition rounds.
  const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
  Words half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Words{} + 0x7c00u : half;  // 65520 and above round to infinity
  half = magnitude > 0x7f800000u ? Words{} + 0x7e00u : half;
  const Halves out = __builtin_convertvector(half | sign, Halves);
  std::memcpy(to, &out, sizeof(out));
}

// The last, incomplete vector of a range, filled up with -inf (whose exponential is 0).
template <typename T>
VRPO_INLINE Floats load_tail(const T* from, int64_t count) {
  float values[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) values[i] = i < count ? static_cast<float>(from[i]) : kMinusInfinity;
  return load(values);
}

// Adds classes z[0 .. count) to the row's running maximum and sum of exp(z - maximum).
template <typename T>
VRPO_INLINE void fold_classes(const T* z, int64_t count, float& maximum, double& total) {
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t size = std::min(kBlock, count - begin), whole = size / kLanes * kLanes;
    const Floats tail = load_tail(z + begin + whole, size - whole);
    Floats highest = tail;
    for (int64_t v = 0; v < whole; v += kLanes) {
      const Floats value = load(z + begin + v);
      highest = value > highest ? value : highest;
    }
    float block_maximum = maximum;
    for (int64_t i = 0; i < kLanes; ++i) block_maximum = std::max(block_maximum, highest[i]);
    total *= std::exp(static_cast<double>(maximum) - block_maximum);
    maximum = block_maximum;
    Floats sum = exp(tail - maximum);
    for (int64_t v = 0; v < whole; v += kLanes) sum += exp(load(z + begin + v) - maximum);
    for (int64_t i = 0; i < kLanes; ++i) total += sum[i];
  }
}

// Maximum and sum over every class but the target. The maximum starts at the lowest finite number, so that rows
// whose other logits are all -inf give a sum of 0 instead of NaN.
template <typename T>
VRPO_INLINE void forward_body(const T* z, int64_t num_classes, int64_t target, float* maximum, float* total) {
  float highest = kLowest;
  double sum = 0;
  fold_classes(z, target, highest, sum);
  fold_classes(z + target + 1, num_classes - target - 1, highest, sum);
  *maximum = highest;
  *total = static_cast<float>(sum);
}

// out_v = scale * exp(z_v - maximum); out may be z.
template <typename T>
VRPO_INLINE void backward_body(const T* z, int64_t num_classes, float maximum, float scale, T* out) {
  const int64_t whole = num_classes / kLanes * kLanes;
  for (int64_t v = 0; v < whole; v += kLanes) store(out + v, exp(load(z + v) - maximum) * scale);
  const Floats tail = exp(load_tail(z + whole, num_classes - whole) - maximum) * scale;
  for (int64_t v = whole; v < num_classes; ++v) out[v] = tail[v - whole];
}

VRPO_CLONES void forward_row(const float* z, int64_t num_classes, int64_t target, float* maximum, float* total) {
  forward_body(z, num_classes, target, maximum, total);
}
VRPO_CLONES void forward_row(const c10::BFloat16* z, int64_t num_classes, int64_t target, float* maximum,
                             float* total) {
  forward_body(z, num_classes, target, maximum, total);
}
VRPO_CLONES void forward_row(const c10::Half* z, int64_t num_classes, int64_t target, float* maximum,
                             float* total) {
  forward_body(z, num_classes, target, maximum, total);
}

VRPO_CLONES void backward_row(const float* z, int64_t num_classes, float maximum, float scale, float* out) {
  backward_body(z, num_classes, maximum, scale, out);
}
VRPO_CLONES void backward_row(const c10::BFloat16* z, int64_t num_classes, float maximum, float scale,
                              c10::BFloat16* out) {
  backward_body(z, num_classes, maximum, scale, out);
}
VRPO_CLONES void backward_row(const c10::Half* z, int64_t num_classes, float maximum, float scale,
                              c10::Half* out) {
  backward_body(z, num_classes, maximum, scale, out);
}

// Log-odds of "not the target", in double: one number per row, and logits may be large.
double log_odds(float target_logit, float maximum, float total) {
  return (static_cast<double>(maximum) - target_logit) + std::log(static_cast<double>(total));
}

// body(z as const T*) with the element type of the tensor; the backend choice lets no other dtype through.
template <typename Body>
void dispatch(at::ScalarType dtype, const Body& body) {
  if (dtype == at::kFloat) return body(float{});
  if (dtype == at::kBFloat16) return body(c10::BFloat16{});
  if (dtype == at::kHalf) return body(c10::Half{});
  TORCH_CHECK_TYPE(false, "cross_entropy computes float32, bfloat16 and float16, not ", dtype);
}

// About 64 thousand classes are worth a thread.
int64_t grain_of(int64_t num_classes) { return std::max<int64_t>(1, 65536 / num_classes); }

std::tuple<Tensor, Tensor> cross_entropy_forward(const Tensor& logits_MV, const Tensor& target_N,
                                                 const std::optional<Tensor>& row_N) {
  const int64_t num_rows = target_N.numel(), num_classes = logits_MV.size(1), stride = logits_MV.stride(0);
  const Tensor targets = target_N.contiguous();
  const Tensor rows = row_N ? row_N->contiguous() : Tensor();
  const Tensor nll_N = at::empty({num_rows}, logits_MV.options().dtype(at::kFloat));
  const Tensor statistics = at::empty({2, num_rows}, nll_N.options());

  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t* row = row_N ? rows.const_data_ptr<int64_t>() : nullptr;
  float* nll = nll_N.data_ptr<float>();
  float* maximum = statistics.data_ptr<float>();
  float* total = maximum + num_rows;
  dispatch(logits_MV.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* logits = logits_MV.const_data_ptr<T>();
    at::parallel_for(0, num_rows, grain_of(num_classes), [&](int64_t begin, int64_t end) {
      for (int64_t n = begin; n < end; ++n) {
        const T* z = logits + (row ? row[n] : n) * stride;
        forward_row(z, num_classes, target[n], maximum + n, total + n);
        const double d = log_odds(static_cast<float>(z[target[n]]), maximum[n], total[n]);
        nll[n] = static_cast<float>(std::max(d, 0.0) + std::log1p(std::exp(-std::abs(d))));
      }
    });
  });
  return {nll_N, statistics};
}

void cross_entropy_backward(const Tensor& dnll_N, const Tensor& logits_MV, const Tensor& target_N,
                            const std::optional<Tensor>& owner_M, const Tensor& statistics, const Tensor& out_MV) {
  const int64_t num_rows = logits_MV.size(0), num_classes = logits_MV.size(1), stride = logits_MV.stride(0);
  const Tensor targets = target_N.contiguous(), upstream = dnll_N.contiguous();
  const Tensor owners = owner_M ? owner_M->contiguous() : Tensor();

  const int64_t* target = targets.const_data_ptr<int64_t>();
  const int64_t* owner = owner_M ? owners.const_data_ptr<int64_t>() : nullptr;
  const float* dnll = upstream.const_data_ptr<float>();
  const float* maximum = statistics.const_data_ptr<float>();
  const float* total = maximum + targets.numel();
  dispatch(logits_MV.scalar_type(), [&](auto type) {
    using T = decltype(type);
    const T* logits = logits_MV.const_data_ptr<T>();
    T* out = out_MV.data_ptr<T>();
    at::parallel_for(0, num_rows, grain_of(num_classes), [&](int64_t begin, int64_t end) {
      for (int64_t m = begin; m < end; ++m) {
        T* dz = out + m * out_MV.stride(0);
        const int64_t n = owner ? owner[m] : m;
        if (n < 0) {
          std::fill_n(dz, num_classes, T(0.0f));
          continue;
        }
        const T* z = logits + m * stride;
        const double d = log_odds(static_cast<float>(z[target[n]]), maximum[n], total[n]);
        const double other = d >= 0 ? 1 / (1 + std::exp(-d)) : std::exp(d) / (1 + std::exp(d));  // 1 - p(target)
        const double scale = dnll[n] * other;
        backward_row(z, num_classes, maximum[n], total[n] == 0 ? 0.0f : static_cast<float>(scale / total[n]), dz);
        dz[target[n]] = static_cast<float>(-scale);
      }
    });
  });
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def("cross_entropy_forward(Tensor logits_MV, Tensor target_N, Tensor? row_N) -> (Tensor, Tensor)");
  m.def(
      "cross_entropy_backward(Tensor dnll_N, Tensor logits_MV, Tensor target_N, Tensor? owner_M, "
      "Tensor statistics, Tensor(a!) out_MV) -> ()");
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) {
  m.impl("cross_entropy_forward", &cross_entropy_forward);
  m.impl("cross_entropy_backward", &cross_entropy_backward);
}

}  // namespace
}  // namespace vrpo
