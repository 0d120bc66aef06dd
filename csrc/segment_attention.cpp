// Attention inside the segments of a pack on a CPU, float32: vrpo_kernels/segment_attention/reference.py without a
// tensor per segment. Scores are kept transposed, a key per row and a query per lane, so that maximum, sum and the
// sums of backward run down the rows and no vector is ever added up across its lanes. Work is split by segment and
// key head; what one thread computes depends on its own segment only, not on the pack or the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "common.h"

namespace vrpo {
namespace {

using at::Tensor;

constexpr int64_t kQueries = 64;  // of one head at a time: their scores with 128 keys fill an L1 cache
constexpr int64_t kRows = 4;      // of a tile of a product; rows of scratch are padded to it

int64_t round_up(int64_t size, int64_t unit) { return (size + unit - 1) / unit * unit; }

// A (T, heads, size) tensor whose heads are contiguous.
template <typename T>
struct Heads {
  T* data;
  int64_t token, head, size;
  T* at(int64_t t, int64_t h) const { return data + t * token + h * head; }
};

Heads<const float> view_of(const Tensor& tensor) {
  return {tensor.const_data_ptr<float>(), tensor.stride(0), tensor.stride(1), tensor.size(2)};
}
Heads<float> written(const Tensor& tensor) {
  return {tensor.data_ptr<float>(), tensor.stride(0), tensor.stride(1), tensor.size(2)};
}

// Aligned pieces of one allocation.
class Scratch {
 public:
  explicit Scratch(int64_t size) : memory_(size + kLanes) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data()) / sizeof(float);
    next_ = memory_.data() + (round_up(address, kLanes) - address);
  }
  float* take(int64_t size) {
    float* piece = next_;
    next_ += round_up(size, kLanes);
    return piece;
  }

 private:
  std::vector<float> memory_;
  float* next_;
};

// C = A B, or += with kAdd, for one tile: rows x (16 vectors). A is read one number at a time.
template <int kTileRows, int kVectors, bool kAdd>
VRPO_INLINE void multiply_tile(const float* a, int64_t a_row, int64_t a_inner, int64_t inner, const float* b,
                               int64_t b_row, float* c, int64_t c_row) {
  Floats sum[kTileRows][kVectors];
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = kAdd ? load(c + r * c_row + v * kLanes) : Floats{};
  for (int64_t k = 0; k < inner; ++k) {
    Floats column[kVectors];
    for (int v = 0; v < kVectors; ++v) column[v] = load(b + k * b_row + v * kLanes);
    for (int r = 0; r < kTileRows; ++r) {
      const Floats value = splat(a[r * a_row + k * a_inner]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] += value * column[v];
    }
  }
  for (int r = 0; r < kTileRows; ++r)
    for (int v = 0; v < kVectors; ++v) store(c + r * c_row + v * kLanes, sum[r][v]);
}

// C (rows x columns) = or += A (rows x inner) B (inner x columns); rows of 4, columns of 16.
template <bool kAdd>
VRPO_INLINE void multiply(const float* a, int64_t a_row, int64_t a_inner, int64_t rows, int64_t inner,
                          const float* b, int64_t b_row, int64_t columns, float* c, int64_t c_row) {
  int64_t v = 0;
  for (; v + 2 * kLanes <= columns; v += 2 * kLanes)
    for (int64_t r = 0; r < rows; r += kRows)
      multiply_tile<kRows, 2, kAdd>(a + r * a_row, a_row, a_inner, inner, b + v, b_row, c + r * c_row + v, c_row);
  if (v == columns) return;
  int64_t r = 0;
  for (; r + 2 * kRows <= rows; r += 2 * kRows)
    multiply_tile<2 * kRows, 1, kAdd>(a + r * a_row, a_row, a_inner, inner, b + v, b_row, c + r * c_row + v, c_row);
  if (r < rows)
    multiply_tile<kRows, 1, kAdd>(a + r * a_row, a_row, a_inner, inner, b + v, b_row, c + r * c_row + v, c_row);
}

// factor * (count x size) with the rows `stride` apart -> rows of `width` floats, zeros where there is nothing.
VRPO_INLINE void copy_rows(const float* from, int64_t stride, int64_t count, int64_t size, float factor, float* to,
                           int64_t width) {
  for (int64_t i = 0; i < count; ++i) {
    for (int64_t c = 0; c < size; ++c) to[i * width + c] = factor * from[i * stride + c];
    for (int64_t c = size; c < width; ++c) to[i * width + c] = 0.0f;
  }
  std::fill_n(to + count * width, (round_up(count, kRows) - count) * width, 0.0f);
}

// Rows of `width` floats -> their transpose (size x lanes), zeros in the lanes from count on.
VRPO_INLINE void transpose(const float* rows, int64_t width, int64_t count, int64_t size, float* to, int64_t lanes) {
  for (int64_t c = 0; c < size; ++c) {
    for (int64_t i = 0; i < count; ++i) to[c * lanes + i] = rows[i * width + c];
    for (int64_t i = count; i < lanes; ++i) to[c * lanes + i] = 0.0f;
  }
}

struct Sizes {
  int64_t longest, head_size;
  int64_t width() const { return round_up(head_size, kLanes); }
  int64_t rows() const { return round_up(longest, kRows); }
  int64_t queries() const { return round_up(std::min(longest, kQueries), kLanes); }
};

// Scratch of one thread. keys, values: (rows x width); query: (queries x width) and its transpose; scores:
// (rows x queries), transposed; out: (queries x width).
struct ForwardScratch {
  explicit ForwardScratch(Sizes s)
      : memory(2 * s.rows() * s.width() + 3 * s.queries() * s.width() + s.rows() * s.queries() + 2 * s.queries()),
        keys(memory.take(s.rows() * s.width())),
        values(memory.take(s.rows() * s.width())),
        query(memory.take(s.queries() * s.width())),
        query_t(memory.take(s.queries() * s.width())),
        out(memory.take(s.queries() * s.width())),
        scores(memory.take(s.rows() * s.queries())),
        maximum(memory.take(s.queries())),
        total(memory.take(s.queries())) {}
  Scratch memory;
  float *keys, *values, *query, *query_t, *out, *scores, *maximum, *total;
};

// Scores of one block -> exp(score - maximum), its maximum and sum per query.
VRPO_INLINE void soften(float* scores, int64_t keys, int64_t lanes, float* maximum, float* total) {
  for (int64_t v = 0; v < lanes; v += kLanes) {
    Floats highest = splat(kMinusInfinity), sum{};
    for (int64_t j = 0; j < keys; ++j) {
      const Floats score = load(scores + j * lanes + v);
      highest = score > highest ? score : highest;
    }
    for (int64_t j = 0; j < keys; ++j) {
      const Floats weight = exp(load(scores + j * lanes + v) - highest);
      sum += weight;
      store(scores + j * lanes + v, weight);
    }
    store(maximum + v, highest);
    store(total + v, sum);
  }
}

// One segment and one key head, with every query head that reads it.
VRPO_CLONES void forward_item(Heads<const float> query, Heads<const float> key, Heads<const float> value,
                              Heads<float> out, float* maximum, float* share, int64_t num_tokens, int64_t start, int64_t length,
                              int64_t key_head, int64_t group, float scale, ForwardScratch& s) {
  const int64_t size = query.size, width = round_up(size, kLanes);
  copy_rows(key.at(start, key_head), key.token, length, size, 1.0f, s.keys, width);
  copy_rows(value.at(start, key_head), value.token, length, size, 1.0f, s.values, width);
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int64_t first = 0; first < length; first += kQueries) {
      const int64_t count = std::min(kQueries, length - first), lanes = round_up(count, kLanes);
      copy_rows(query.at(start + first, head), query.token, count, size, scale, s.query, width);
      transpose(s.query, width, count, size, s.query_t, lanes);
      multiply<false>(s.keys, width, 1, round_up(length, kRows), size, s.query_t, lanes, lanes, s.scores, lanes);
      soften(s.scores, length, lanes, s.maximum, s.total);
      multiply<false>(s.scores, 1, lanes, round_up(count, kRows), length, s.values, width, width, s.out, width);
      for (int64_t i = 0; i < count; ++i) {
        float* to = out.at(start + first + i, head);
        const int64_t place = head * num_tokens + start + first + i;
        maximum[place] = s.maximum[i];
        share[place] = 1.0f / s.total[i];
        for (int64_t c = 0; c < size; ++c) to[c] = share[place] * s.out[i * width + c];
      }
    }
  }
}

struct BackwardScratch {
  explicit BackwardScratch(Sizes s)
      : memory(4 * s.rows() * s.width() + 5 * s.queries() * s.width() + 2 * s.rows() * s.queries() + 2 * s.queries()),
        keys(memory.take(s.rows() * s.width())),
        values(memory.take(s.rows() * s.width())),
        dkeys(memory.take(s.rows() * s.width())),
        dvalues(memory.take(s.rows() * s.width())),
        query(memory.take(s.queries() * s.width())),
        query_t(memory.take(s.queries() * s.width())),
        dout(memory.take(s.queries() * s.width())),
        dout_t(memory.take(s.queries() * s.width())),
        dquery(memory.take(s.queries() * s.width())),
        weights(memory.take(s.rows() * s.queries())),
        dscores(memory.take(s.rows() * s.queries())),
        maximum(memory.take(s.queries())),
        share(memory.take(s.queries())) {}
  Scratch memory;
  float *keys, *values, *dkeys, *dvalues, *query, *query_t, *dout, *dout_t, *dquery, *weights, *dscores;
  float *maximum, *share;
};

// scores, dweights -> weights = share * exp(score - maximum), as forward has them, and
// dscores = weights * (dweights - sum over keys of both's product).
VRPO_INLINE void harden(float* scores, float* dweights, const float* maximum, const float* share, int64_t keys,
                        int64_t lanes) {
  for (int64_t v = 0; v < lanes; v += kLanes) {
    const Floats highest = load(maximum + v), part = load(share + v);
    Floats sum{};
    for (int64_t j = 0; j < keys; ++j) {
      const Floats weight = part * exp(load(scores + j * lanes + v) - highest);
      sum += weight * load(dweights + j * lanes + v);
      store(scores + j * lanes + v, weight);
    }
    for (int64_t j = 0; j < keys; ++j) {
      const Floats weight = load(scores + j * lanes + v);
      store(dweights + j * lanes + v, weight * (load(dweights + j * lanes + v) - sum));
    }
  }
}

VRPO_CLONES void backward_item(Heads<const float> dout, Heads<const float> query, Heads<const float> key,
                               Heads<const float> value, const float* maximum, const float* share, Heads<float> dquery,
                               Heads<float> dkey, Heads<float> dvalue, int64_t num_tokens, int64_t start,
                               int64_t length, int64_t key_head, int64_t group, float scale, BackwardScratch& s) {
  const int64_t size = query.size, width = round_up(size, kLanes), rows = round_up(length, kRows);
  copy_rows(key.at(start, key_head), key.token, length, size, 1.0f, s.keys, width);
  copy_rows(value.at(start, key_head), value.token, length, size, 1.0f, s.values, width);
  std::fill_n(s.dkeys, rows * width, 0.0f);
  std::fill_n(s.dvalues, rows * width, 0.0f);
  for (int64_t head = key_head * group; head < (key_head + 1) * group; ++head) {
    for (int64_t first = 0; first < length; first += kQueries) {
      const int64_t count = std::min(kQueries, length - first), lanes = round_up(count, kLanes);
      copy_rows(query.at(start + first, head), query.token, count, size, scale, s.query, width);
      transpose(s.query, width, count, size, s.query_t, lanes);
      copy_rows(dout.at(start + first, head), dout.token, count, size, 1.0f, s.dout, width);
      transpose(s.dout, width, count, size, s.dout_t, lanes);
      const int64_t place = head * num_tokens + start + first;
      std::copy_n(maximum + place, count, s.maximum);
      std::fill_n(s.maximum + count, lanes - count, 0.0f);
      std::copy_n(share + place, count, s.share);
      std::fill_n(s.share + count, lanes - count, 0.0f);
      multiply<false>(s.keys, width, 1, rows, size, s.query_t, lanes, lanes, s.weights, lanes);
      multiply<false>(s.values, width, 1, rows, size, s.dout_t, lanes, lanes, s.dscores, lanes);
      harden(s.weights, s.dscores, s.maximum, s.share, length, lanes);
      multiply<true>(s.weights, lanes, 1, rows, count, s.dout, width, width, s.dvalues, width);
      multiply<true>(s.dscores, lanes, 1, rows, count, s.query, width, width, s.dkeys, width);
      multiply<false>(s.dscores, 1, lanes, round_up(count, kRows), length, s.keys, width, width, s.dquery, width);
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < size; ++c)
          dquery.at(start + first + i, head)[c] = scale * s.dquery[i * width + c];
    }
  }
  for (int64_t j = 0; j < length; ++j)
    for (int64_t c = 0; c < size; ++c) {
      dkey.at(start + j, key_head)[c] = s.dkeys[j * width + c];
      dvalue.at(start + j, key_head)[c] = s.dvalues[j * width + c];
    }
}

// body(start, length, key head, scratch) for every segment and key head, in parallel.
template <typename Memory, typename Body>
void for_each_item(const Tensor& cu_seqlens_S1, const Tensor& query, const Tensor& key, const Body& body) {
  const Tensor boundaries = cu_seqlens_S1.contiguous();
  const int32_t* start = boundaries.const_data_ptr<int32_t>();
  const int64_t segments = boundaries.numel() - 1, key_heads = key.size(1);
  int64_t longest = 0;
  double work = 0;
  bool sound = segments >= 0 && start[0] == 0 && start[segments] == query.size(0);
  for (int64_t s = 0; s < segments; ++s) sound = sound && start[s] <= start[s + 1];
  TORCH_CHECK_VALUE(sound, "cu_seqlens_S1 must start at 0, never descend and end at ", query.size(0),
                    ", the number of tokens");
  for (int64_t s = 0; s < segments; ++s) {
    const int64_t length = start[s + 1] - start[s];
    longest = std::max(longest, length);
    work += static_cast<double>(length) * length * query.size(1) * query.size(2);
  }
  const int64_t items = segments * key_heads;
  // About 64 thousand multiplications are worth a thread.
  const int64_t grain = std::max<int64_t>(1, static_cast<int64_t>(items * 65536.0 / std::max(work, 1.0)));
  at::parallel_for(0, items, grain, [&](int64_t begin, int64_t end) {
    Memory memory(Sizes{longest, query.size(2)});
    for (int64_t item = begin; item < end; ++item) {
      const int64_t s = item / key_heads;
      body(start[s], start[s + 1] - start[s], item % key_heads, memory);
    }
  });
}

std::tuple<Tensor, Tensor> segment_attention_forward(const Tensor& query_THd, const Tensor& key_THd,
                                                     const Tensor& value_THd, const Tensor& cu_seqlens_S1,
                                                     double scale) {
  const int64_t num_tokens = query_THd.size(0), group = query_THd.size(1) / key_THd.size(1);
  const Tensor out_THd = at::empty(query_THd.sizes(), query_THd.options());
  const Tensor softmax_2HT = at::empty({2, query_THd.size(1), num_tokens}, query_THd.options());
  const auto query = view_of(query_THd), key = view_of(key_THd), value = view_of(value_THd);
  const auto out = written(out_THd);
  float *maximum = softmax_2HT.data_ptr<float>(), *share = maximum + query_THd.size(1) * num_tokens;
  for_each_item<ForwardScratch>(
      cu_seqlens_S1, query_THd, key_THd,
      [&](int64_t start, int64_t length, int64_t key_head, ForwardScratch& memory) {
        forward_item(query, key, value, out, maximum, share, num_tokens, start, length, key_head, group,
                     static_cast<float>(scale), memory);
      });
  return {out_THd, softmax_2HT};
}

std::tuple<Tensor, Tensor, Tensor> segment_attention_backward(const Tensor& dout_THd, const Tensor& query_THd,
                                                              const Tensor& key_THd, const Tensor& value_THd,
                                                              const Tensor& softmax_2HT, const Tensor& cu_seqlens_S1,
                                                              double scale) {
  const int64_t num_tokens = query_THd.size(0), group = query_THd.size(1) / key_THd.size(1);
  const Tensor dquery_THd = at::empty(query_THd.sizes(), query_THd.options());
  const Tensor dkey_THd = at::empty(key_THd.sizes(), key_THd.options());
  const Tensor dvalue_THd = at::empty(key_THd.sizes(), key_THd.options());
  const auto dout = view_of(dout_THd), query = view_of(query_THd), key = view_of(key_THd);
  const auto value = view_of(value_THd);
  const auto dquery = written(dquery_THd), dkey = written(dkey_THd), dvalue = written(dvalue_THd);
  const float *maximum = softmax_2HT.const_data_ptr<float>(), *share = maximum + query_THd.size(1) * num_tokens;
  for_each_item<BackwardScratch>(
      cu_seqlens_S1, query_THd, key_THd,
      [&](int64_t start, int64_t length, int64_t key_head, BackwardScratch& memory) {
        backward_item(dout, query, key, value, maximum, share, dquery, dkey, dvalue, num_tokens, start, length,
                      key_head, group, static_cast<float>(scale), memory);
      });
  return {dquery_THd, dkey_THd, dvalue_THd};
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def(
      "segment_attention_forward(Tensor query_THd, Tensor key_THd, Tensor value_THd, Tensor cu_seqlens_S1, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "segment_attention_backward(Tensor dout_THd, Tensor query_THd, Tensor key_THd, Tensor value_THd, "
      "Tensor softmax_2HT, Tensor cu_seqlens_S1, float scale) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) {
  m.impl("segment_attention_forward", &segment_attention_forward);
  m.impl("segment_attention_backward", &segment_attention_backward);
}

}  // namespace
}  // namespace vrpo
