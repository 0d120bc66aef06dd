// How the bf16 route lays out what its matmuls read; for linear_cross_entropy_bf16.cpp only.
#pragma once

#include <ATen/ops/zeros.h>
// gcc's own headers of intrinsics raise these
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>

#include "linear_cross_entropy.h"

// Reached only where bf16_route_runs().
#define VRPO_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")))

namespace vrpo {
namespace {

using at::BFloat16;
using Word = uint32_t;  // two bf16 values, the first in the low half

constexpr int64_t kWidth = 64;  // columns of a panel

int64_t panels_of(int64_t columns) { return (columns + kWidth - 1) / kWidth; }

BFloat16* bf16_data(const Tensor& t) { return t.data_ptr<BFloat16>(); }

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
  int64_t first(int64_t panel) const { return panel * width_; }
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

}  // namespace
}  // namespace vrpo
