// Random words on a CPU: bit for bit vrpo_kernels/philox.py, which is their specification.
#include "philox.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>

namespace vrpo {
namespace {

using at::Tensor;

// Four tensors of one shape, contiguous, values in [0, 2^32).
std::tuple<Tensor, Tensor, Tensor, Tensor> philox4x32_words(const Tensor& c0, const Tensor& c1, const Tensor& c2,
                                                       const Tensor& c3, int64_t seed) {
  const Tensor out[4] = {at::empty(c0.sizes(), c0.options()), at::empty(c0.sizes(), c0.options()),
                         at::empty(c0.sizes(), c0.options()), at::empty(c0.sizes(), c0.options())};
  const int64_t* from[4] = {c0.const_data_ptr<int64_t>(), c1.const_data_ptr<int64_t>(),
                            c2.const_data_ptr<int64_t>(), c3.const_data_ptr<int64_t>()};
  int64_t* to[4] = {out[0].data_ptr<int64_t>(), out[1].data_ptr<int64_t>(), out[2].data_ptr<int64_t>(),
                    out[3].data_ptr<int64_t>()};
  const PhiloxKey key(seed);
  at::parallel_for(0, c0.numel(), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      uint32_t word[4];
      for (int j = 0; j < 4; ++j) word[j] = static_cast<uint32_t>(from[j][i]);
      philox4x32(key, word[0], word[1], word[2], word[3]);
      for (int j = 0; j < 4; ++j) to[j][i] = word[j];
    }
  });
  return {out[0], out[1], out[2], out[3]};
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def("philox4x32_words(Tensor c0, Tensor c1, Tensor c2, Tensor c3, int seed) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) { m.impl("philox4x32_words", &philox4x32_words); }

}  // namespace
}  // namespace vrpo
