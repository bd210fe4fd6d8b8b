// Joins the shares of the splits: output = sum_s e^(lse_s - lse) output_s, in the order of s.
#pragma once

#include "../common/device/qualifiers.cuh"
#include "../common/device/tensor_core.cuh"
#include "../common/device_math.cuh"
#include "../params.h"
#include "config.h"

namespace dgemma {

// A thread owns four columns of a row. Grid: x = rows of kBlockAttentionMergeThreads / (head_dim / 4) at a time.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(kBlockAttentionMergeThreads, 1) block_attention_merge_kernel(const BlockAttentionParams p) {
  const int threads_per_row = int(p.head_dim) / 4;
  const int64_t rows = p.batch * p.query_heads * p.length;
  const int64_t row =
      hw::block_x() * (kBlockAttentionMergeThreads / threads_per_row) + hw::thread_x() / threads_per_row;
  if (row >= rows) return;
  const int column = hw::thread_x() % threads_per_row * 4;

  float maximum = -INFINITY;
  for (int64_t s = 0; s < p.splits; ++s) maximum = fmaxf(maximum, p.partial_lse[s * rows + row]);
  const float base = maximum == -INFINITY ? 0.0f : maximum;
  float total = 0.0f, sum[4] = {};
  for (int64_t s = 0; s < p.splits; ++s) {
    const float lse = p.partial_lse[s * rows + row];
    // What a split without a key for this row left in its share is not a number.
    if (lse == -INFINITY) continue;
    const float weight = exp_device(lse - base);
    const hw::Words4 share =
        *reinterpret_cast<const hw::Words4*>(p.partial_output + (s * rows + row) * p.head_dim + column);
    total += weight;
    DGEMMA_UNROLL
    for (int j = 0; j < 4; ++j) sum[j] += weight * float_from_bits(share.word[j]);
  }

  // Shares are in the order of the kernel's rows: [B, Hkv, C, group].
  const int64_t group = p.query_heads / p.kv_heads;
  const int64_t position = row / group % p.length, heads_index = row / group / p.length;
  const int64_t batch = heads_index / p.kv_heads, head = heads_index % p.kv_heads * group + row % group;
  const float inverse = 1.0f / total;
  const int64_t first = ((batch * p.length + position) * p.query_heads + head) * p.head_dim + column;
  uint32_t* target = reinterpret_cast<uint32_t*>(static_cast<T*>(p.output) + first);
  target[0] = hw::pack<T>(sum[0] * inverse, sum[1] * inverse);
  target[1] = hw::pack<T>(sum[2] * inverse, sum[3] * inverse);
  if (column == 0) p.lse[(batch * p.query_heads + head) * p.length + position] = base + logf(total);
}

}  // namespace dgemma
