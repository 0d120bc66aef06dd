// Corruption, packing and per-token weight sums on a CPU: bit for bit vrpo_kernels/pack_masked/reference.py.
#include <ATen/Parallel.h>
#include <ATen/ops/add.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace vrpo {
namespace {

// Starts of consecutive ranges of the given lengths, and their total as the last element.
std::vector<int64_t> starts_of(const at::Tensor& length) {
  std::vector<int64_t> starts(length.numel() + 1, 0);
  const int64_t* values = length.const_data_ptr<int64_t>();
  std::partial_sum(values, values + length.numel(), starts.begin() + 1);
  return starts;
}

// How many items make about 16 thousand elements, the work worth one thread.
int64_t grain_of(int64_t num_items, int64_t num_elements) {
  return std::max<int64_t>(1, 16384 * num_items / std::max<int64_t>(1, num_elements));
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> pack_masked(
    const at::Tensor& tokens_U, const at::Tensor& prompt_length_R, const at::Tensor& response_length_R,
    const at::Tensor& position_N, const at::Tensor& offsets_S1, int64_t num_samples,
    int64_t mask_token_id) {
  const auto clean = tokens_U.contiguous(), prompt_length = prompt_length_R.contiguous();
  const auto positions = position_N.contiguous(), offsets = offsets_S1.contiguous();
  const int64_t num_segments = offsets.numel() - 1, num_tokens = num_samples * clean.numel();
  const auto starts = starts_of(at::add(prompt_length_R, response_length_R).contiguous());

  const auto options = tokens_U.options();
  const auto tokens_T = at::empty({num_tokens}, options);
  const auto position_T = at::empty({num_tokens}, options);
  const auto cu_seqlens_S1 = at::empty({num_segments + 1}, options.dtype(at::kInt));
  const auto row_N = at::empty({positions.numel()}, options);
  const auto target_N = at::empty({positions.numel()}, options);

  const int64_t* clean_data = clean.const_data_ptr<int64_t>();
  const int64_t* prompt_data = prompt_length.const_data_ptr<int64_t>();
  const int64_t* positions_data = positions.const_data_ptr<int64_t>();
  const int64_t* offsets_data = offsets.const_data_ptr<int64_t>();
  int64_t* tokens = tokens_T.data_ptr<int64_t>();
  int64_t* position = position_T.data_ptr<int64_t>();
  int32_t* cu_seqlens = cu_seqlens_S1.data_ptr<int32_t>();
  int64_t* row = row_N.data_ptr<int64_t>();
  int64_t* target = target_N.data_ptr<int64_t>();

  at::parallel_for(0, num_segments, grain_of(num_segments, num_tokens), [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t response = s / num_samples, sample = s % num_samples;
      const int64_t clean_start = starts[response], length = starts[response + 1] - clean_start;
      const int64_t start = num_samples * clean_start + sample * length;
      std::copy_n(clean_data + clean_start, length, tokens + start);
      std::iota(position + start, position + start + length, int64_t{0});
      cu_seqlens[s] = static_cast<int32_t>(start);
      const int64_t response_start = start + prompt_data[response];
      for (int64_t n = offsets_data[s]; n < offsets_data[s + 1]; ++n) {
        row[n] = response_start + positions_data[n];
        target[n] = tokens[row[n]];
        tokens[row[n]] = mask_token_id;
      }
    }
  });
  cu_seqlens[num_segments] = static_cast<int32_t>(num_tokens);
  return {tokens_T, position_T, cu_seqlens_S1, row_N, target_N};
}

std::tuple<at::Tensor, at::Tensor> token_weight_sums(
    const at::Tensor& weight_N, const at::Tensor& position_N, const at::Tensor& offsets_S1,
    const at::Tensor& response_length_R, int64_t num_samples, int64_t num_tokens) {
  const auto weights = weight_N.contiguous(), positions = position_N.contiguous();
  const auto offsets = offsets_S1.contiguous();
  const auto starts = starts_of(response_length_R.contiguous());
  const int64_t num_responses = response_length_R.numel();
  const auto sum_M = at::empty({num_tokens}, weight_N.options());
  const auto sum_N = at::empty({weights.numel()}, weight_N.options());

  const float* weight = weights.const_data_ptr<float>();
  const int64_t* position = positions.const_data_ptr<int64_t>();
  const int64_t* offset = offsets.const_data_ptr<int64_t>();
  float* token_sum = sum_M.data_ptr<float>();
  float* row_sum = sum_N.data_ptr<float>();

  at::parallel_for(0, num_responses, grain_of(num_responses, weights.numel()), [&](int64_t begin, int64_t end) {
    std::vector<double> total;
    for (int64_t r = begin; r < end; ++r) {
      const int64_t length = starts[r + 1] - starts[r];
      const int64_t first = offset[r * num_samples], last = offset[(r + 1) * num_samples];
      float* sums = token_sum + starts[r];
      total.assign(length, 0.0);
      // Rows come in sample order, so every token adds its samples in that order.
      for (int64_t n = first; n < last; ++n) total[position[n]] += weight[n];
      for (int64_t i = 0; i < length; ++i) sums[i] = static_cast<float>(total[i]);
      for (int64_t n = first; n < last; ++n) row_sum[n] = sums[position[n]];
    }
  });
  return {sum_M, sum_N};
}

TORCH_LIBRARY_FRAGMENT(vrpo, m) {
  m.def(
      "pack_masked(Tensor tokens_U, Tensor prompt_length_R, Tensor response_length_R, "
      "Tensor position_N, Tensor offsets_S1, int num_samples, int mask_token_id) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "token_weight_sums(Tensor weight_N, Tensor position_N, Tensor offsets_S1, "
      "Tensor response_length_R, int num_samples, int num_tokens) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(vrpo, CPU, m) {
  m.impl("pack_masked", &pack_masked);
  m.impl("token_weight_sums", &token_weight_sums);
}

}  // namespace
}  // namespace vrpo
