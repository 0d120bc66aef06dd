// What happens to one panel of the bf16 route between its matmuls: from products h . w to probabilities; for
// linear_cross_entropy_bf16.cpp only.
#pragma once

#include "linear_cross_entropy_bf16_layouts.h"

namespace vrpo {
namespace {

// Where the probabilities of one panel go, rounded to bf16; null where they are not wanted.
struct Probabilities {
  BFloat16* by_row;  // [lane, kTile], columns up to a multiple of kSubtotal: the left operand for hidden's gradient
  BFloat16* by_class;  // [class, stride]: the left operand for weight's
  int64_t by_class_stride;
};

template <int kGroups>
struct Lanes {
  Floats group[kGroups];
};

// e = exp(logit - subtract) for a panel z [classes, kWidth] of h . w. With a soft-cap's slope it goes out by row, and
// times multiply by class; sum += the fp32 sums of e over classes, moment += those of e (logit - subtract) for
// metrics. z has rows of -inf up to the next multiple of kSubtotal.
template <int kGroups, Form kForm, bool kMetrics, bool kOut>
VRPO_AVX512_BF16 void exponentials(const float* z, int64_t classes, const float* bias, const LogitMap& logit_map,
                                   const Lanes<kGroups>& subtract, const Lanes<kGroups>& multiply, Lanes<kGroups>& sum,
                                   Lanes<kGroups>& moment, const Probabilities& out) {
  constexpr int kTogether = kForm == Form::kCapped ? 4 : 2;  // classes handled side by side
  const VectorMap map(logit_map);
  for (int64_t v0 = 0; v0 < classes; v0 += kSubtotal) {
    for (int g = 0; g < kGroups; ++g) {
      const float* from = z + v0 * kWidth + g * kLanes;
      __m512i pairs[kSubtotal / 2];
      Floats subtotal{}, submoment{};
      for (int64_t v = 0; v < kSubtotal; v += kTogether, from += kTogether * kWidth) {
        Floats value[kTogether], above[kTogether], e[kTogether], slope[kTogether];
        for (int i = 0; i < kTogether; ++i) value[i] = unscaled<kForm>(load(from + i * kWidth), bias, v0 + v + i);
        shifted_exp<kForm>(value, map, subtract.group[g], above, e, slope);
        for (int i = 0; i < kTogether; ++i) {
          // Rounded before it is summed, whatever else becomes of it: no product contracted into the sum.
          asm("" : "+v"(e[i]));
          subtotal += e[i];
          if constexpr (kMetrics) submoment += e[i] * (above[i] < -100.0f ? Floats{} : above[i]);  // not 0 * -inf
          if constexpr (kOut && kForm == Form::kCapped) e[i] *= slope[i];
        }
        if constexpr (kOut) {
          for (int i = 0; i < kTogether; i += 2) {
            pairs[(v + i) / 2] = pair(to_bf16((__m512)e[i]), to_bf16((__m512)e[i + 1]));
          }
          if (out.by_class != nullptr) {
            BFloat16* to = out.by_class + (v0 + v) * out.by_class_stride + g * kLanes;
            for (int i = 0; i < kTogether; ++i, to += out.by_class_stride) {
              if (v0 + v + i < classes) store_rounded(to, e[i] * multiply.group[g]);
            }
          }
        }
      }
      sum.group[g] += subtotal;
      if constexpr (kMetrics) moment.group[g] += submoment;
      if (kOut && out.by_row != nullptr) {
        transpose(pairs);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          _mm512_storeu_si512(out.by_row + (g * kLanes + lane) * kTile + v0, pairs[lane]);
        }
      }
    }
  }
}

// One panel of a tile, lanes from `first` of the sums on: moves the shift, turns z into probabilities, adds to the
// sums.
template <int kGroups, Form kForm, bool kMetrics>
VRPO_AVX512_BF16 void fold(const float* z, int64_t classes, const float* bias, const LogitMap& logit_map,
                           int64_t first, RowSums& sums, const Probabilities& out) {
  const VectorMap map(logit_map);
  float *shift = &sums.shift[first], *total = &sums.total[first], *factor = &sums.factor[first];
  Lanes<kGroups> maximum, subtract, one, old_shift;
  for (int g = 0; g < kGroups; ++g) maximum.group[g] = splat(kMinusInfinity);
  for (int64_t v = 0; v < classes; ++v) {
    for (int g = 0; g < kGroups; ++g) {
      const Floats value = unscaled<kForm>(load(z + v * kWidth + g * kLanes), bias, v);
      maximum.group[g] = value > maximum.group[g] ? value : maximum.group[g];
    }
  }
  for (int g = 0; g < kGroups; ++g) {
    if constexpr (kMetrics) {
      float* largest = &sums.largest[first + g * kLanes];
      store(largest, maximum.group[g] > load(largest) ? maximum.group[g] : load(largest));
    }
    old_shift.group[g] = load(shift + g * kLanes);
    const Floats new_shift = next_shift<kForm>(old_shift.group[g], maximum.group[g], map);
    store(factor + g * kLanes,
          new_shift == old_shift.group[g] ? splat(1.0f) : exp(old_shift.group[g] - new_shift));
    store(shift + g * kLanes, new_shift);
    // All logits so far -inf (only the target seen): subtract 0 instead of -inf.
    subtract.group[g] = new_shift == kMinusInfinity ? Floats{} : new_shift;
    one.group[g] = splat(1.0f);
  }
  Lanes<kGroups> sum{}, moment{};
  if (out.by_row != nullptr || out.by_class != nullptr) {
    exponentials<kGroups, kForm, kMetrics, true>(z, classes, bias, logit_map, subtract, one, sum, moment, out);
  } else {
    exponentials<kGroups, kForm, kMetrics, false>(z, classes, bias, logit_map, subtract, one, sum, moment, out);
  }
  for (int g = 0; g < kGroups; ++g) {
    const Floats before = load(total + g * kLanes), scale = load(factor + g * kLanes);
    if constexpr (kMetrics) {
      float* to = &sums.moment[first + g * kLanes];
      store(to, moved_moment(load(to), before, old_shift.group[g], load(shift + g * kLanes), scale) + moment.group[g]);
    }
    store(total + g * kLanes, before * scale + sum.group[g]);
  }
}

// One panel of a tile with known statistics.
template <int kGroups, Form kForm>
VRPO_AVX512_BF16 void weigh(const float* z, int64_t classes, const float* bias, const LogitMap& map,
                            const float* shift, const float* coefficient, const Probabilities& out) {
  Lanes<kGroups> subtract, multiply, unused{};
  for (int g = 0; g < kGroups; ++g) {
    subtract.group[g] = load(shift + g * kLanes);
    multiply.group[g] = load(coefficient + g * kLanes);
  }
  exponentials<kGroups, kForm, false, true>(z, classes, bias, map, subtract, multiply, unused, unused, out);
}

// The function of the same name for rows of bf16.
VRPO_AVX512_BF16 double row_sum(const BFloat16* row, const float* factor, int64_t size) {
  constexpr int64_t kBlock = 64 * kLanes;  // summed in fp32 lanes
  double sum = 0;
  for (int64_t n0 = 0; n0 < size; n0 += kBlock) {
    __m512 lanes = _mm512_setzero_ps();
    for (int64_t n = n0; n < std::min(n0 + kBlock, size); n += kLanes) {
      const __mmask16 inside = size - n >= kLanes ? 0xffff : (1u << (size - n)) - 1;
      const __m512 value = widen(_mm256_maskz_loadu_epi16(inside, row + n));
      const __m512 multiply = factor == nullptr ? _mm512_set1_ps(1.0f) : _mm512_maskz_loadu_ps(inside, factor + n);
      lanes = _mm512_fmadd_ps(value, multiply, lanes);
    }
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  }
  return sum;
}

// body.operator()<width / kLanes>()
template <typename Body>
void for_width(int64_t width, const Body& body) {
  switch (width / kLanes) {
    case 1: return body.template operator()<1>();
    case 2: return body.template operator()<2>();
    case 3: return body.template operator()<3>();
    default: return body.template operator()<kWidth / kLanes>();
  }
}

// The two functions above for a panel of this width and the tile from class v0 on.
void fold(int64_t width, const float* z, int64_t classes, const Head& head, int64_t v0, int64_t first, RowSums& sums,
          const Probabilities& out) {
  const float* bias = head.bias(v0);
  for_width(width, [&]<int kGroups>() {
    for_form(head.form, [&]<Form kForm>() {
      if (sums.metrics()) {
        fold<kGroups, kForm, true>(z, classes, bias, head.map, first, sums, out);
      } else {
        fold<kGroups, kForm, false>(z, classes, bias, head.map, first, sums, out);
      }
    });
  });
}

void weigh(int64_t width, const float* z, int64_t classes, const Head& head, int64_t v0, const float* shift,
           const float* coefficient, const Probabilities& out) {
  const float* bias = head.bias(v0);
  for_width(width, [&]<int kGroups>() {
    for_form(head.form, [&]<Form kForm>() {
      weigh<kGroups, kForm>(z, classes, bias, head.map, shift, coefficient, out);
    });
  });
}

}  // namespace
}  // namespace vrpo
