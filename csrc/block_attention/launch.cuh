// The launch of one instantiation; each file that includes this holds one.
#pragma once

#include "kernel.cuh"
#include "launch_limits.h"

namespace dgemma {

template <class T, int kHeadDim>
void launch_block_attention(const BlockAttentionParams& params, void* stream) {
  using Shape = BlockAttentionShape<kHeadDim>;
  const int64_t tiles = row_tiles_in_limits<Shape>(params);
  launch("block_attention", block_attention_kernel<T, kHeadDim>, dim3(unsigned(tiles), unsigned(params.splits)),
         Shape::kThreads, Shape::kSharedBytes, stream, params);
}

}  // namespace dgemma
