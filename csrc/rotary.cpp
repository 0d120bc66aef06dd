// The rotation of queries and keys on a CPU, float32: bit for bit vrpo_kernels/rotary/reference.py, each element
// read once and written once. Not compiled per instruction set: a fused multiply-add rounds once where the formula
// rounds twice.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("fp-contract=off")
#endif

namespace vrpo {
namespace {

using at::Tensor;

// One head: out = (low cos - high sin, high cos + low sin).
void turn(const float* __restrict from, const float* __restrict cos, const float* __restrict sin, float sign,
          int64_t half, float* __restrict to) {
  for (int64_t i = 0; i < half; ++i) {
    const float low = from[i], high = from[i + half], s = sign * sin[i];
    const float low_cos = low * cos[i], high_sin = high * s, high_cos = high * cos[i], low_sin = low * s;
    to[i] = low_cos - high_sin;
    to[i + half] = high_cos + low_sin;
  }
}

// (B, heads, L, d) -> the same as a view of a contiguous (B, L, heads, d).
Tensor turned(const Tensor& heads_BHLd, const Tensor& cos_BLh, const Tensor& sin_BLh, float sign) {
  const Tensor from = heads_BHLd.stride(3) == 1 ? heads_BHLd : heads_BHLd.contiguous();
  const int64_t batch = from.size(0), heads = from.size(1), length = from.size(2), size = from.size(3);
  const Tensor to = at::empty({batch, length, heads, size}, from.options());
  const float* source = from.const_data_ptr<float>();
  const float* cos = cos_BLh.const_data_ptr<float>();
  const float* sin = sin_BLh.const_data_ptr<float>();
  float* target = to.data_ptr<float>();
  const int64_t stride_b = from.stride(0), stride_h = from.stride(1), stride_l = from.stride(2);
  // About 32 thousand elements are worth a thread.
  const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, heads * size));
  at::parallel_for(0, batch * length, grain, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* token = source + t / length * stride_b + t % length * stride_l;
      for (int64_t h = 0; h < heads; ++h)
        turn(token + h * stride_h, cos + t * (size / 2), sin + t * (size / 2), sign, size / 2,
             target + (t * heads + h) * size);
    }
  });
  return to.transpose(1, 2);
}

std::tuple<Tensor, Tensor> rotary(const Tensor& query_BHLd, const Tensor& key_BHLd, const Tensor& cos_BLh,
                                  const Tensor& sin_BLh, bool inverse) {
  const Tensor cos = cos_BLh.contiguous(), sin = sin_BLh.contiguous();
  const float sign = inverse ? -1.0f : 1.0f;
  return {turned(query_BHLd, cos, sin, sign), turned(key_BHLd, cos, sin, sign)};
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def(
      "rotary(Tensor query_BHLd, Tensor key_BHLd, Tensor cos_BLh, Tensor sin_BLh, bool inverse) "
      "-> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) { m.impl("rotary", &rotary); }

}  // namespace
}  // namespace vrpo
