// What a launch's indices can hold.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/cuda_check.h"
#include "block_attention.h"

namespace dgemma {

// Tiles of rows of every batch row and KV head; throws where an index of the kernel would not hold what it counts.
template <class Shape>
int64_t row_tiles_in_limits(const BlockAttentionParams& params) {
  const int64_t rows = params.query_heads / params.kv_heads * params.length;
  const int64_t tiles = (rows + Shape::kRows - 1) / Shape::kRows * params.batch * params.kv_heads;
  if (tiles > 0x3fffffff || params.prefix_length > 0x7fff0000 || rows > 0x7fff0000)
    throw std::runtime_error("block_attention: " + std::to_string(tiles) + " tiles of rows, " + std::to_string(rows) +
                             " rows of a KV head and a prefix of " + std::to_string(params.prefix_length) +
                             " slots; at most 2^30, 2^31 and 2^31 are possible");
  return tiles;
}

}  // namespace dgemma
