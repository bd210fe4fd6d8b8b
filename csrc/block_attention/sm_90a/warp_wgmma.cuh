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

// Starts to copy the first kSlots rows of a tile, kChunks 16-byte chunks each; those after the last valid one become
// zeros.
template <int kThreads, int kSlots, int kChunks, class T>
DGEMMA_DEVICE void fill_panels(uint32_t buffer, const SlotRows<T>& rows) {
  constexpr int kStep = kThreads / kChunks;
  static_assert(kStep * kChunks == kThreads && kSlots % kStep == 0, "every thread copies one chunk of every kStep-th slot");
  const int thread = hw::recomputed(hw::thread_x());
  const int chunk = thread % kChunks, first = thread / kChunks;
  const T* source = rows.first + first * rows.stride + chunk * 8;
  DGEMMA_UNROLL
  for (int i = 0; i < kSlots; i += kStep, source += kStep * rows.stride)
    hw::copy_async_16(buffer + in_panels(first + i, chunk, kSlots * kWgmmaPanelRowBytes), source, first + i < rows.valid);
}

// Starts to copy the queries' columns that shared memory holds; rows after the last one become zeros.
template <class T, class Shape>
DGEMMA_DEVICE void fill_queries(const BlockAttentionParams& p, const KeyWalk& walk, const QueryRows& rows) {
  constexpr int kFirst = Shape::kQueryColumnsInRegisters, kChunks = (Shape::kHeadDim - kFirst) / 8;
  static_assert(Shape::kRows * kChunks % Shape::kThreads == 0, "all threads copy as many chunks");
  DGEMMA_NO_UNROLL
  for (int i = hw::thread_x(); i < Shape::kRows * kChunks; i += Shape::kThreads) {
    const int row = i / kChunks, chunk = i - row * kChunks;
    hw::copy_async_16(in_panels(row, chunk, Shape::kQueryPanelBytes),
                      query_row<T>(p, walk, rows, rows.first + row) + kFirst + chunk * 8,
                      rows.first + row < rows.count);
  }
}

// What this block of threads multiplies: its rows, the tiles of keys that they see, its part of a tile's keys and of
// the values' columns.
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
    if (tile < walk.end) {
      SlotRows<T> slots = tile_rows<T, Shape, false>(p, walk, tile);
      slots.first += part * Shape::kOwnKeys * slots.stride;
      slots.valid -= part * Shape::kOwnKeys;
      fill_panels<Shape::kThreads, Shape::kOwnKeys, Shape::kHeadDim / 8>(buffer, slots);
    }
    hw::commit_copies();
  }
  DGEMMA_DEVICE_MEMBER void fill_values(int tile, uint32_t buffer) const {
    if (tile < walk.end)
      fill_panels<Shape::kThreads, Shape::kKeys, Shape::kColumns / 8>(
          buffer, tile_rows<T, Shape, true>(p, walk, tile, part * Shape::kColumns));
    hw::commit_copies();
  }
};

template <class T, class S>
struct BlockAttentionWgmmaWarp : BlockAttentionWarp<T, S::kHeadDim, S> {
  using Shape = S;

  // Scores of this block's keys of the tile after the one whose `scores` are at work.
  float ahead[Shape::kKeyTiles][4];

  // The rows of this warpgroup, and the keys of a tile, from the first column on.
  DGEMMA_DEVICE_MEMBER hw::SharedMatrix queries() const {
    // Kept through the loop it would cost registers that the accumulators need.
    return {uint32_t(hw::recomputed(this->row_warp) / 4) * 64 * kWgmmaPanelRowBytes, 0, Shape::kGroupBytes};
  }
  DGEMMA_DEVICE_MEMBER static hw::SharedMatrix keys_at(uint32_t buffer) { return {buffer, 0, Shape::kGroupBytes}; }

  // Bytes from the first to the given 16 columns of an operand.
  DGEMMA_DEVICE_MEMBER static uint32_t to_step(int step, uint32_t panel_bytes) {
    return uint32_t(step / 4) * panel_bytes + uint32_t(step % 4) * 32;
  }

  // The scores of the next tile.
  DGEMMA_DEVICE_MEMBER void take_scores() {
    DGEMMA_UNROLL
    for (int n = 0; n < Shape::kKeyTiles; ++n) {
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) this->scores[0][n][j] = ahead[n][j];
    }
  }

  // Probabilities as the left operand of their product with values: an accumulator is laid out like half of one.
  DGEMMA_DEVICE_MEMBER void pack_probabilities(uint32_t (&packed)[Shape::kKeyTiles / 2][4]) const {
    DGEMMA_UNROLL
    for (int k = 0; k < Shape::kKeyTiles; k += 2) {
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j)
        packed[k / 2][j] =
            hw::pack<T>(this->scores[0][k + j / 2][j % 2 * 2], this->scores[0][k + j / 2][j % 2 * 2 + 1]);
    }
  }

  // output += probabilities x values of as many keys.
  template <int kSteps>
  DGEMMA_DEVICE_MEMBER void multiply_values(const uint32_t (&probabilities)[kSteps][4], uint32_t values) {
    const hw::SharedMatrix first{values, Shape::kValuePanelBytes, Shape::kGroupBytes};
    DGEMMA_UNROLL
    for (int k = 0; k < kSteps; ++k)
      hw::multiply_columns<T>(this->output[0], probabilities[k], first.at(uint32_t(k) * 2 * Shape::kGroupBytes));
  }
};

}  // namespace dgemma
