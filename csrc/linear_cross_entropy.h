// What the matrix-multiplication routes of linear_cross_entropy share. The contract of every function that becomes
// an op is in vrpo_kernels/linear_cross_entropy/op.py.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

#include "common.h"
#include "linear_cross_entropy_logits.h"

// bf16 x bf16 -> fp32 micro-kernels exist in this torch, for a processor that may have the instructions.
#if defined(__x86_64__) && defined(__gnu_linux__) && defined(CPUBLAS_BRGEMM_BF16BF16F32)
#define VRPO_BF16_ROUTE
#endif

namespace vrpo {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using ForwardResult = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int64_t kTile = 512;  // classes per tile; TILE in cpu.py
constexpr int64_t kRows = 1024;  // rows per chunk: a tile of logits is at most 2 MiB
constexpr int64_t kAbsent = std::numeric_limits<int64_t>::min();  // ABSENT in op.py: the target is in another shard
constexpr int64_t kSubtotal = 32;  // classes summed in one run before they join the tile's sum

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

// sum of row[n] * factor[n] (null: 1), in one order that depends on `size` only
double row_sum(const float* row, const float* factor, int64_t size);

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

// What `bias`, `softcap` and `scale` make of the head.
class Head {
 public:
  const LogitMap map;
  const Form form;

  Head(const OptionalTensor& bias, double softcap, double scale, int64_t num_classes)
      : map{softcap, scale},
        form(softcap != 0 ? Form::kCapped : bias.has_value() || scale != 1 ? Form::kAffine : Form::kPlain),
        bias_(bias.has_value() ? round_up(num_classes, kSubtotal) : 0, 0.0f) {
    if (!bias.has_value()) return;
    const Tensor fp32 = bias->to(at::kFloat).contiguous();
    std::copy_n(fp32.const_data_ptr<float>(), num_classes, bias_.begin());
    if (form != Form::kCapped) return;
    // -inf has the logit -softcap, as the formula says; in a tile u must not be -inf, which stands for a target.
    for (float& value : bias_) value = value == kMinusInfinity ? kFarBelow : value;
  }
  // u of class v from h . w, for the target
  float u(float product, int64_t v) const {
    if (bias_.empty()) return form == Form::kPlain ? product : static_cast<float>(map.scale * product);
    return bias_[v] == kFarBelow ? kMinusInfinity
                                 : static_cast<float>(map.scale * (static_cast<double>(product) + bias_[v]));
  }
  // The bias of class v and those after it, up to a multiple of kSubtotal, 0 beyond the last; null where there is none.
  const float* bias(int64_t v) const { return bias_.empty() ? nullptr : bias_.data() + v; }

 private:
  static constexpr float kFarBelow = -1e38f;
  std::vector<float> bias_;
};

// body.operator()<form>()
template <typename Body>
void for_form(Form form, const Body& body) {
  switch (form) {
    case Form::kPlain: return body.template operator()<Form::kPlain>();
    case Form::kAffine: return body.template operator()<Form::kAffine>();
    default: return body.template operator()<Form::kCapped>();
  }
}

// 1 - p(target) from the statistics, in double because it is N numbers and they meet large logits.
inline double log_odds(double target_logit, float shift, float total) {
  return (static_cast<double>(shift) - target_logit) + std::log(static_cast<double>(total));
}
inline double softplus(double d) { return std::max(d, 0.0) + std::log1p(std::exp(-std::abs(d))); }
inline double sigmoid(double d) { return d >= 0 ? 1 / (1 + std::exp(-d)) : std::exp(d) / (1 + std::exp(d)); }

struct Statistics {
  const float *target, *shift, *total;  // u of the target, m, s
  const LogitMap map;
  Statistics(const Tensor& t, const LogitMap& map)
      : target(t.const_data_ptr<float>()), shift(target + t.size(1)), total(shift + t.size(1)), map(map) {}
  // q scale = (1 - p(target)) scale: what a row's gradient has in common
  double other(int64_t n) const {
    return sigmoid(log_odds(map.logit(target[n]), shift[n], total[n])) * map.scale;
  }
  double slope(int64_t n) const { return map.slope(target[n]); }  // at the target
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

// Running sums of a chunk of rows: shift m, total s = sum of e, e = exp(logit - m); for metrics, if wanted, the
// largest u / scale and the moment, sum of e (logit - m). factor: what a tile's fold found that earlier sums of the
// row, and accumulators, are to be multiplied with.
struct RowSums {
  std::vector<float> shift, total, factor, largest, moment;
  RowSums(int64_t size, bool metrics)
      : shift(size), total(size), factor(size), largest(metrics ? size : 0), moment(largest.size()) {}
  bool metrics() const { return !largest.empty(); }
  void reset() {
    std::fill(shift.begin(), shift.end(), kMinusInfinity);
    std::fill(total.begin(), total.end(), 0.0f);
    std::fill(largest.begin(), largest.end(), kMinusInfinity);
    std::fill(moment.begin(), moment.end(), 0.0f);
  }
};

// The end of a forward pass over rows n0, n0 + 1, ...: statistics, nll, and, where wanted, the sums in `expected` made
// means, and metrics.
inline void finish_rows(int64_t n0, int64_t rows, const RowSums& sums, const LogitMap& map, const Tensor& statistics,
                        const Tensor& nll, const Tensor& expected, const Tensor& metrics) {
  const int64_t N = nll.size(0), D = expected.size(1);
  float* known = statistics.data_ptr<float>();
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t n = n0 + i;
      const float total = sums.total[i], m = total == 0 ? 0.0f : sums.shift[i];  // V = 1: there is no other class
      known[N + n] = m;
      known[2 * N + n] = total;
      nll.data_ptr<float>()[n] = static_cast<float>(softplus(log_odds(map.logit(known[n]), m, total)));
      if (D > 0) {
        float* row = expected.data_ptr<float>() + n * D;
        scale_row(row, row, total == 0 ? 0.0f : 1 / total, D);
      }
      if (sums.metrics()) {
        metrics.data_ptr<float>()[n] = static_cast<float>(map.logit(map.scale * sums.largest[i]));
        metrics.data_ptr<float>()[N + n] = sums.moment[i];
      }
    }
  });
}

// What a sweep knows of each row: dlogits = exp(logit - shift) * slope * coefficient for the other classes, at_target
// for the target's own.
class KnownRows {
 public:
  KnownRows(const Tensor& dnll, const Statistics& known)
      : shift(round_up(dnll.size(0), kLanes), -kMinusInfinity), coefficient(shift.size(), 0.0f),
        at_target(shift.size(), 0.0f),
        exact_coefficient_(dnll.size(0)), exact_at_target_(dnll.size(0)) {
    const Tensor g = dnll.contiguous();
    for (int64_t n = 0; n < dnll.size(0); ++n) {
      const double factor = g.const_data_ptr<float>()[n] * known.other(n);
      shift[n] = known.shift[n];
      exact_coefficient_[n] = known.total[n] == 0 ? 0.0 : factor / known.total[n];
      coefficient[n] = static_cast<float>(exact_coefficient_[n]);
      exact_at_target_[n] = -factor * known.slope(n);
      at_target[n] = static_cast<float>(exact_at_target_[n]);
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

  // Padded to whole vectors. A lane without a row has e = 0 by its shift: a bias could make 0 * infinity of it.
  std::vector<float> shift, coefficient, at_target;

 private:
  std::vector<double> exact_coefficient_, exact_at_target_;
};

// The gradient of the bias (V,), in the dtype of the head: summed in double, rounded once; empty if not wanted.
class BiasGradient {
 public:
  BiasGradient(const Tensor& weight, bool wanted) : options_(weight.options()), sums_(wanted ? weight.size(0) : 0) {}
  void add(int64_t v, double value) { sums_[v] += value; }
  // dlogits of rows, [classes, size] from class v0 on, row n times factor[n] (null: 1)
  void add_rows(int64_t v0, int64_t classes, const float* dlogits, int64_t stride, const float* factor, int64_t size) {
    at::parallel_for(0, classes, 16, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) sums_[v0 + v] += row_sum(dlogits + v * stride, factor, size);
    });
  }
  Tensor out() const {
    Tensor fp32 = at::empty({static_cast<int64_t>(sums_.size())}, options_.dtype(at::kFloat));
    std::copy(sums_.begin(), sums_.end(), fp32.data_ptr<float>());
    return fp32.to(options_.dtype());
  }

 private:
  at::TensorOptions options_;
  std::vector<double> sums_;
};

// u of each row's target, 0 where it is absent
void fill_targets(const Tensor& hidden, const Tensor& weight, const TargetIndex& targets, const Head& head,
                  float* out);

// The bf16 route (linear_cross_entropy_bf16.cpp); the arguments are those of the ops.
bool bf16_route_runs();
bool bf16_route_is_fastest();  // of those that run for bf16 inputs on this processor
ForwardResult bf16_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const Head& head,
                           bool want_dhidden, bool keep_tiles, bool want_metrics);
std::tuple<Tensor, Tensor> bf16_dweight(const Tensor& dnll, const Tensor& hidden, const Tensor& weight,
                                        const Tensor& targets, const Statistics& known, const Tensor& kept,
                                        const Tensor& kept_shift, bool want_dweight, bool want_dbias);
std::tuple<Tensor, Tensor, Tensor> bf16_sweep(const Tensor& dnll, const Tensor& hidden, const Tensor& weight,
                                              const Tensor& targets, const Statistics& known, const Head& head,
                                              bool want_dhidden, bool want_dweight, bool want_dbias);

}  // namespace vrpo
