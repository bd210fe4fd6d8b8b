// The launch of one instantiation; each file that includes this holds one.
#pragma once

#include "../launch_limits.h"
#include "kernel.cuh"
#include "sm_90a.h"

namespace dgemma {

template <class T>
void launch_block_attention_cluster(const BlockAttentionParams& params, void* stream) {
  using Shape = BlockAttentionClusterShape;
  const int64_t tiles = row_tiles_in_limits<Shape>(params);
  launch("block_attention", block_attention_cluster_kernel<T>,
         dim3(unsigned(tiles * Shape::kCluster), unsigned(params.splits)), Shape::kThreads, Shape::kSharedBytes, stream,
         params);
}

}  // namespace dgemma
