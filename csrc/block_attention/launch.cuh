// The launch of one instantiation; each file that includes this holds one.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/cuda_check.h"
#include "block_attention.h"
#include "kernel.cuh"

namespace dgemma {

template <class T, int kHeadDim>
void launch_block_attention(const BlockAttentionParams& params, void* stream) {
  using Shape = BlockAttentionShape<kHeadDim>;
  const int64_t rows = params.query_heads / params.kv_heads * params.length;
  const int64_t tiles = (rows + Shape::kRows - 1) / Shape::kRows * params.batch * params.kv_heads;
  if (tiles > 0x7fffffff || params.prefix_length > 0x7fff0000 || rows > 0x7fff0000)
    throw std::runtime_error("block_attention: " + std::to_string(tiles) + " tiles of rows and a prefix of " +
                             std::to_string(params.prefix_length) + " slots; both have to be below 2^31");
  launch("block_attention", block_attention_kernel<T, kHeadDim>, dim3(unsigned(tiles), unsigned(params.splits)),
         Shape::kThreads, Shape::kSharedBytes, stream, params);
}

}  // namespace dgemma
