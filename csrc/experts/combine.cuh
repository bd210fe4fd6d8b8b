// The weighted sum of a row's choices, in their order: results repeat bit for bit.
#pragma once

#include "../common/device/qualifiers.cuh"
#include "../common/device/tensor_core.cuh"
#include "../common/hardware.cuh"
#include "../params.h"
#include "config.h"

namespace dgemma {

DGEMMA_DEVICE float choice_weight(const ExpertsParams& p, int64_t row, int64_t choice) {
  const int64_t i = row * p.choice_stride0 + choice * p.choice_stride1;
  switch (p.choice_dtype) {
    case Dtype::kFloat32: return static_cast<const float*>(p.choice_weights)[i];
    case Dtype::kFloat16: return to_float(static_cast<const Float16*>(p.choice_weights)[i]);
    case Dtype::kBFloat16: break;
  }
  return to_float(static_cast<const Bfloat16*>(p.choice_weights)[i]);
}

// Four columns of a row by thread. Choices of no expert are not read. Grid: x = rows times blocks of columns.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(kExpertsCombineThreads, 4)
    experts_combine_kernel(const ExpertsParams p, const float* partial) {
  struct alignas(8) Four {
    uint32_t low, high;
  };
  const int64_t across = experts_combine_across(p.embedding);
  const int64_t row = hw::block_x() / across;
  const int64_t column = (hw::block_x() % across * kExpertsCombineThreads + hw::thread_x()) * 4;
  if (column >= p.embedding) return;
  float sum[4] = {};
  // Loads of eight choices are under way at a time.
  constexpr int kAtOnce = 8;
  for (int64_t first = 0; first < p.top_k; first += kAtOnce) {
    hw::Words4 words[kAtOnce];
    float weight[kAtOnce];
    bool chosen[kAtOnce];
    DGEMMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const int64_t pair = row * p.top_k + first + i, expert = first + i < p.top_k ? p.index[pair] : -1;
      chosen[i] = expert >= 0 && expert < p.experts;
      if (!chosen[i]) continue;
      weight[i] = choice_weight(p, row, first + i);
      words[i] = *reinterpret_cast<const hw::Words4*>(partial + pair * p.embedding + column);
    }
    DGEMMA_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      if (!chosen[i]) continue;
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) sum[j] = fmaf(float_from_bits(words[i].word[j]), weight[i], sum[j]);
    }
  }
  *reinterpret_cast<Four*>(static_cast<T*>(p.output) + row * p.embedding + column) = {hw::pack<T>(sum[0], sum[1]),
                                                                                      hw::pack<T>(sum[2], sum[3])};
}

}  // namespace dgemma
