// RMSNorm on a CPU, float32: one read of the rows forward, one of rows and gradient backward. The contract is in
// vrpo_kernels/rms_norm/op.py.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "common.h"

namespace vrpo {
namespace {

using at::Tensor;

constexpr int64_t kChunk = 64;  // rows whose share of dweight is summed by itself, whatever the number of threads

VRPO_INLINE float sum_of(Floats lanes) {
  float total = 0;
  for (int64_t i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

VRPO_CLONES void forward_rows(const float* x, const float* weight, int64_t count, int64_t size, float eps, float* out,
                              float* rstd) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t n = 0; n < count; ++n, x += size, out += size) {
    Floats squares{};
    for (int64_t i = 0; i < whole; i += kLanes) squares += load(x + i) * load(x + i);
    float total = sum_of(squares);
    for (int64_t i = whole; i < size; ++i) total += x[i] * x[i];
    const float r = 1.0f / std::sqrt(total / size + eps);
    for (int64_t i = 0; i < whole; i += kLanes) store(out + i, load(weight + i) * (load(x + i) * r));
    for (int64_t i = whole; i < size; ++i) out[i] = weight[i] * (x[i] * r);
    rstd[n] = r;
  }
}

// dx = r (g - q mean(g q)), dweight += dout q, with g = dout weight and q = x r.
VRPO_CLONES void backward_rows(const float* dout, const float* x, const float* weight, const float* rstd,
                               int64_t count, int64_t size, float* dx, float* dweight) {
  const int64_t whole = size / kLanes * kLanes;
  for (int64_t n = 0; n < count; ++n, dout += size, x += size, dx += size) {
    const float r = rstd[n];
    Floats products{};
    for (int64_t i = 0; i < whole; i += kLanes) products += load(dout + i) * load(weight + i) * (load(x + i) * r);
    float total = sum_of(products);
    for (int64_t i = whole; i < size; ++i) total += dout[i] * weight[i] * (x[i] * r);
    const float mean = total / size;
    for (int64_t i = 0; i < whole; i += kLanes) {
      const Floats g = load(dout + i), q = load(x + i) * r;
      store(dx + i, (g * load(weight + i) - q * mean) * r);
      store(dweight + i, load(dweight + i) + g * q);
    }
    for (int64_t i = whole; i < size; ++i) {
      const float g = dout[i], q = x[i] * r;
      dx[i] = (g * weight[i] - q * mean) * r;
      dweight[i] += g * q;
    }
  }
}

// Chunks worth a thread: about 32 thousand elements.
int64_t grain_of(int64_t size) { return std::max<int64_t>(1, 32768 / (kChunk * std::max<int64_t>(1, size))); }

std::tuple<Tensor, Tensor> rms_norm_forward(const Tensor& x_ND, const Tensor& weight_D, double eps) {
  const int64_t rows = x_ND.size(0), size = x_ND.size(1), chunks = (rows + kChunk - 1) / kChunk;
  const Tensor out_ND = at::empty({rows, size}, x_ND.options()), rstd_N = at::empty({rows}, x_ND.options());
  const Tensor weights = weight_D.contiguous();
  const float* x = x_ND.const_data_ptr<float>();
  const float* weight = weights.const_data_ptr<float>();
  float* out = out_ND.data_ptr<float>();
  float* rstd = rstd_N.data_ptr<float>();
  at::parallel_for(0, chunks, grain_of(size), [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kChunk, last = std::min(rows, end * kChunk);
    forward_rows(x + first * size, weight, last - first, size, static_cast<float>(eps), out + first * size,
                 rstd + first);
  });
  return {out_ND, rstd_N};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dout_ND, const Tensor& x_ND, const Tensor& weight_D,
                                             const Tensor& rstd_N) {
  const int64_t rows = x_ND.size(0), size = x_ND.size(1), chunks = (rows + kChunk - 1) / kChunk;
  const Tensor dx_ND = at::empty({rows, size}, x_ND.options()), dweight_D = at::empty({size}, x_ND.options());
  const Tensor weights = weight_D.contiguous();
  std::vector<float> parts(chunks * size, 0.0f);
  const float* dout = dout_ND.const_data_ptr<float>();
  const float* x = x_ND.const_data_ptr<float>();
  const float* weight = weights.const_data_ptr<float>();
  const float* rstd = rstd_N.const_data_ptr<float>();
  float* dx = dx_ND.data_ptr<float>();
  at::parallel_for(0, chunks, grain_of(size), [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t first = chunk * kChunk, count = std::min(kChunk, rows - first);
      backward_rows(dout + first * size, x + first * size, weight, rstd + first, count, size, dx + first * size,
                    parts.data() + chunk * size);
    }
  });
  float* dweight = dweight_D.data_ptr<float>();
  std::fill_n(dweight, size, 0.0f);
  for (int64_t chunk = 0; chunk < chunks; ++chunk)
    for (int64_t i = 0; i < size; ++i) dweight[i] += parts[chunk * size + i];
  return {dx_ND, dweight_D};
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def("rms_norm_forward(Tensor x_ND, Tensor weight_D, float eps) -> (Tensor, Tensor)");
  m.def("rms_norm_backward(Tensor dout_ND, Tensor x_ND, Tensor weight_D, Tensor rstd_N) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) {
  m.impl("rms_norm_forward", &rms_norm_forward);
  m.impl("rms_norm_backward", &rms_norm_backward);
}

}  // namespace
}  // namespace vrpo
