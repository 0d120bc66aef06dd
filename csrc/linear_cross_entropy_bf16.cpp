// linear_cross_entropy of bf16 inputs by bf16 x bf16 -> fp32 matrix multiplications, oneDNN's micro-kernels.
//
// The same algorithm as in linear_cross_entropy.cpp, with three differences. The probabilities E = exp(z - m) are
// rounded to bf16 before they enter a matmul; sums, and with them nll, take them in fp32. A panel of kWidth rows goes
// from logits to probabilities while it is in the second-level cache. And what a matmul reads is laid out by the
// loops that produce it: right operands in panels of kWidth columns whose 32-bit words hold two values that are
// neighbours along the summed dimension (VNNI), left operands with the summed dimension contiguous.
//
// Every output has one owner that sums in one order, so the bits do not depend on the number of threads.

#include "linear_cross_entropy.h"

#ifndef VRPO_BF16_ROUTE

namespace vrpo {

namespace {
[[noreturn]] void refuse() {
  TORCH_CHECK_VALUE(false, "gemm 'bf16' needs Linux on x86-64 and a torch with bf16 micro-kernels");
}
}  // namespace

bool bf16_route_runs() { return false; }
bool bf16_route_is_fastest() { return false; }
ForwardResult bf16_forward(const Tensor&, const Tensor&, const Tensor&, const Head&, bool, bool, bool) { refuse(); }
std::tuple<Tensor, Tensor> bf16_dweight(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Statistics&,
                                        const Tensor&, const Tensor&, bool, bool) {
  refuse();
}
std::tuple<Tensor, Tensor, Tensor> bf16_sweep(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                              const Statistics&, const Head&, bool, bool, bool) {
  refuse();
}

}  // namespace vrpo

#else

#include <ATen/ops/zeros.h>
// gcc's own headers of intrinsics raise these
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <cpuid.h>
#include <immintrin.h>

// Reached only where bf16_route_runs().
#define VRPO_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace vrpo {
namespace {

using at::BFloat16;
using Word = uint32_t;  // two bf16 values, the first in the low half

constexpr int64_t kWidth = 64;  // columns of a panel
constexpr int64_t kDepth = 1024;  // products summed in one call: bounds what a panel takes of the cache
constexpr int64_t kHeight = 128;  // classes per task of dweight

int64_t panels_of(int64_t columns) { return (columns + kWidth - 1) / kWidth; }

BFloat16* bf16_data(const Tensor& t) { return t.data_ptr<BFloat16>(); }

// out = a b, or out += a b, for one panel of b; out and a have rows of stride 1.
void multiply(float* out, int64_t out_stride, const BFloat16* a, int64_t a_stride, const Word* panel, int64_t height,
              int64_t width, int64_t depth, bool accumulate) {
  for (int64_t k = 0; k < depth; k += kDepth) {
    at::native::cpublas::brgemm(height, width, std::min(kDepth, depth - k), a_stride, kWidth, out_stride,
                                accumulate || k > 0, a + k, reinterpret_cast<const BFloat16*>(panel + k / 2 * kWidth),
                                out, true);
  }
}

// body(task, thread) for every task; `thread` picks a scratch buffer.
template <typename Body>
void parallel_tasks(int64_t tasks, const Body& body) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t thread = at::get_thread_num();
    for (int64_t task = begin; task < end; ++task) body(task, thread);
    at::native::cpublas::brgemm_release(true);
  });
}

// ---- layouts -------------------------------------------------------------------------------------------------------

// to[i] = (a[i], b[i])
VRPO_AVX512_BF16 void interleave(const BFloat16* a, const BFloat16* b, int64_t size, Word* to) {
  const __m512i low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                       5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  int64_t i = 0;
  for (; i + 32 <= size; i += 32) {
    const __m512i first = _mm512_loadu_si512(a + i), second = _mm512_loadu_si512(b + i);
    _mm512_storeu_si512(to + i, _mm512_permutex2var_epi16(first, low, second));
    _mm512_storeu_si512(to + i + 16, _mm512_permutex2var_epi16(first, high, second));
  }
  for (; i < size; ++i) to[i] = static_cast<Word>(b[i].x) << 16 | a[i].x;
}

// Vectors are handed between functions by reference or inline only: how a call passes 64 bytes depends on its target.
VRPO_INLINE VRPO_AVX512_BF16 __m512 widen(__m256i values) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

VRPO_INLINE VRPO_AVX512_BF16 __m256i to_bf16(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }

VRPO_INLINE VRPO_AVX512_BF16 __m512i pair(__m256i low, __m256i high) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

VRPO_INLINE VRPO_AVX512_BF16 void store_rounded(BFloat16* to, Floats values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), to_bf16((__m512)values));
}

// to[i] = (factor_a a[i], factor_b b[i]), rounded
VRPO_AVX512_BF16 void interleave_scaled(const BFloat16* a, float factor_a, const BFloat16* b, float factor_b,
                                        int64_t size, Word* to) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 inside = size - i >= 16 ? 0xffff : (1u << (size - i)) - 1;
    const __m512 first = widen(_mm256_maskz_loadu_epi16(inside, a + i));
    const __m512 second = widen(_mm256_maskz_loadu_epi16(inside, b + i));
    _mm512_mask_storeu_epi32(to + i, inside, pair(to_bf16(_mm512_mul_ps(first, _mm512_set1_ps(factor_a))),
                                                  to_bf16(_mm512_mul_ps(second, _mm512_set1_ps(factor_b)))));
  }
}

VRPO_AVX512_BF16 void add_row(float* to, const BFloat16* from, float factor, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 inside = size - i >= 16 ? 0xffff : (1u << (size - i)) - 1;
    const __m512 product = _mm512_mul_ps(widen(_mm256_maskz_loadu_epi16(inside, from + i)), _mm512_set1_ps(factor));
    _mm512_mask_storeu_ps(to + i, inside, _mm512_add_ps(_mm512_maskz_loadu_ps(inside, to + i), product));
  }
}

VRPO_AVX512_BF16 void round_row(BFloat16* to, const float* from, int64_t size) {
  for (int64_t i = 0; i < size; i += 16) {
    const __mmask16 inside = size - i >= 16 ? 0xffff : (1u << (size - i)) - 1;
    _mm256_mask_storeu_epi16(to + i, inside, to_bf16(_mm512_maskz_loadu_ps(inside, from + i)));
  }
}

// words[i] of 16 vectors, an [16, 16] matrix, transposed
VRPO_AVX512_BF16 void transpose(__m512i (&rows)[16]) {
  __m512i t[16];
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    rows[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    rows[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    rows[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // 128-bit blocks: [a0 a1 a2 a3] of four vectors
    t[i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    rows[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    rows[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    rows[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    rows[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// Rows n0 .. n0 + rows of x as the right operand of W x^T: panels of `width` rows, lanes beyond the last row 0.
class RowPanels {
 public:
  RowPanels(const Tensor& x, int64_t n0, int64_t rows, int64_t width)
      : lanes_(round_up(rows, kLanes)), width_(width), depth_(round_up(x.size(1), 2)) {
    words_ = at::zeros({count(), depth_ / 2, kWidth}, x.options().dtype(at::kInt));
    const int64_t D = x.size(1);
    const BFloat16* from = bf16_data(x) + n0 * D;
    Word* to = reinterpret_cast<Word*>(words_.data_ptr<int32_t>());
    at::parallel_for(0, count(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t n = begin * width_; n < std::min(end * width_, rows); ++n) {
        const BFloat16* row = from + n * D;
        Word* lane = to + n / width_ * (depth_ / 2 * kWidth) + n % width_;
        for (int64_t d = 0; d + 1 < D; d += 2, lane += kWidth) std::memcpy(lane, row + d, sizeof(Word));
        if (D % 2 == 1) *lane = row[D - 1].x;
      }
    });
  }
  int64_t count() const { return (lanes_ + width_ - 1) / width_; }
  int64_t width(int64_t panel) const { return std::min(width_, lanes_ - panel * width_); }
  const Word* operator[](int64_t panel) const {
    return reinterpret_cast<const Word*>(words_.const_data_ptr<int32_t>()) + panel * (depth_ / 2 * kWidth);
  }

 private:
  int64_t lanes_, width_, depth_;
  Tensor words_;
};

// Columns of x as the right operand of P x, summed over rows, each row scaled. Rows beyond the last repeat it or are 0:
// their factors, or the probabilities they meet, are 0.
class ColumnPanels {
 public:
  explicit ColumnPanels(const Tensor& x)
      : x_(x), pairs_(round_up(x.size(0), kLanes) / 2),
        words_(at::zeros({panels_of(x.size(1)), pairs_, kWidth}, x.options().dtype(at::kInt))) {}
  // Rows 2 pair and 2 pair + 1.
  void set(int64_t pair, float first_factor, float second_factor) {
    const int64_t N = x_.size(0), D = x_.size(1);
    if (2 * pair >= N) return;
    const BFloat16* first = bf16_data(x_) + 2 * pair * D;
    const BFloat16* second = 2 * pair + 1 < N ? first + D : first;
    for (int64_t j = 0; j < D; j += kWidth) {
      interleave_scaled(first + j, first_factor, second + j, second_factor, std::min(kWidth, D - j),
                        words() + (j / kWidth * pairs_ + pair) * kWidth);
    }
  }
  int64_t pairs() const { return pairs_; }
  // The panel of columns, from row n on.
  const Word* at(int64_t panel, int64_t n) { return words() + (panel * pairs_ + n / 2) * kWidth; }

 private:
  Word* words() { return reinterpret_cast<Word*>(words_.data_ptr<int32_t>()); }
  Tensor x_;
  int64_t pairs_;
  Tensor words_;
};

// The head, one tile of classes at a time, with pairs of columns: a view, or one reused buffer.
class HeadTiles {
 public:
  explicit HeadTiles(const Tensor& weight)
      : weight_(weight),
        direct_(weight.stride(1) == 1 && weight.size(1) % 2 == 0),
        depth_(round_up(weight.size(1), 2)) {
    if (!direct_) buffer_ = at::zeros({kTile, depth_}, weight.options());
  }
  int64_t count() const { return (weight_.size(0) + kTile - 1) / kTile; }
  int64_t begin(int64_t tile) const { return tile * kTile; }
  int64_t size(int64_t tile) const { return std::min(kTile, weight_.size(0) - tile * kTile); }
  int64_t depth() const { return depth_; }
  int64_t stride() const { return direct_ ? weight_.stride(0) : depth_; }
  const BFloat16* load(int64_t tile) {
    const Tensor view = weight_.narrow(0, begin(tile), size(tile));
    if (direct_) return view.const_data_ptr<BFloat16>();
    buffer_.narrow(0, 0, size(tile)).narrow(1, 0, weight_.size(1)).copy_(view);
    return buffer_.const_data_ptr<BFloat16>();
  }

 private:
  Tensor weight_, buffer_;
  bool direct_;
  int64_t depth_;
};

// One panel of a tile as the right operand of P W, summed over classes.
void pack_classes(const BFloat16* w, int64_t stride, int64_t classes, int64_t width, Word* to) {
  static const BFloat16 zeros[kWidth] = {};
  for (int64_t v = 0; v < classes; v += 2, to += kWidth) {
    interleave(w + v * stride, v + 1 < classes ? w + (v + 1) * stride : zeros, width, to);
  }
}

// ---- logits to probabilities ---------------------------------------------------------------------------------------

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
template <int kGroups, Form kForm, bool kMetrics>
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
          subtotal += e[i];
          if constexpr (kMetrics) submoment += e[i] * (above[i] < -100.0f ? Floats{} : above[i]);  // not 0 * -inf
          if constexpr (kForm == Form::kCapped) e[i] *= slope[i];
        }
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
      sum.group[g] += subtotal;
      if constexpr (kMetrics) moment.group[g] += submoment;
      if (out.by_row != nullptr) {
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
  exponentials<kGroups, kForm, kMetrics>(z, classes, bias, logit_map, subtract, one, sum, moment, out);
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
  exponentials<kGroups, kForm, false>(z, classes, bias, map, subtract, multiply, unused, unused, out);
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

// Rows per panel: kWidth, or fewer where there would be less than one panel per thread.
int64_t panel_width(int64_t rows) {
  const int64_t share = (rows + at::get_num_threads() - 1) / at::get_num_threads();
  return std::clamp(round_up(share, kLanes), kLanes, kWidth);
}

// What the three functions below have in common: the head's tiles and the buffers of each thread.
struct Workspace {
  HeadTiles tiles;
  Tensor logits, panel;
  explicit Workspace(const Tensor& weight)
      : tiles(weight),
        logits(at::empty({at::get_num_threads(), kTile, kWidth}, weight.options().dtype(at::kFloat))),
        panel(at::empty({at::get_num_threads(), kTile / 2, kWidth}, weight.options().dtype(at::kInt))) {}

  // Logits z [classes, kWidth] of one panel of rows; then every target's logit is -inf.
  const float* panel_logits(int64_t thread, int64_t tile, const BFloat16* w, const RowPanels& x, int64_t panel,
                            int64_t first_row, const TargetIndex& targets) {
    float* z = logits.data_ptr<float>() + thread * kTile * kWidth;
    const int64_t v0 = tiles.begin(tile), classes = tiles.size(tile), width = x.width(panel);
    multiply(z, kWidth, w, tiles.stride(), x[panel], classes, width, tiles.depth(), false);
    targets.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) {
      if (n >= first_row && n < first_row + width) z[(v - v0) * kWidth + n - first_row] = kMinusInfinity;
    });
    std::fill(z + classes * kWidth, z + round_up(classes, kSubtotal) * kWidth, kMinusInfinity);
    return z;
  }

  // Columns [j, j + kWidth) of out [rows, D] += P W; rows of out are first multiplied with `factor` (null: 1).
  void add_head_rows(int64_t thread, int64_t tile, const BFloat16* w, const BFloat16* by_row, int64_t rows,
                     const float* factor, float* out, int64_t D, int64_t j) {
    Word* words = reinterpret_cast<Word*>(panel.data_ptr<int32_t>()) + thread * (kTile / 2 * kWidth);
    const int64_t classes = tiles.size(tile), width = std::min(kWidth, D - j);
    if (tile > 0 && factor != nullptr) {
      for (int64_t n = 0; n < rows; ++n) {
        if (factor[n] != 1.0f) scale_row(out + n * D + j, out + n * D + j, factor[n], width);
      }
    }
    pack_classes(w + j, tiles.stride(), classes, width, words);
    multiply(out + j, D, by_row, kTile, words, rows, width, round_up(classes, 2), tile > 0);
  }
};

void require_route(const Tensor& hidden) {
  TORCH_CHECK_VALUE(hidden.scalar_type() == at::kBFloat16, "gemm 'bf16' needs bfloat16 hidden and weight, got ",
                    hidden.scalar_type());
  TORCH_CHECK_VALUE(bf16_route_runs(), "gemm 'bf16' needs a processor with AVX512_BF16 and oneDNN's use of it");
}

}  // namespace

// The processor's flags do not tell whether this torch has the micro-kernels or ONEDNN_MAX_CPU_ISA forbids them. One
// product of small integers does, and every order of summation gets it exactly right.
bool bf16_route_runs() {
  static const bool runs = [] {
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512bw") ||
        !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
      return false;
    }
    constexpr int64_t M = 21, N = 48, K = 70;
    std::vector<BFloat16> a(M * K), b(K / 2 * kWidth * 2);
    std::vector<float> out(M * N);
    for (int64_t i = 0; i < M * K; ++i) a[i] = static_cast<float>(i % 13 - 6);
    const auto right = [](int64_t k, int64_t j) { return static_cast<float>((3 * k + 5 * j) % 11 - 5); };
    for (int64_t k = 0; k < K; ++k) {
      for (int64_t j = 0; j < N; ++j) b[(k / 2 * kWidth + j) * 2 + k % 2] = right(k, j);
    }
    try {
      multiply(out.data(), N, a.data(), K, reinterpret_cast<const Word*>(b.data()), M, N, K, false);
      at::native::cpublas::brgemm_release(true);
    } catch (const std::exception&) {
      return false;
    }
    for (int64_t i = 0; i < M; ++i) {
      for (int64_t j = 0; j < N; ++j) {
        float expected = 0;
        for (int64_t k = 0; k < K; ++k) expected += static_cast<float>(a[i * K + k]) * right(k, j);
        if (out[i * N + j] != expected) return false;
      }
    }
    return true;
  }();
  return runs;
}

// bf16 matmuls have twice the rate of fp32 ones on AMD processors with AVX512_BF16 and many times that with AMX, but
// half of it on Intel's without AMX.
bool bf16_route_is_fastest() {
  __builtin_cpu_init();
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  const bool amx_bf16 = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);
  return bf16_route_runs() && (__builtin_cpu_is("amd") || amx_bf16);
}

ForwardResult bf16_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const Head& head,
                           bool want_dhidden, bool keep_tiles, bool want_metrics) {
  require_route(hidden);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const TargetIndex index(targets, V);
  const Tensor x = hidden.contiguous();
  Workspace workspace(weight);
  HeadTiles& tiles = workspace.tiles;
  const int64_t padded = round_up(N, kLanes), chunk = chunk_rows(N), width = panel_width(chunk);

  Tensor nll = at::empty({N}, fp32), statistics = at::empty({3, N}, fp32);
  Tensor expected = at::empty({want_dhidden ? N : 0, want_dhidden ? D : 0}, fp32);
  Tensor kept = at::empty({keep_tiles ? V : 0, keep_tiles ? padded : 0}, x.options());
  Tensor kept_shift = at::empty({keep_tiles ? tiles.count() : 0, keep_tiles ? padded : 0}, fp32);
  Tensor by_row = at::empty({want_dhidden ? chunk : 0, kTile}, x.options());
  Tensor metrics = at::empty({want_metrics ? 2 : 0, want_metrics ? N : 0}, fp32);

  fill_targets(hidden, weight, index, head, statistics.data_ptr<float>());
  RowSums sums(chunk, want_metrics);
  for (int64_t n0 = 0; n0 < N; n0 += chunk) {
    const int64_t rows = std::min(chunk, N - n0);
    const RowPanels panels(x, n0, rows, width);
    sums.reset();
    for (int64_t t = 0; t < tiles.count(); ++t) {
      const BFloat16* w = tiles.load(t);
      parallel_tasks(panels.count(), [&](int64_t p, int64_t thread) {
        const int64_t first = p * width;
        const float* z = workspace.panel_logits(thread, t, w, panels, p, n0 + first, index);
        const Probabilities out{want_dhidden ? bf16_data(by_row) + first * kTile : nullptr,
                                keep_tiles ? bf16_data(kept) + tiles.begin(t) * padded + n0 + first : nullptr, padded};
        fold(panels.width(p), z, tiles.size(t), head, tiles.begin(t), first, sums, out);
        if (keep_tiles) {
          std::copy_n(&sums.shift[first], panels.width(p), kept_shift.data_ptr<float>() + t * padded + n0 + first);
        }
      });
      if (!want_dhidden) continue;
      float* rows_of_head = expected.data_ptr<float>() + n0 * D;
      parallel_tasks(panels_of(D), [&](int64_t j, int64_t thread) {
        workspace.add_head_rows(thread, t, w, bf16_data(by_row), rows, sums.factor.data(), rows_of_head, D,
                                j * kWidth);
      });
    }
    finish_rows(n0, rows, sums, head.map, statistics, nll, expected, metrics);
  }
  return {nll, statistics, expected, kept, kept_shift, metrics};
}

std::tuple<Tensor, Tensor> bf16_dweight(const Tensor& dnll, const Tensor& hidden, const Tensor& weight,
                                        const Tensor& targets, const Statistics& known, const Tensor& kept,
                                        const Tensor& kept_shift, bool want_dweight, bool want_dbias) {
  require_route(hidden);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0), padded = kept.size(1);
  const TargetIndex index(targets, V);
  const Tensor g = dnll.contiguous(), x = hidden.contiguous();
  const float* upstream = g.const_data_ptr<float>();
  Tensor dw = at::empty({want_dweight ? V : 0, want_dweight ? D : 0}, x.options());
  BiasGradient bias_gradient(weight, want_dbias);
  if (N == 0) return {dw.zero_(), bias_gradient.out()};
  Tensor scratch = at::empty({at::get_num_threads(), kHeight, kWidth}, kept_shift.options());

  // Each tile was kept as exp(logit - m_t) slope; the row's factor g q scale / s exp(m_t - m) goes on x, which is
  // smaller.
  ColumnPanels columns(want_dweight ? x : x.narrow(1, 0, 0));
  std::vector<double> others(N);
  std::vector<float> at_target(N), factors(padded, 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    others[n] = known.other(n);
    at_target[n] = static_cast<float>(-upstream[n] * others[n] * known.slope(n));
  }
  const auto factor = [&](int64_t n, const float* tile_shift) {
    // Only the target was seen in this tile: E is 0 there and its shift is -inf.
    return n >= N || known.total[n] == 0 || tile_shift[n] == kMinusInfinity
        ? 0.0f
        : static_cast<float>(upstream[n] * others[n] / known.total[n] * std::exp(tile_shift[n] - known.shift[n]));
  };
  const int64_t num_tiles = kept_shift.size(0);
  const float* previous = nullptr;
  for (int64_t t = 0; t < num_tiles;) {
    const float* tile_shift = kept_shift.const_data_ptr<float>() + t * padded;
    at::parallel_for(0, columns.pairs(), 32, [&](int64_t begin, int64_t end) {
      for (int64_t pair = begin; pair < end; ++pair) {
        const int64_t n = 2 * pair;
        if (previous != nullptr && previous[n] == tile_shift[n] && previous[n + 1] == tile_shift[n + 1]) continue;
        factors[n] = factor(n, tile_shift);
        factors[n + 1] = factor(n + 1, tile_shift);
        columns.set(pair, factors[n], factors[n + 1]);
      }
    });
    previous = tile_shift;
    // The shift hardly moves after the first tiles: all tiles with the same shifts at once.
    int64_t next = t + 1;
    while (next < num_tiles && std::equal(tile_shift, tile_shift + padded, tile_shift + (next - t) * padded)) ++next;
    const int64_t first = t * kTile, last = std::min(V, next * kTile);
    parallel_tasks((last - first + kHeight - 1) / kHeight, [&](int64_t task, int64_t thread) {
      const int64_t v0 = first + task * kHeight, classes = std::min(kHeight, last - v0);
      float* block = scratch.data_ptr<float>() + thread * kHeight * kWidth;
      for (int64_t j = 0; j < dw.size(1); j += kWidth) {
        const int64_t width = std::min(kWidth, D - j);
        multiply(block, kWidth, bf16_data(kept) + v0 * padded, padded, columns.at(j / kWidth, 0), classes, width,
                 padded, false);
        index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) {
          add_row(block + (v - v0) * kWidth, bf16_data(x) + n * D + j, at_target[n], width);
        });
        for (int64_t v = 0; v < classes; ++v) round_row(bf16_data(dw) + (v0 + v) * D + j, block + v * kWidth, width);
      }
      if (!want_dbias) return;
      for (int64_t v = v0; v < v0 + classes; ++v) {
        bias_gradient.add(v, row_sum(bf16_data(kept) + v * padded, factors.data(), N));
      }
      index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) { bias_gradient.add(v, at_target[n]); });
    });
    t = next;
  }
  return {dw, bias_gradient.out()};
}

std::tuple<Tensor, Tensor, Tensor> bf16_sweep(const Tensor& dnll, const Tensor& hidden, const Tensor& weight,
                                              const Tensor& targets, const Statistics& statistics, const Head& head,
                                              bool want_dhidden, bool want_dweight, bool want_dbias) {
  require_route(hidden);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const TargetIndex index(targets, V);
  const KnownRows known(dnll, statistics);
  const Tensor x = hidden.contiguous();
  Workspace workspace(weight);
  HeadTiles& tiles = workspace.tiles;
  const int64_t chunk = chunk_rows(N), width = panel_width(chunk);

  Tensor dx = at::empty({want_dhidden ? N : 0, want_dhidden ? D : 0}, fp32);
  Tensor dw = at::empty({want_dweight ? V : 0, want_dweight ? D : 0}, x.options());
  BiasGradient bias_gradient(weight, want_dbias);
  if (N == 0) return {dx.to(at::kBFloat16), dw.zero_(), bias_gradient.out()};
  Tensor dw_tile = at::empty({want_dweight ? std::min(V, kTile) : 0, D}, fp32);
  Tensor by_row = at::empty({want_dhidden ? chunk : 0, kTile}, x.options());
  const bool by_class_wanted = want_dweight || want_dbias;
  Tensor by_class = at::empty({by_class_wanted ? kTile : 0, chunk}, x.options());
  std::vector<RowPanels> chunks;
  for (int64_t n0 = 0; n0 < N; n0 += chunk) chunks.emplace_back(x, n0, std::min(chunk, N - n0), width);
  ColumnPanels columns(x);
  if (want_dweight) {
    for (int64_t pair = 0; pair < columns.pairs(); ++pair) columns.set(pair, 1.0f, 1.0f);
  }

  for (int64_t t = 0; t < tiles.count(); ++t) {
    const BFloat16* w = tiles.load(t);
    const int64_t v0 = tiles.begin(t), classes = tiles.size(t);
    for (int64_t n0 = 0; n0 < N; n0 += chunk) {
      const RowPanels& panels = chunks[n0 / chunk];
      const int64_t rows = std::min(chunk, N - n0);
      parallel_tasks(panels.count(), [&](int64_t p, int64_t thread) {
        const int64_t first = p * width;
        const float* z = workspace.panel_logits(thread, t, w, panels, p, n0 + first, index);
        const Probabilities out{want_dhidden ? bf16_data(by_row) + first * kTile : nullptr,
                                by_class_wanted ? bf16_data(by_class) + first : nullptr, chunk};
        weigh(panels.width(p), z, classes, head, v0, &known.shift[n0 + first], &known.coefficient[n0 + first], out);
      });
      if (want_dbias) {
        at::parallel_for(0, classes, 16, [&](int64_t begin, int64_t end) {
          for (int64_t v = begin; v < end; ++v) {
            bias_gradient.add(v0 + v, row_sum(bf16_data(by_class) + v * chunk, nullptr, rows));
          }
        });
      }
      parallel_tasks(panels_of(D), [&](int64_t panel, int64_t thread) {
        const int64_t j = panel * kWidth, columns_here = std::min(kWidth, D - j);
        if (want_dhidden) {
          workspace.add_head_rows(thread, t, w, bf16_data(by_row), rows, nullptr, dx.data_ptr<float>() + n0 * D, D, j);
        }
        if (want_dweight) {
          multiply(dw_tile.data_ptr<float>() + j, D, bf16_data(by_class), chunk, columns.at(panel, n0), classes,
                   columns_here, round_up(rows, kLanes), n0 > 0);
        }
      });
    }
    if (want_dbias) {
      index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) { bias_gradient.add(v, known.at_target[n]); });
    }
    if (!want_dweight) continue;
    index.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) {
      add_row(dw_tile.data_ptr<float>() + (v - v0) * D, bf16_data(x) + n * D, known.at_target[n], D);
    });
    at::parallel_for(0, classes, 16, [&](int64_t begin, int64_t end) {
      for (int64_t v = begin; v < end; ++v) {
        round_row(bf16_data(dw) + (v0 + v) * D, dw_tile.data_ptr<float>() + v * D, D);
      }
    });
  }
  if (want_dhidden) known.finish(dx, weight, index, false);
  return {dx.to(at::kBFloat16), dw, bias_gradient.out()};
}

}  // namespace vrpo

#endif
