// What the matrix-multiplication routes of linear_cross_entropy share. The contract of every function that becomes
// an op is in vrpo_kernels/linear_cross_entropy/op.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <tuple>
#include <vector>

#include "common.h"

// bf16 x bf16 -> fp32 micro-kernels exist in this torch, for a processor that may have the instructions.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define VRPO_BF16_ROUTE
#endif

namespace vrpo {

using at::Tensor;
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kTile = 512;  // classes per tile; TILE in cpu.py
constexpr int64_t kRows = 1024;  // rows per chunk: a tile of logits is at most 2 MiB
constexpr int64_t kAbsent = std::numeric_limits<int64_t>::min();  // ABSENT in op.py: the target is in another shard
constexpr int64_t kSubtotal = 32;  // classes summed in one run before they join the tile's sum
// The shift m follows the maximum lazily: it moves only when a tile exceeds it by more than this, because each
// move rescales a row of the accumulator. e^16 * V stays far inside fp32.
constexpr float kSlack = 16.0f;

inline int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Chunks of at most kRows rows, of equal size up to whole vectors.
inline int64_t chunk_rows(int64_t num_rows) {
  const int64_t chunks = std::max<int64_t>(1, (num_rows + kRows - 1) / kRows);
  return std::max(kLanes, round_up((num_rows + chunks - 1) / chunks, kLanes));
}

// Vectorised helpers, defined in linear_cross_entropy.cpp.
void scale_row(float* to, const float* from, float factor, int64_t size);  // to = factor * from
// to = factor_a * a + factor_b * b, rounded once; a may be to.
void combine_rows(float* to, const float* a, double factor_a, const float* b, double factor_b, int64_t size);

// Rows ordered by target, so that each tile finds its own without a search.
class TargetIndex {
 public:
  TargetIndex(const Tensor& targets, int64_t num_classes) : targets_(targets.contiguous()) {
    const int64_t* y = targets_.const_data_ptr<int64_t>();
    rows_.resize(targets_.numel());
    std::iota(rows_.begin(), rows_.end(), int64_t{0});
    for (int64_t n : rows_) {
      TORCH_CHECK_VALUE((y[n] >= 0 && y[n] < num_classes) || y[n] == kAbsent, "targets must lie in [0, ",
                        num_classes, "), got ", y[n], " in row ", n);
    }
    std::stable_sort(rows_.begin(), rows_.end(), [y](int64_t a, int64_t b) { return y[a] < y[b]; });
  }
  // body(row, class) for each row whose target lies in [begin, end), rows of one class in ascending order.
  template <typename Body>
  void for_each(int64_t begin, int64_t end, const Body& body) const {
    const int64_t* y = targets_.const_data_ptr<int64_t>();
    auto first = std::lower_bound(rows_.begin(), rows_.end(), begin,
                                  [y](int64_t row, int64_t value) { return y[row] < value; });
    for (; first != rows_.end() && y[*first] < end; ++first) body(*first, y[*first]);
  }
  int64_t operator[](int64_t row) const { return targets_.const_data_ptr<int64_t>()[row]; }

 private:
  Tensor targets_;
  std::vector<int64_t> rows_;
};

// 1 - p(target) from the statistics, in double because it is N numbers and they meet large logits.
inline double log_odds(float target_logit, float shift, float total) {
  return (static_cast<double>(shift) - target_logit) + std::log(static_cast<double>(total));
}
inline double softplus(double d) { return std::max(d, 0.0) + std::log1p(std::exp(-std::abs(d))); }
inline double sigmoid(double d) { return d >= 0 ? 1 / (1 + std::exp(-d)) : std::exp(d) / (1 + std::exp(d)); }

struct Statistics {
  const float *target_logit, *shift, *total;
  explicit Statistics(const Tensor& t)
      : target_logit(t.const_data_ptr<float>()), shift(target_logit + t.size(1)), total(shift + t.size(1)) {}
  double other(int64_t n) const { return sigmoid(log_odds(target_logit[n], shift[n], total[n])); }
};

// Rows of a matrix as fp32, whatever its dtype and strides; one buffer per thread that reads.
class RowReader {
 public:
  explicit RowReader(const Tensor& matrix)
      : matrix_(matrix), direct_(matrix.scalar_type() == at::kFloat && matrix.stride(1) == 1) {
    if (!direct_) buffer_.resize(matrix.size(1));
  }
  const float* operator()(int64_t row) {
    const int64_t offset = row * matrix_.stride(0);
    switch (matrix_.scalar_type()) {
      case at::kFloat:
        return direct_ ? matrix_.const_data_ptr<float>() + offset : convert<float>(offset);
      case at::kBFloat16:
        return convert<at::BFloat16>(offset);
      case at::kHalf:
        return convert<at::Half>(offset);
      default:
        TORCH_CHECK_VALUE(false, "hidden and weight must be float32, bfloat16 or float16, got ",
                          matrix_.scalar_type());
    }
  }

 private:
  template <typename T>
  const float* convert(int64_t offset) {
    const T* from = matrix_.const_data_ptr<T>() + offset;
    const int64_t stride = matrix_.stride(1);
    for (size_t i = 0; i < buffer_.size(); ++i) buffer_[i] = static_cast<float>(from[i * stride]);
    return buffer_.data();
  }
  const Tensor& matrix_;
  bool direct_;
  std::vector<float> buffer_;
};

// The end of a forward pass over rows n0, n0 + 1, ...: statistics, nll, and the sums in `expected` (if wanted) made
// means.
inline void finish_rows(int64_t n0, int64_t rows, const float* shift, const float* total, const Tensor& statistics,
                        const Tensor& nll, const Tensor& expected) {
  const int64_t N = nll.size(0), D = expected.size(1);
  float* target_logit = statistics.data_ptr<float>();
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = n0 + i;
      const float m = total[i] == 0 ? 0.0f : shift[i];  // V = 1: there is no other class
      target_logit[N + n] = m;
      target_logit[2 * N + n] = total[i];
      nll.data_ptr<float>()[n] = static_cast<float>(softplus(log_odds(target_logit[n], m, total[i])));
      if (D > 0) {
        float* row = expected.data_ptr<float>() + n * D;
        scale_row(row, row, total[i] == 0 ? 0.0f : 1 / total[i], D);
      }
    }
  });
}

// What a sweep knows of each row: dlogits = exp(z - shift) * coefficient for the other classes, at_target for the
// target's own.
class KnownRows {
 public:
  KnownRows(const Tensor& dnll, const Tensor& statistics)
      : shift(round_up(dnll.size(0), kLanes), 0.0f), coefficient(shift.size(), 0.0f), at_target(shift.size(), 0.0f),
        exact_coefficient_(dnll.size(0)), exact_at_target_(dnll.size(0)) {
    const Statistics known(statistics);
    const Tensor g = dnll.contiguous();
    for (int64_t n = 0; n < dnll.size(0); ++n) {
      const double factor = g.const_data_ptr<float>()[n] * known.other(n);
      shift[n] = known.shift[n];
      exact_coefficient_[n] = known.total[n] == 0 ? 0.0 : factor / known.total[n];
      coefficient[n] = static_cast<float>(exact_coefficient_[n]);
      exact_at_target_[n] = -factor;
      at_target[n] = static_cast<float>(-factor);
    }
  }
  // Sums over the other classes, in dx, to gradients: the coefficient, where it is not in the sums, and the target's
  // part. A rounded coefficient is an error of its whole row: made good here.
  void finish(const Tensor& dx, const Tensor& weight, const TargetIndex& targets, bool has_coefficient) const {
    const int64_t D = dx.size(1);
    at::parallel_for(0, dx.size(0), 16, [&](int64_t begin, int64_t end) {
      RowReader weight_row(weight);
      for (int64_t n = begin; n < end; ++n) {
        float* row = dx.data_ptr<float>() + n * D;
        const bool owned = targets[n] >= 0;
        double scale = exact_coefficient_[n];
        if (has_coefficient) scale = coefficient[n] == 0 ? 1.0 : scale / coefficient[n];
        combine_rows(row, row, scale, owned ? weight_row(targets[n]) : row, owned ? exact_at_target_[n] : 0.0, D);
      }
    });
  }

  std::vector<float> shift, coefficient, at_target;  // padded to whole vectors

 private:
  std::vector<double> exact_coefficient_, exact_at_target_;
};

void fill_target_logits(const Tensor& hidden, const Tensor& weight, const TargetIndex& targets, float* out);

// The bf16 route (linear_cross_entropy_bf16.cpp); the arguments are those of the ops.
bool bf16_route_runs();
bool bf16_route_is_fastest();  // of those that run for bf16 inputs on this processor
ForwardResult bf16_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, bool want_dhidden,
                           bool keep_tiles);
Tensor bf16_dweight(const Tensor& dnll, const Tensor& hidden, const Tensor& weight, const Tensor& targets,
                    const Tensor& statistics, const Tensor& kept, const Tensor& kept_shift);
std::tuple<Tensor, Tensor> bf16_sweep(const Tensor& dnll, const Tensor& hidden, const Tensor& weight,
                                      const Tensor& targets, const Tensor& statistics, bool want_dhidden,
                                      bool want_dweight);

}  // namespace vrpo
