#include "linear_cross_entropy_fold.h"

namespace vrpo {

namespace {

// Classes handled side by side. A plain head's loop is short enough to overlap with itself.
template <Form kForm>
constexpr int kTogether = kForm == Form::kCapped ? 4 : 1;

// The sums of some lanes; largest and moment are null where no metrics are wanted.
struct Pointers {
  float *shift, *total, *factor, *largest, *moment;
};

// kCount classes from v on, of one vector of lanes: z -> e, with a soft-cap times its slope; adds to the sums.
template <Form kForm, bool kMetrics, int kCount>
VRPO_INLINE void fold_classes(const Tile& tile, const VectorMap& map, int64_t v, int64_t n, Floats subtract,
                              Floats& sum, Floats& moment) {
  Floats value[kCount], above[kCount], e[kCount], slope[kCount];
  float* const z = tile.z + v * tile.stride + n;
  for (int i = 0; i < kCount; ++i) value[i] = unscaled<kForm>(load(z + i * tile.stride), tile.bias, v + i);
  shifted_exp<kForm>(value, map, subtract, above, e, slope);
  for (int i = 0; i < kCount; ++i) {
    store(z + i * tile.stride, kForm == Form::kCapped ? e[i] * slope[i] : e[i]);
    sum += e[i];
    if constexpr (kMetrics) moment += e[i] * (above[i] < -100.0f ? Floats{} : above[i]);  // not 0 * -inf
  }
}

template <Form kForm, bool kMetrics>
VRPO_CLONES void fold_lanes(const Tile& tile, const LogitMap& logit_map, int64_t first, int64_t last, Pointers sums) {
  const VectorMap map(logit_map);
  float* const z = tile.z;
  const int64_t stride = tile.stride, classes = tile.classes;
  for (int64_t n = first; n < last; n += kLanes) {
    Floats maximum = splat(kMinusInfinity);
    for (int64_t v = 0; v < classes; ++v) {
      const Floats value = unscaled<kForm>(load(z + v * stride + n), tile.bias, v);
      maximum = value > maximum ? value : maximum;
    }
    if constexpr (kMetrics) {
      const Floats largest = load(sums.largest + n);
      store(sums.largest + n, maximum > largest ? maximum : largest);
    }
    const Floats old_shift = load(sums.shift + n);
    const Floats new_shift = next_shift<kForm>(old_shift, maximum, map);
    const Floats scale = new_shift == old_shift ? splat(1.0f) : exp(old_shift - new_shift);
    // All logits so far -inf (only the target seen): subtract 0 instead of -inf.
    const Floats subtract = new_shift == kMinusInfinity ? Floats{} : new_shift;
    Floats tile_sum{}, tile_moment{};
    for (int64_t v0 = 0; v0 < classes; v0 += kSubtotal) {
      Floats subtotal{}, submoment{};
      const int64_t last_class = std::min(v0 + kSubtotal, classes);
      int64_t v = v0;
      for (; v + kTogether<kForm> <= last_class; v += kTogether<kForm>) {
        fold_classes<kForm, kMetrics, kTogether<kForm>>(tile, map, v, n, subtract, subtotal, submoment);
      }
      for (; v < last_class; ++v) fold_classes<kForm, kMetrics, 1>(tile, map, v, n, subtract, subtotal, submoment);
      tile_sum += subtotal;
      tile_moment += submoment;
    }
    const Floats total = load(sums.total + n);
    if constexpr (kMetrics) {
      store(sums.moment + n,
            moved_moment(load(sums.moment + n), total, old_shift, new_shift, scale) + tile_moment);
    }
    store(sums.total + n, total * scale + tile_sum);
    store(sums.shift + n, new_shift);
    store(sums.factor + n, scale);
  }
}

template <Form kForm, int kCount>
VRPO_INLINE void weigh_classes(const Tile& tile, const VectorMap& map, int64_t v, int64_t n, Floats subtract,
                               Floats multiply) {
  Floats value[kCount], above[kCount], e[kCount], slope[kCount];
  float* const z = tile.z + v * tile.stride + n;
  for (int i = 0; i < kCount; ++i) value[i] = unscaled<kForm>(load(z + i * tile.stride), tile.bias, v + i);
  shifted_exp<kForm>(value, map, subtract, above, e, slope);
  for (int i = 0; i < kCount; ++i) {
    const Floats weighed = e[i] * multiply;
    store(z + i * tile.stride, kForm == Form::kCapped ? weighed * slope[i] : weighed);
  }
}

template <Form kForm>
VRPO_CLONES void weigh_lanes(const Tile& tile, const LogitMap& logit_map, int64_t first, int64_t last,
                             const float* shift, const float* coefficient) {
  const VectorMap map(logit_map);
  for (int64_t n = first; n < last; n += kLanes) {
    const Floats subtract = load(shift + n), multiply = load(coefficient + n);
    int64_t v = 0;
    for (; v + kTogether<kForm> <= tile.classes; v += kTogether<kForm>) {
      weigh_classes<kForm, kTogether<kForm>>(tile, map, v, n, subtract, multiply);
    }
    for (; v < tile.classes; ++v) weigh_classes<kForm, 1>(tile, map, v, n, subtract, multiply);
  }
}

VRPO_CLONES double block_sum(const float* row, const float* factor, int64_t size) {
  Floats lanes{};
  int64_t n = 0;
  for (; n + kLanes <= size; n += kLanes) lanes += factor == nullptr ? load(row + n) : load(row + n) * load(factor + n);
  double sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  for (; n < size; ++n) sum += factor == nullptr ? row[n] : row[n] * factor[n];
  return sum;
}

}  // namespace

void fold(const Tile& tile, const Head& head, int64_t first, int64_t last, RowSums& sums) {
  const Pointers to{sums.shift.data(), sums.total.data(), sums.factor.data(), sums.largest.data(),
                    sums.moment.data()};
  for_form(head.form, [&]<Form kForm>() {
    if (sums.metrics()) {
      fold_lanes<kForm, true>(tile, head.map, first, last, to);
    } else {
      fold_lanes<kForm, false>(tile, head.map, first, last, to);
    }
  });
}

void weigh(const Tile& tile, const Head& head, int64_t first, int64_t last, const float* shift,
           const float* coefficient) {
  for_form(head.form,
           [&]<Form kForm>() { weigh_lanes<kForm>(tile, head.map, first, last, shift, coefficient); });
}

double row_sum(const float* row, const float* factor, int64_t size) {
  constexpr int64_t kBlock = 1024;  // summed in fp32 lanes, 64 values each
  double sum = 0;
  for (int64_t n = 0; n < size; n += kBlock) {
    sum += block_sum(row + n, factor == nullptr ? nullptr : factor + n, std::min(kBlock, size - n));
  }
  return sum;
}

}  // namespace vrpo
