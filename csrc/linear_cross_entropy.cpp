// linear_cross_entropy on a CPU, multiplying in fp32; linear_cross_entropy_bf16.cpp multiplies in bf16. The contract
// of every function is in vrpo_kernels/linear_cross_entropy/op.py.
//
// The vocabulary is walked in tiles of kTile classes. A tile of logits is Z^T = W_tile x^T, [classes, rows]: the
// lanes of a vector are rows, so maxima and sums need no horizontal step, and the same memory, now E = exp(z - m),
// is an operand of the next matmuls as it stands. The target's column is kept out of every sum (E = 0): with
// d = m + log s - z_y, nll = softplus(d) and 1 - p_y = sigmoid(d) keep their accuracy when p_y is close to 1.
// A bias, scale and soft-cap act on the tile between the matmuls (linear_cross_entropy_logits.h); with a soft-cap the
// next matmuls take E D, D = dlogit / du, and the sums E.
// Every mode calls the same matmuls and the same fold on the same shapes, so nll has the same bits in all of them.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <string>

#include "linear_cross_entropy_fold.h"

namespace vrpo {

VRPO_CLONES void scale_row(float* to, const float* from, float factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = factor * from[i];
}

VRPO_CLONES void combine_rows(float* to, const float* a, double factor_a, const float* b, double factor_b,
                              int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = static_cast<float>(a[i] * factor_a + b[i] * factor_b);
}

namespace {

VRPO_CLONES float dot(const float* a, const float* b, int64_t size) {
  Floats sum{};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) sum += load(a + i) * load(b + i);
  float total = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) total += sum[lane];
  for (; i < size; ++i) total += a[i] * b[i];
  return total;
}

}  // namespace

void fill_targets(const Tensor& hidden, const Tensor& weight, const TargetIndex& targets, const Head& head,
                  float* out) {
  at::parallel_for(0, hidden.size(0), 16, [&](int64_t begin, int64_t end) {
    RowReader hidden_row(hidden), weight_row(weight);
    for (int64_t n = begin; n < end; ++n) {
      const int64_t y = targets[n];
      out[n] = y < 0 ? 0.0f : head.u(dot(hidden_row(n), weight_row(y), hidden.size(1)), y);
    }
  });
}

namespace {

// Reductions change with the alignment of their operands in some BLAS libraries. Everything they read is therefore
// aligned alike, so that a head mapped from a file gives the bits of the same head in allocated memory.
bool is_plain(const Tensor& t) {
  return t.scalar_type() == at::kFloat && t.is_contiguous() &&
      reinterpret_cast<uintptr_t>(t.data_ptr()) % 64 == 0;
}

Tensor to_plain(const Tensor& t) {
  return is_plain(t) ? t : at::empty(t.sizes(), t.options().dtype(at::kFloat)).copy_(t);
}

// The fp32 matrix multiplications to choose from; which one is faster depends on the CPU. With the bf16 route they
// are all of GEMMS in cpu.py.
enum class Gemm { kTorch, kOneDnn };

Gemm gemm_named(c10::string_view name) {
  TORCH_CHECK_VALUE(name == "fp32" || name == "onednn", "gemm must be 'fp32', 'onednn' or 'bf16', got '", name, "'");
#ifndef CPUBLAS_BRGEMM_F32F32F32
  TORCH_CHECK_VALUE(name != "onednn", "gemm 'onednn' needs a torch with fp32 micro-kernels");
#endif
  return name == "onednn" ? Gemm::kOneDnn : Gemm::kTorch;
}

#ifdef CPUBLAS_BRGEMM_F32F32F32
// out = a b, or out += a b, by oneDNN's micro-kernels: blocks of at most 512 x kWidth outputs, each packing its panel
// of b. Whatever the block, an output is one sum in the order of k: the bits do not depend on the number of threads.
// Threads own rows, not columns: two threads that touch a fresh page first cost more than one.
void multiply_panels(const Tensor& out, const Tensor& a_any, const Tensor& b, bool accumulate) {
  // kDepth bounds how many products are summed one after the other: at 1024 dweight of long batches, and at 256
  // dhidden on AVX2 processors, were less exact than torch.mm, at the edge of the tolerance policy.
  constexpr int64_t kWidth = 64, kDepth = 128;
  const Tensor a = a_any.stride(1) == 1 ? a_any : a_any.contiguous();
  const int64_t M = a.size(0), N = b.size(1), K = a.size(1);
  const int64_t share = (M + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t block = std::clamp<int64_t>(round_up(share, kLanes), 128, 512);
  const int64_t panels = (N + kWidth - 1) / kWidth, blocks = (M + block - 1) / block;
  const float *a_data = a.const_data_ptr<float>(), *b_data = b.const_data_ptr<float>();
  float* out_data = out.data_ptr<float>();
  const int64_t lda = a.stride(0), ldo = out.stride(0), b_row = b.stride(0), b_column = b.stride(1);
  at::parallel_for(0, panels * blocks, 1, [&](int64_t begin, int64_t end) {
    Tensor buffer = at::empty({std::min(K, kDepth), kWidth}, out.options());
    float* panel = buffer.data_ptr<float>();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i0 = task / panels * block, j0 = task % panels * kWidth;
      const int64_t width = std::min(kWidth, N - j0), height = std::min(block, M - i0);
      for (int64_t k0 = 0; k0 < K; k0 += kDepth) {
        const int64_t depth = std::min(kDepth, K - k0);
        const float* from = b_data + k0 * b_row + j0 * b_column;
        for (int64_t k = 0; k < depth; ++k) {
          if (b_column == 1) {
            std::memcpy(panel + k * kWidth, from + k * b_row, width * sizeof(float));
          } else {
            for (int64_t j = 0; j < width; ++j) panel[k * kWidth + j] = from[k * b_row + j * b_column];
          }
        }
        at::native::cpublas::brgemm(height, width, depth, lda, kWidth, ldo, accumulate || k0 > 0,
                                    a_data + i0 * lda + k0, panel, out_data + i0 * ldo + j0, false);
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
}
#endif

// out = a b, or out += a b; fp32, out with rows of stride 1.
void multiply(Gemm gemm, Tensor out, const Tensor& a, const Tensor& b, bool accumulate) {
#ifdef CPUBLAS_BRGEMM_F32F32F32
  if (gemm == Gemm::kOneDnn && a.size(1) > 0) return multiply_panels(out, a, b, accumulate);
#endif
  accumulate ? at::addmm_out(out, out, a, b) : at::mm_out(out, a, b);
}

// x^T as the matmul with a tile wants it: a view, or a copy that is packed many times.
Tensor transposed(Gemm gemm, const Tensor& x) { return gemm == Gemm::kOneDnn ? x.t().contiguous() : x.t(); }

// fp32 tiles of the head: views where that is exact and aligned, else one reused buffer.
class HeadTiles {
 public:
  explicit HeadTiles(const Tensor& weight) : weight_(weight), plain_(is_plain(weight)) {
    if (!plain_) buffer_ = at::empty({kTile, weight.size(1)}, weight.options().dtype(at::kFloat));
  }
  int64_t count() const { return (weight_.size(0) + kTile - 1) / kTile; }
  int64_t begin(int64_t tile) const { return tile * kTile; }
  int64_t size(int64_t tile) const { return std::min(kTile, weight_.size(0) - tile * kTile); }
  Tensor load(int64_t tile) {
    Tensor view = weight_.narrow(0, begin(tile), size(tile));
    return plain_ ? view : buffer_.narrow(0, 0, size(tile)).copy_(view);
  }

 private:
  Tensor weight_, buffer_;
  bool plain_;
};

VRPO_CLONES void add_row(float* to, const float* from, float factor, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += factor * from[i];
}

template <typename Body>
void parallel_lanes(int64_t lanes, const Body& body) {
  at::parallel_for(0, lanes / kLanes, 1,
                   [&](int64_t begin, int64_t end) { body(begin * kLanes, end * kLanes); });
}

struct NoDispatch {  // plain CPU kernels inside: neither autograd nor autocast looks at the matmuls
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard no_autocast{c10::DispatchKey::AutocastCPU};
};

ForwardResult forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
                      double softcap, double scale, c10::string_view gemm_name, bool want_dhidden, bool keep_tiles,
                      bool want_metrics) {
  NoDispatch guard;
  const Head head(bias, softcap, scale, weight.size(0));
  if (gemm_name == "bf16") {
    return bf16_forward(hidden, weight, targets, head, want_dhidden, keep_tiles, want_metrics);
  }
  const Gemm gemm = gemm_named(gemm_name);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const TargetIndex index(targets, V);
  HeadTiles tiles(weight);
  const int64_t padded = round_up(N, kLanes), chunk = chunk_rows(N);

  Tensor nll = at::empty({N}, fp32), statistics = at::empty({3, N}, fp32);
  Tensor expected = at::empty({want_dhidden ? N : 0, want_dhidden ? D : 0}, fp32);
  Tensor kept = keep_tiles ? at::empty({V, padded}, fp32) : at::empty({0, 0}, fp32);
  Tensor kept_shift = at::empty({keep_tiles ? tiles.count() : 0, keep_tiles ? padded : 0}, fp32);
  Tensor scratch = keep_tiles ? Tensor() : at::empty({std::min(V, kTile), chunk}, fp32);
  Tensor metrics = at::empty({want_metrics ? 2 : 0, want_metrics ? N : 0}, fp32);

  fill_targets(hidden, weight, index, head, statistics.data_ptr<float>());
  RowSums sums(chunk, want_metrics);

  for (int64_t n0 = 0; n0 < N; n0 += chunk) {
    const int64_t rows = std::min(chunk, N - n0), lanes = round_up(rows, kLanes);
    const Tensor xt = transposed(gemm, to_plain(hidden.narrow(0, n0, rows)));
    Tensor acc = want_dhidden ? expected.narrow(0, n0, rows) : Tensor();
    sums.reset();
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const int64_t v0 = tiles.begin(t), classes = tiles.size(t);
      const Tensor w = tiles.load(t);
      Tensor z = keep_tiles ? kept.narrow(0, v0, classes).narrow(1, n0, rows)
                            : scratch.narrow(0, 0, classes).narrow(1, 0, rows);
      multiply(gemm, z, w, xt, false);
      float* data = z.data_ptr<float>();
      const int64_t stride = z.stride(0);
      index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) {
        if (n >= n0 && n < n0 + rows) data[(v - v0) * stride + n - n0] = kMinusInfinity;
      });
      const Tile tile{data, stride, classes, head.bias(v0)};
      parallel_lanes(lanes, [&](int64_t first, int64_t last) { fold(tile, head, first, last, sums); });
      if (keep_tiles) {
        std::copy_n(sums.shift.data(), lanes, kept_shift.data_ptr<float>() + t * padded + n0);
      }
      if (!want_dhidden) continue;
      if (t > 0) at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
        for (int64_t n = begin; n < end; ++n) {
          float* row = acc.data_ptr<float>() + n * D;
          if (sums.factor[n] != 1.0f) scale_row(row, row, sums.factor[n], D);
        }
      });
      multiply(gemm, acc, z.t(), w, t > 0);
    }
    finish_rows(n0, rows, sums, head.map, statistics, nll, expected, metrics);
  }
  if (keep_tiles && padded > N) {  // lanes beyond N hold leftovers
    kept.narrow(1, N, padded - N).zero_();
    kept_shift.narrow(1, N, padded - N).zero_();
  }
  return {nll, statistics, expected, kept, kept_shift, metrics};
}

Tensor target_logits(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const OptionalTensor& bias,
                     double scale) {
  NoDispatch guard;
  const Head head(bias, 0.0, scale, weight.size(0));
  Tensor out = at::empty({hidden.size(0)}, hidden.options().dtype(at::kFloat));
  fill_targets(hidden, weight, TargetIndex(targets, weight.size(0)), head, out.data_ptr<float>());
  return out;
}

Tensor dhidden(const Tensor& dnll, const Tensor& expected, const Tensor& statistics, const Tensor& weight,
               const Tensor& targets, double softcap, double scale) {
  NoDispatch guard;
  const int64_t N = expected.size(0), D = weight.size(1);
  const TargetIndex index(targets, weight.size(0));
  const Statistics known(statistics, {softcap, scale});
  const Tensor g = dnll.contiguous();
  Tensor out = at::empty({N, D}, weight.options());
  const bool direct = out.scalar_type() == at::kFloat;
  constexpr int64_t kBlock = 64;  // rows computed in fp32 before they are rounded together
  at::parallel_for(0, (N + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    NoDispatch inner;
    RowReader weight_row(weight);
    Tensor buffer = direct ? out : at::empty({kBlock, D}, expected.options());
    for (int64_t n0 = begin * kBlock; n0 < std::min(end * kBlock, N); n0 += kBlock) {
      const int64_t rows = std::min(kBlock, N - n0);
      float* to = buffer.data_ptr<float>() + (direct ? n0 * D : 0);
      for (int64_t n = n0; n < n0 + rows; ++n, to += D) {
        const double factor = g.const_data_ptr<float>()[n] * known.other(n);
        const float* mean = expected.const_data_ptr<float>() + n * D;
        const bool owned = index[n] >= 0;
        combine_rows(to, mean, factor, owned ? weight_row(index[n]) : mean, owned ? -factor * known.slope(n) : 0.0, D);
      }
      if (!direct) out.narrow(0, n0, rows).copy_(buffer.narrow(0, 0, rows));
    }
  });
  return out;
}

// Rows of dweight for one tile: the output itself in fp32, else a buffer that is rounded into it once.
class HeadGradient {
 public:
  HeadGradient(const Tensor& weight, bool wanted)
      : out_(wanted ? at::empty(weight.sizes(), weight.options().memory_format(at::MemoryFormat::Contiguous))
                    : at::empty({0, 0}, weight.options())) {
    if (wanted && out_.scalar_type() != at::kFloat) {
      buffer_ = at::empty({kTile, weight.size(1)}, weight.options().dtype(at::kFloat));
    }
  }
  Tensor tile(int64_t begin, int64_t size) {
    return buffer_.defined() ? buffer_.narrow(0, 0, size) : out_.narrow(0, begin, size);
  }
  void finish(int64_t begin, int64_t size) {
    if (buffer_.defined()) out_.narrow(0, begin, size).copy_(buffer_.narrow(0, 0, size));
  }
  Tensor out() const { return out_; }

 private:
  Tensor out_, buffer_;
};

// (gradient of the head, gradient of its bias), each empty if not wanted
using HeadGradients = std::tuple<Tensor, Tensor>;

HeadGradients dweight(const Tensor& dnll, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                      const Tensor& statistics, const Tensor& kept, const Tensor& kept_shift, double softcap,
                      double scale, c10::string_view gemm_name, bool want_dweight, bool want_dbias) {
  NoDispatch guard;
  const Statistics known(statistics, {softcap, scale});
  if (gemm_name == "bf16") {
    return bf16_dweight(dnll, hidden, weight, targets, known, kept, kept_shift, want_dweight, want_dbias);
  }
  const Gemm gemm = gemm_named(gemm_name);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const TargetIndex index(targets, V);
  const Tensor g = dnll.contiguous();
  const float* upstream = g.const_data_ptr<float>();
  HeadGradient gradient(weight, want_dweight);
  BiasGradient bias_gradient(weight, want_dbias);

  // Each tile was kept as exp(logit - m_t) slope; the row's factor g q scale / s exp(m_t - m) goes on x, which is
  // smaller.
  Tensor scaled = at::empty({want_dweight ? N : 0, D}, hidden.options().dtype(at::kFloat));
  std::vector<float> others(N), at_target(N), last_shift(N), factor(N);
  for (int64_t n = 0; n < N; ++n) {
    others[n] = static_cast<float>(known.other(n));
    at_target[n] = -upstream[n] * others[n] * static_cast<float>(known.slope(n));
  }
  for (int64_t v0 = 0, t = 0; v0 < V; v0 += kTile, ++t) {
    const int64_t classes = std::min(kTile, V - v0);
    const float* shift = kept_shift.const_data_ptr<float>() + t * kept_shift.size(1);
    at::parallel_for(0, N, 64, [&](int64_t begin, int64_t end) {
      RowReader hidden_row(hidden);
      for (int64_t n = begin; n < end; ++n) {
        if (t > 0 && shift[n] == last_shift[n]) continue;
        last_shift[n] = shift[n];
        // Only the target was seen in this tile: E is 0 there and its shift is -inf.
        factor[n] = known.total[n] == 0 || shift[n] == kMinusInfinity
            ? 0.0f
            : upstream[n] * others[n] / known.total[n] * std::exp(shift[n] - known.shift[n]);
        if (want_dweight) scale_row(scaled.data_ptr<float>() + n * D, hidden_row(n), factor[n], D);
      }
    });
    if (want_dweight) {
      Tensor tile = gradient.tile(v0, classes);
      multiply(gemm, tile, kept.narrow(0, v0, classes).narrow(1, 0, N), scaled, false);
      RowReader hidden_row(hidden);
      index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) {
        add_row(tile.data_ptr<float>() + (v - v0) * D, hidden_row(n), at_target[n], D);
      });
      gradient.finish(v0, classes);
    }
    if (want_dbias) {
      const float* e = kept.const_data_ptr<float>() + v0 * kept.size(1);
      bias_gradient.add_rows(v0, classes, e, kept.size(1), factor.data(), N);
      index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) { bias_gradient.add(v, at_target[n]); });
    }
  }
  return {gradient.out(), bias_gradient.out()};
}

std::tuple<Tensor, Tensor, Tensor> sweep(const Tensor& dnll, const Tensor& hidden, const Tensor& weight,
                                         const Tensor& targets, const Tensor& statistics, const OptionalTensor& bias,
                                         double softcap, double scale, c10::string_view gemm_name, bool want_dhidden,
                                         bool want_dweight, bool want_dbias) {
  NoDispatch guard;
  const Head head(bias, softcap, scale, weight.size(0));
  const Statistics statistics_read(statistics, head.map);
  if (gemm_name == "bf16") {
    return bf16_sweep(dnll, hidden, weight, targets, statistics_read, head, want_dhidden, want_dweight, want_dbias);
  }
  const Gemm gemm = gemm_named(gemm_name);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const TargetIndex index(targets, V);
  HeadTiles tiles(weight);
  const int64_t chunk = chunk_rows(N);

  // The head's matmul takes all of dlogits; for hidden the target's part is added at the end, which rounds less.
  const KnownRows known(dnll, statistics_read);
  const Tensor x = to_plain(hidden), xt = transposed(gemm, x);
  Tensor dx = at::empty({want_dhidden ? N : 0, want_dhidden ? D : 0}, fp32);
  Tensor scratch = at::empty({std::min(V, kTile), chunk}, fp32);
  HeadGradient gradient(weight, want_dweight);
  BiasGradient bias_gradient(weight, want_dbias);

  for (int64_t t = 0; t < tiles.count(); ++t) {
    const int64_t v0 = tiles.begin(t), classes = tiles.size(t);
    const Tensor w = tiles.load(t);
    Tensor dw_tile = want_dweight ? gradient.tile(v0, classes) : Tensor();
    if (want_dweight && N == 0) dw_tile.zero_();
    for (int64_t n0 = 0; n0 < N; n0 += chunk) {
      const int64_t rows = std::min(chunk, N - n0), lanes = round_up(rows, kLanes);
      const Tensor x_chunk = x.narrow(0, n0, rows);
      Tensor z = scratch.narrow(0, 0, classes).narrow(1, 0, rows);
      multiply(gemm, z, w, xt.narrow(1, n0, rows), false);
      float* data = z.data_ptr<float>();
      const Tile tile{data, chunk, classes, head.bias(v0)};
      parallel_lanes(lanes, [&](int64_t first, int64_t last) {
        weigh(tile, head, first, last, known.shift.data() + n0, known.coefficient.data() + n0);
      });
      const auto set_targets = [&](const float* value) {
        index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) {
          if (n >= n0 && n < n0 + rows) data[(v - v0) * chunk + n - n0] = value == nullptr ? 0.0f : value[n];
        });
      };
      if (want_dhidden) {
        set_targets(nullptr);
        Tensor dx_chunk = dx.narrow(0, n0, rows);
        multiply(gemm, dx_chunk, z.t(), w, t > 0);
      }
      if (!want_dweight && !want_dbias) continue;
      set_targets(known.at_target.data());
      if (want_dweight) multiply(gemm, dw_tile, z, x_chunk, n0 > 0);
      if (want_dbias) bias_gradient.add_rows(v0, classes, data, chunk, nullptr, rows);
    }
    if (want_dweight) gradient.finish(v0, classes);
  }
  if (want_dhidden) known.finish(dx, weight, index, true);
  return {dx.to(hidden.scalar_type()), gradient.out(), bias_gradient.out()};
}

}  // namespace

// MKL, behind torch.mm on x86, reaches half of oneDNN's rate on AMD processors with AVX-512; elsewhere it is level or
// ahead.
std::string default_gemm(at::ScalarType dtype) {
  if (dtype == at::kBFloat16 && bf16_route_is_fastest()) return "bf16";
#if defined(__x86_64__) && defined(CPUBLAS_BRGEMM_F32F32F32)
  __builtin_cpu_init();
  if (__builtin_cpu_is("amd") && __builtin_cpu_supports("avx512f")) return "onednn";
#endif
  return "fp32";
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def("linear_cross_entropy_default_gemm(ScalarType dtype) -> str", &default_gemm);
  m.def("linear_cross_entropy_bf16_route_runs() -> bool", &bf16_route_runs);
  m.def(
      "linear_cross_entropy_forward(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float softcap, "
      "float scale, str gemm, bool want_dhidden, bool keep_tiles, bool want_metrics) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_target_logits(Tensor hidden, Tensor weight, Tensor targets, Tensor? bias, float scale) "
      "-> Tensor");
  m.def(
      "linear_cross_entropy_dhidden(Tensor dnll, Tensor expected, Tensor statistics, Tensor weight, "
      "Tensor targets, float softcap, float scale) -> Tensor");
  m.def(
      "linear_cross_entropy_dweight(Tensor dnll, Tensor hidden, Tensor weight, Tensor targets, Tensor statistics, "
      "Tensor kept, Tensor kept_shift, float softcap, float scale, str gemm, bool want_dweight, bool want_dbias) "
      "-> (Tensor, Tensor)");
  m.def(
      "linear_cross_entropy_sweep(Tensor dnll, Tensor hidden, Tensor weight, Tensor targets, Tensor statistics, "
      "Tensor? bias, float softcap, float scale, str gemm, bool want_dhidden, bool want_dweight, bool want_dbias) "
      "-> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) {
  m.impl("linear_cross_entropy_forward", &forward);
  m.impl("linear_cross_entropy_target_logits", &target_logits);
  m.impl("linear_cross_entropy_dhidden", &dhidden);
  m.impl("linear_cross_entropy_dweight", &dweight);
  m.impl("linear_cross_entropy_sweep", &sweep);
}

}  // namespace vrpo
