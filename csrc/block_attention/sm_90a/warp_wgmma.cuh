// What a block of threads of the wgmma kernels has to do, and what one of its warps multiplies.
#pragma once

#include "../../common/device/warpgroup.cuh"
#include "../warp.cuh"
#include "config.h"

namespace dgemma {

// Where a 16-byte chunk of a row lies: panels of eight chunks, in which the row decides about their order.
DGEMMA_DEVICE uint32_t in_panels(int row, int chunk, uint32_t panel_bytes) {
  return uint32_t(chunk / 8) * panel_bytes + uint32_t(row) * kWgmmaPanelRowBytes +
         uint32_t((chunk % 8 ^ (row & 7)) * 16);
}

// Starts to copy this block's columns of the keys or values of a tile; slots after the last valid one become zeros.
template <class Shape, class T>
DGEMMA_DEVICE void fill_panels(uint32_t buffer, const SlotRows<T>& rows) {
  constexpr int kStep = Shape::kThreads / Shape::kChunks;
  const int thread = hw::recomputed(hw::thread_x());
  const int chunk = thread % Shape::kChunks, first = thread / Shape::kChunks;
  const T* source = rows.first + first * rows.stride + chunk * 8;
  DGEMMA_UNROLL
  for (int i = 0; i < Shape::kKeys; i += kStep, source += kStep * rows.stride)
    hw::copy_async_16(buffer + in_panels(first + i, chunk, Shape::kPanelBytes), source, first + i < rows.valid);
}

// Starts to copy this block's columns of the queries; rows after the last one become zeros.
template <class T, class Shape>
DGEMMA_DEVICE void fill_queries(const BlockAttentionParams& p, const KeyWalk& walk, const QueryRows& rows, int part) {
  constexpr int kStep = Shape::kThreads / Shape::kChunks;
  const int chunk = hw::thread_x() % Shape::kChunks;
  DGEMMA_NO_UNROLL
  for (int i = hw::thread_x() / Shape::kChunks; i < Shape::kRows; i += kStep) {
    const int r = rows.first + i < rows.count ? rows.first + i : rows.count - 1, position = r / rows.group;
    const int64_t head = int64_t(walk.kv_head) * rows.group + r - position * rows.group;
    const T* source = static_cast<const T*>(p.query.data) + walk.batch * p.query.batch_stride +
                      head * p.query.head_stride + position * p.query.slot_stride + part * Shape::kColumns + chunk * 8;
    hw::copy_async_16(in_panels(i, chunk, Shape::kQueryPanelBytes), source, rows.first + i < rows.count);
  }
}

// What this block of threads multiplies: its rows, the tiles of keys that they see, and its part of the head's columns.
template <class T, class S>
struct BlockAttentionTask {
  using Shape = S;

  const BlockAttentionParams& p;
  int part;
  QueryRows rows;
  KeyWalk walk;

  DGEMMA_DEVICE_MEMBER explicit BlockAttentionTask(const BlockAttentionParams& params)
      : p(params), part(int(hw::block_x() % Shape::kCluster)) {
    const int64_t tile_of_rows = hw::block_x() / Shape::kCluster;
    rows.group = int(p.query_heads / p.kv_heads);
    rows.count = rows.group * int(p.length);
    const int row_tiles = (rows.count + Shape::kRows - 1) / Shape::kRows;
    rows.first = int(tile_of_rows % row_tiles) * Shape::kRows;
    const int last_row = rows.first + Shape::kRows < rows.count ? rows.first + Shape::kRows - 1 : rows.count - 1;
    walk = key_walk<Shape>(p, tile_of_rows / row_tiles, rows.first / rows.group, last_row / rows.group);
  }

  // Each closes a group of copies, an empty one behind the last tile.
  DGEMMA_DEVICE_MEMBER void fill_keys(int tile, uint32_t buffer) const {
    if (tile < walk.end)
      fill_panels<Shape>(buffer, tile_rows<T, Shape, false>(p, walk, tile, part * Shape::kColumns));
    hw::commit_copies();
  }
  DGEMMA_DEVICE_MEMBER void fill_values(int tile, uint32_t buffer) const {
    if (tile < walk.end)
      fill_panels<Shape>(buffer, tile_rows<T, Shape, true>(p, walk, tile, part * Shape::kColumns));
    hw::commit_copies();
  }
};

template <class T, class S>
struct BlockAttentionWgmmaWarp : BlockAttentionWarp<T, S::kHeadDim, S> {
  using Shape = S;

  // This block's part of the scores of the tile after the one whose `scores` are at work.
  float ahead[Shape::kKeyTiles][4];

  // Starts on the scores of this block's columns. The 64 rows of a warpgroup are one operand.
  DGEMMA_DEVICE_MEMBER void start_keys(uint32_t buffer) {
    // Addresses kept through the loop would cost the registers that the accumulators need.
    const uint32_t queries = uint32_t(hw::recomputed(this->row_warp) / 4) * 64 * Shape::kPanelRowBytes;
    hw::begin_multiplies(ahead);
    DGEMMA_UNROLL
    for (int step = 0; step < Shape::kColumns / 16; ++step) {
      const uint32_t within = uint32_t(step % 4) * 32;
      const hw::SharedMatrix left{queries + uint32_t(step / 4) * Shape::kQueryPanelBytes + within, 0,
                                  Shape::kGroupBytes};
      const hw::SharedMatrix right{buffer + uint32_t(step / 4) * Shape::kPanelBytes + within, 0, Shape::kGroupBytes};
      hw::multiply_rows<T>(ahead, left, right, step > 0);
    }
    hw::commit_multiplies();
  }

  DGEMMA_DEVICE_MEMBER void finish_keys() { hw::wait_multiplies(ahead); }

  // The scores of the next tile, where this block has all columns of the head.
  DGEMMA_DEVICE_MEMBER void take_scores() {
    DGEMMA_UNROLL
    for (int n = 0; n < Shape::kKeyTiles; ++n) {
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) this->scores[0][n][j] = ahead[n][j];
    }
  }

  // Starts on output += probabilities x values, over this block's columns.
  DGEMMA_DEVICE_MEMBER void start_values(uint32_t buffer) {
    uint32_t probabilities[Shape::kKeyTiles / 2][4];
    DGEMMA_UNROLL
    for (int k = 0; k < Shape::kKeyTiles; k += 2) {
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j)
        probabilities[k / 2][j] =
            hw::pack<T>(this->scores[0][k + j / 2][j % 2 * 2], this->scores[0][k + j / 2][j % 2 * 2 + 1]);
    }
    hw::begin_multiplies(this->output[0]);
    DGEMMA_UNROLL
    for (int k = 0; k < Shape::kKeyTiles / 2; ++k) {
      const hw::SharedMatrix right{buffer + uint32_t(k) * 2 * Shape::kGroupBytes, Shape::kPanelBytes,
                                   Shape::kGroupBytes};
      hw::multiply_columns<T>(this->output[0], probabilities[k], right);
    }
    hw::commit_multiplies();
  }

  DGEMMA_DEVICE_MEMBER void finish_values() { hw::wait_multiplies(this->output[0]); }
};

}  // namespace dgemma
