// The launches of one instantiation each; each file that includes this holds one.
#pragma once

#include "../launch_limits.h"
#include "kernel.cuh"
#include "kernel_hd256.cuh"
#include "sm_90a.h"

namespace dgemma {

template <class T, int kHeadDim>
void launch_block_attention_wgmma(const BlockAttentionParams& params, void* stream) {
  using Shape = BlockAttentionWgmmaShape<kHeadDim>;
  const int64_t blocks = row_tiles_in_limits<Shape>(params) * Shape::kCluster;
  void (*kernel)(BlockAttentionParams);
  if constexpr (Shape::kCluster == 1)
    kernel = block_attention_wgmma_kernel<T>;
  else
    kernel = block_attention_cluster_kernel<T>;
  launch("block_attention", kernel, dim3(unsigned(blocks), unsigned(params.splits)), Shape::kThreads,
         Shape::kSharedBytes, stream, params);
}

}  // namespace dgemma
