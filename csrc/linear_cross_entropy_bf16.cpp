// linear_cross_entropy of bf16 inputs by bf16 x bf16 -> fp32 matrix multiplications, oneDNN's micro-kernels.
//
// The same algorithm as in linear_cross_entropy.cpp, with three differences. The probabilities E = exp(logit - m), or
// E D, are rounded to bf16 before they enter a matmul; sums, and with them nll, take E in fp32. A panel of kWidth rows
// goes from logits to probabilities while it is in the second-level cache. And what a matmul reads is laid out by the
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

#include <cpuid.h>

#include "linear_cross_entropy_bf16_fold.h"

namespace vrpo {
namespace {

constexpr int64_t kDepth = 1024;  // products summed in one call: bounds what a panel takes of the cache
constexpr int64_t kHeight = 128;  // classes per task of dweight

// Logits of heads that are too wide for the second-level cache, where matmuls are as fast as AMX makes them. (Elsewhere
// nothing is known to wait for the caches.)
constexpr int64_t kFits = 1024;              // up to so many columns a tile of the head stays there for all panels
constexpr int64_t kPart = 512;               // columns of a wider one that are copied there, for several panels at once
constexpr int64_t kPartStride = kPart + 32;  // no power of two, after which rows would share the same few cache lines
constexpr int64_t kTogether = 8;             // panels at most: their logits take 1 MiB
constexpr int64_t kCopyPays = 2;             // panels at least

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

// Rows per panel: kWidth, or fewer where there would be less than one panel per thread.
int64_t panel_width(int64_t rows) {
  const int64_t share = (rows + at::get_num_threads() - 1) / at::get_num_threads();
  return std::clamp(round_up(share, kLanes), kLanes, kWidth);
}

bool has_amx() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 22 & 1);  // AMX-BF16
}

// What the three functions below have in common: the head's tiles and the buffers of each thread.
struct Workspace {
  HeadTiles tiles;
  bool wide;
  int64_t together;  // panels that meet a part of the head at once
  Tensor logits, part, panel;
  // For chunks of so many panels of rows.
  Workspace(const Tensor& weight, int64_t panels)
      : tiles(weight),
        wide(tiles.depth() > kFits && has_amx()),
        together(wide ? group_of(panels) : 1),
        logits(at::empty({at::get_num_threads(), together, kTile, kWidth}, weight.options().dtype(at::kFloat))),
        part(at::empty({together > 1 ? at::get_num_threads() : 0, kTile, kPartStride}, weight.options())),
        panel(at::empty({at::get_num_threads(), kTile / 2, kWidth}, weight.options().dtype(at::kInt))) {}

  // Groups of equal size, one or more for each thread; 1 where a copy would serve too few panels.
  static int64_t group_of(int64_t panels) {
    const int64_t share = (panels + at::get_num_threads() - 1) / at::get_num_threads();
    const int64_t rounds = (share + kTogether - 1) / kTogether;
    const int64_t group = (share + rounds - 1) / rounds;
    return group < kCopyPays ? 1 : group;
  }

  // body(panel, z) for every panel of rows, the first of which is row `first_row`: z [classes, kWidth] are its logits,
  // every target's -inf. However panels are grouped, their logits are sums of the same products of parts.
  template <typename Body>
  void for_each_panel(int64_t tile, const BFloat16* w, const RowPanels& x, int64_t first_row,
                      const TargetIndex& targets, const Body& body) {
    const int64_t v0 = tiles.begin(tile), classes = tiles.size(tile), step = wide ? kPart : kDepth;
    parallel_tasks((x.count() + together - 1) / together, [&](int64_t task, int64_t thread) {
      const int64_t begin = task * together, end = std::min(begin + together, x.count());
      float* const out = logits.data_ptr<float>() + thread * together * kTile * kWidth;
      for (int64_t k = 0; k < tiles.depth(); k += step) {
        const int64_t depth = std::min(step, tiles.depth() - k);
        const BFloat16* from = w + k;
        int64_t stride = tiles.stride();
        if (together > 1) {
          BFloat16* copy = bf16_data(part) + thread * kTile * kPartStride;
          for (int64_t v = 0; v < classes; ++v) std::copy_n(from + v * stride, depth, copy + v * kPartStride);
          from = copy;
          stride = kPartStride;
        }
        for (int64_t p = begin; p < end; ++p) {
          multiply(out + (p - begin) * kTile * kWidth, kWidth, from, stride, x[p] + k / 2 * kWidth, classes,
                   x.width(p), depth, k > 0);
        }
      }
      for (int64_t p = begin; p < end; ++p) {
        float* z = out + (p - begin) * kTile * kWidth;
        const int64_t first = first_row + x.first(p), width = x.width(p);
        targets.for_each(v0, v0 + classes, [&](int64_t n, int64_t v) {
          if (n >= first && n < first + width) z[(v - v0) * kWidth + n - first] = kMinusInfinity;
        });
        std::fill(z + classes * kWidth, z + round_up(classes, kSubtotal) * kWidth, kMinusInfinity);
        body(p, z);
      }
    });
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
  return bf16_route_runs() && (__builtin_cpu_is("amd") || has_amx());
}

ForwardResult bf16_forward(const Tensor& hidden, const Tensor& weight, const Tensor& targets, const Head& head,
                           bool want_dhidden, bool keep_tiles, bool want_metrics) {
  require_route(hidden);
  const int64_t N = hidden.size(0), D = hidden.size(1), V = weight.size(0);
  const auto fp32 = hidden.options().dtype(at::kFloat);
  const TargetIndex index(targets, V);
  const Tensor x = hidden.contiguous();
  const int64_t padded = round_up(N, kLanes), chunk = chunk_rows(N), width = panel_width(chunk);
  Workspace workspace(weight, (chunk + width - 1) / width);
  HeadTiles& tiles = workspace.tiles;

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
      workspace.for_each_panel(t, w, panels, n0, index, [&](int64_t p, const float* z) {
        const int64_t first = panels.first(p);
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
  const int64_t chunk = chunk_rows(N), width = panel_width(chunk);
  Workspace workspace(weight, (chunk + width - 1) / width);
  HeadTiles& tiles = workspace.tiles;

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
      workspace.for_each_panel(t, w, panels, n0, index, [&](int64_t p, const float* z) {
        const int64_t first = panels.first(p);
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
