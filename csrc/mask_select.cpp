// The mask draw on a CPU: bit for bit vrpo_kernels/mask_select/reference.py, segments in parallel.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "common.h"
#include "philox.h"

namespace vrpo {
namespace {

struct Segment {
  int64_t length;
  uint32_t c1, c2, c3;
  uint64_t first, count;
};

// Words of positions 0 .. 4 * num_blocks - 1; position p owns lane p & 3 of block p >> 2.
VRPO_CLONES void fill_words(PhiloxKey key, const Segment& segment, int64_t num_blocks, uint32_t* words) {
  constexpr int kTile = 16;
  const uint32_t c1 = segment.c1, c2 = segment.c2, c3 = segment.c3;
  for (int64_t start = 0; start < num_blocks; start += kTile) {
    uint32_t lanes[4][kTile];
#pragma omp simd
    for (int i = 0; i < kTile; ++i) {
      uint32_t w0 = static_cast<uint32_t>(start) + i, w1 = c1, w2 = c2, w3 = c3;
      philox4x32(key, w0, w1, w2, w3);
      lanes[0][i] = w0;
      lanes[1][i] = w1;
      lanes[2][i] = w2;
      lanes[3][i] = w3;
    }
    const int used = static_cast<int>(std::min<int64_t>(kTile, num_blocks - start));
    for (int i = 0; i < used; ++i)
      for (int lane = 0; lane < 4; ++lane) words[4 * (start + i) + lane] = lanes[lane][i];
  }
}

// Orders (word, position) pairs: equal words are ranked by position.
inline uint64_t key_of(const uint32_t* words, int64_t position) {
  return uint64_t{words[position]} << 32 | static_cast<uint64_t>(position);
}

// Order statistics of one segment's keys. Words are uniform, so a histogram of their leading bits
// leaves a handful of candidates per rank; equal words (however many) only make a bucket larger.
class Ranks {
 public:
  void build(const uint32_t* words, int64_t length) {
    words_ = words;
    length_ = length;
    int bits = 1;
    while (bits < 12 && (int64_t{4} << bits) < length) ++bits;
    shift_ = 32 - bits;
    counts_.assign(size_t{1} << bits, 0);
    for (int64_t p = 0; p < length; ++p) ++counts_[words[p] >> shift_];
  }

  // The key of the given rank; rank == length gives a key above all others.
  uint64_t key_at(int64_t rank) {
    if (rank >= length_) return ~uint64_t{0};
    uint32_t bucket = 0;
    while (rank >= counts_[bucket]) rank -= counts_[bucket++];
    candidates_.clear();
    for (int64_t p = 0; p < length_; ++p)
      if (words_[p] >> shift_ == bucket) candidates_.push_back(key_of(words_, p));
    std::nth_element(candidates_.begin(), candidates_.begin() + rank, candidates_.end());
    return candidates_[rank];
  }

 private:
  const uint32_t* words_ = nullptr;
  int64_t length_ = 0;
  int shift_ = 0;
  std::vector<int64_t> counts_;
  std::vector<uint64_t> candidates_;
};

// Writes the masked positions in ascending order; `wraps` = the window of ranks passes the end.
void write_by_rank(const uint32_t* words, const Segment& segment, Ranks& ranks, int64_t* out) {
  const int64_t length = segment.length, count = static_cast<int64_t>(segment.count);
  const int64_t first = static_cast<int64_t>(segment.first % static_cast<uint64_t>(length));
  if (count == 0) return;
  if (count == length) {
    for (int64_t p = 0; p < length; ++p) out[p] = p;
    return;
  }
  ranks.build(words, length);
  const int64_t end = first + count;
  const bool wraps = end > length;
  const uint64_t low = first == 0 ? 0 : ranks.key_at(first);
  const uint64_t high = ranks.key_at(wraps ? end - length : end);
  // Without a wrap [low, high) is masked, with one everything except [high, low). Exactly `count`
  // keys pass; the store is unconditional to stay branch-free, hence the bound on `n`.
  int64_t n = 0;
  for (int64_t p = 0; p < length && n < count; ++p) {
    const uint64_t key = key_of(words, p);
    const bool masked = wraps ? (key >= low) | (key < high) : (key >= low) & (key < high);
    out[n] = p;
    n += masked;
  }
}

inline bool masked_by_word(uint32_t word, const Segment& segment) {
  return static_cast<uint32_t>(word - static_cast<uint32_t>(segment.first)) < segment.count;
}

VRPO_CLONES int64_t count_by_word(const uint32_t* words, const Segment& segment) {
  const Segment window = segment;
  int64_t n = 0;
#pragma omp simd reduction(+ : n)
  for (int64_t p = 0; p < window.length; ++p) n += masked_by_word(words[p], window);
  return n;
}

void write_by_word(const uint32_t* words, const Segment& segment, int64_t count, int64_t* out) {
  int64_t n = 0;
  for (int64_t p = 0; p < segment.length && n < count; ++p) {
    out[n] = p;
    n += masked_by_word(words[p], segment);
  }
}

std::tuple<at::Tensor, at::Tensor> mask_select(
    const at::Tensor& length_S, const at::Tensor& counter_S3, const at::Tensor& first_S,
    const at::Tensor& count_S, int64_t seed, bool by_rank) {
  const int64_t num_segments = length_S.numel();
  const auto length = length_S.contiguous(), counter = counter_S3.contiguous();
  const auto first = first_S.contiguous(), count = count_S.contiguous();
  const PhiloxKey key(seed);

  std::vector<Segment> segments(num_segments);
  int64_t total = 0, longest = 0;
  for (int64_t s = 0; s < num_segments; ++s) {
    const int64_t* c = counter.const_data_ptr<int64_t>() + 3 * s;
    segments[s] = {length.const_data_ptr<int64_t>()[s],
                   static_cast<uint32_t>(c[0]),
                   static_cast<uint32_t>(c[1]),
                   static_cast<uint32_t>(c[2]),
                   static_cast<uint64_t>(first.const_data_ptr<int64_t>()[s]),
                   static_cast<uint64_t>(count.const_data_ptr<int64_t>()[s])};
    total += segments[s].length;
    longest = std::max(longest, segments[s].length);
  }
  // About 16 thousand positions are worth a thread.
  const int64_t grain = std::max<int64_t>(1, 16384 * num_segments / std::max<int64_t>(1, total));
  const size_t capacity = static_cast<size_t>((longest + 3) / 4 * 4);

  const auto offsets_S1 = at::empty({num_segments + 1}, length_S.options());
  int64_t* offsets = offsets_S1.data_ptr<int64_t>();
  offsets[0] = 0;
  if (by_rank) {
    for (int64_t s = 0; s < num_segments; ++s) offsets[s + 1] = segments[s].count;
  } else {
    at::parallel_for(0, num_segments, grain, [&](int64_t begin, int64_t end) {
      std::vector<uint32_t> words(capacity);
      for (int64_t s = begin; s < end; ++s) {
        fill_words(key, segments[s], (segments[s].length + 3) / 4, words.data());
        offsets[s + 1] = count_by_word(words.data(), segments[s]);
      }
    });
  }
  for (int64_t s = 0; s < num_segments; ++s) offsets[s + 1] += offsets[s];

  const auto position_N = at::empty({offsets[num_segments]}, length_S.options());
  int64_t* position = position_N.data_ptr<int64_t>();
  at::parallel_for(0, num_segments, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> words(capacity);
    Ranks ranks;
    for (int64_t s = begin; s < end; ++s) {
      fill_words(key, segments[s], (segments[s].length + 3) / 4, words.data());
      if (by_rank) {
        write_by_rank(words.data(), segments[s], ranks, position + offsets[s]);
      } else {
        write_by_word(words.data(), segments[s], offsets[s + 1] - offsets[s], position + offsets[s]);
      }
    }
  });
  return {position_N, offsets_S1};
}

// The raw words, for known-answer tests of the generator: int64 (num_blocks, 4).
at::Tensor philox_words(int64_t num_blocks, int64_t c1, int64_t c2, int64_t c3, int64_t seed) {
  const Segment segment{4 * num_blocks, static_cast<uint32_t>(c1), static_cast<uint32_t>(c2),
                        static_cast<uint32_t>(c3), 0, 0};
  std::vector<uint32_t> words(static_cast<size_t>(4 * num_blocks));
  fill_words(PhiloxKey(seed), segment, num_blocks, words.data());
  const auto result = at::empty({num_blocks, 4}, at::TensorOptions().dtype(at::kLong));
  std::copy(words.begin(), words.end(), result.data_ptr<int64_t>());
  return result;
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def(
      "mask_select(Tensor length_S, Tensor counter_S3, Tensor first_S, Tensor count_S, "
      "int seed, bool by_rank) -> (Tensor, Tensor)");
  m.def("philox_words(int num_blocks, int c1, int c2, int c3, int seed) -> Tensor", &philox_words);
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) { m.impl("mask_select", &mask_select); }

}  // namespace
}  // namespace vrpo
