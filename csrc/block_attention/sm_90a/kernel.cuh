// Attention at head_dim 512 with wgmma, by clusters of two blocks of threads.
//
// 128 rows have an output of 256 KB in fp32, all registers of a multiprocessor, so two multiprocessors share it: each
// multiplies its half of the head's columns for the scores, writes them into the other's shared memory, adds what the
// other has written into its own, and goes on with the same bits for its half of the output. No score is computed
// twice, and no key or value is read by both.
#pragma once

#include "../../common/device/cluster.cuh"
#include "../../common/device/warpgroup.cuh"
#include "../warp.cuh"
#include "config.h"

namespace dgemma {

// Where a 16-byte chunk of a row lies: panels of eight chunks, in which the row decides about their order.
DGEMMA_DEVICE uint32_t in_panels(int row, int chunk, uint32_t panel_bytes) {
  return uint32_t(chunk / 8) * panel_bytes + uint32_t(row) * BlockAttentionClusterShape::kPanelRowBytes +
         uint32_t((chunk % 8 ^ (row & 7)) * 16);
}

// Starts to copy this block's columns of the keys or values of a tile; slots after the last valid one become zeros.
template <class T>
DGEMMA_DEVICE void fill_panels(uint32_t buffer, const SlotRows<T>& rows) {
  using Shape = BlockAttentionClusterShape;
  constexpr int kStep = Shape::kThreads / Shape::kChunks;
  const int thread = hw::recomputed(hw::thread_x());
  const int chunk = thread % Shape::kChunks, first = thread / Shape::kChunks;
  const T* source = rows.first + first * rows.stride + chunk * 8;
  DGEMMA_UNROLL
  for (int i = 0; i < Shape::kKeys; i += kStep, source += kStep * rows.stride)
    hw::copy_async_16(buffer + in_panels(first + i, chunk, Shape::kPanelBytes), source, first + i < rows.valid);
}

// Starts to copy this block's columns of the queries; rows after the last one become zeros.
template <class T>
DGEMMA_DEVICE void fill_queries(const BlockAttentionParams& p, const KeyWalk& walk, const QueryRows& rows, int half) {
  using Shape = BlockAttentionClusterShape;
  constexpr int kStep = Shape::kThreads / Shape::kChunks;
  const int chunk = hw::thread_x() % Shape::kChunks;
  DGEMMA_NO_UNROLL
  for (int i = hw::thread_x() / Shape::kChunks; i < Shape::kRows; i += kStep) {
    const int r = rows.first + i < rows.count ? rows.first + i : rows.count - 1, position = r / rows.group;
    const int64_t head = int64_t(walk.kv_head) * rows.group + r - position * rows.group;
    const T* source = static_cast<const T*>(p.query.data) + walk.batch * p.query.batch_stride +
                      head * p.query.head_stride + position * p.query.slot_stride + half * Shape::kColumns + chunk * 8;
    hw::copy_async_16(in_panels(i, chunk, Shape::kQueryPanelBytes), source, rows.first + i < rows.count);
  }
}

template <class T>
struct BlockAttentionClusterWarp : BlockAttentionWarp<T, BlockAttentionClusterShape::kHeadDim, BlockAttentionClusterShape> {
  using Shape = BlockAttentionClusterShape;

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

  DGEMMA_DEVICE_MEMBER uint32_t place_of(int n, uint32_t exchange) const {
    return exchange + uint32_t(this->row_warp) * Shape::kExchangeWarpBytes +
           uint32_t(n * 32 + this->lane) * 16;
  }

  // Waits for what was started and shows it to the other block.
  DGEMMA_DEVICE_MEMBER void finish_keys(int block, uint32_t exchange) {
    hw::wait_multiplies(ahead);
    DGEMMA_UNROLL
    for (int n = 0; n < Shape::kKeyTiles; ++n) {
      hw::Words4 words;
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) words.word[j] = bits_from_float(ahead[n][j]);
      hw::store_in_cluster(block, place_of(n, exchange), words);
    }
  }

  // The scores of the next tile, of both blocks' columns. Addition commutes, so both blocks get the same bits.
  DGEMMA_DEVICE_MEMBER void take_scores(uint32_t exchange) {
    DGEMMA_UNROLL
    for (int n = 0; n < Shape::kKeyTiles; ++n) {
      const hw::Words4 words = hw::Shared<hw::Words4>{place_of(n, exchange)}.load(0);
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) this->scores[0][n][j] = ahead[n][j] + float_from_bits(words.word[j]);
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

// Grid: x = the two blocks of every tile of rows of every batch row and KV head; y = splits.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(BlockAttentionClusterShape::kThreads, 1) DGEMMA_CLUSTER(BlockAttentionClusterShape::kCluster)
    block_attention_cluster_kernel(const BlockAttentionParams p) {
  using Shape = BlockAttentionClusterShape;
  const int half = int(hw::block_x() % Shape::kCluster);
  const int64_t tile_of_rows = hw::block_x() / Shape::kCluster;
  QueryRows rows;
  rows.group = int(p.query_heads / p.kv_heads);
  rows.count = rows.group * int(p.length);
  const int row_tiles = (rows.count + Shape::kRows - 1) / Shape::kRows;
  rows.first = int(tile_of_rows % row_tiles) * Shape::kRows;
  const int last_row = rows.first + Shape::kRows < rows.count ? rows.first + Shape::kRows - 1 : rows.count - 1;
  const KeyWalk walk = key_walk<Shape>(p, tile_of_rows / row_tiles, rows.first / rows.group, last_row / rows.group);

  const auto fill_keys = [&](int tile, uint32_t buffer) {
    if (tile < walk.end) fill_panels(buffer, tile_rows<T, Shape, false>(p, walk, tile, half * Shape::kColumns));
    hw::commit_copies();
  };
  const auto fill_values = [&](int tile, uint32_t buffer) {
    fill_panels(buffer, tile_rows<T, Shape, true>(p, walk, tile, half * Shape::kColumns));
    hw::commit_copies();
  };
  fill_queries<T>(p, walk, rows, half);
  fill_keys(walk.first, Shape::kKeysOffset);
  fill_keys(walk.first + 1, Shape::kKeysOffset + Shape::kTileBytes);

  BlockAttentionClusterWarp<T> warp;
  warp.begin();
  warp.column_warp = half;

  // The scores run one tile ahead, so that their products overlap the softmax of the tile before, and the way from block
  // to block the product of its values.
  uint32_t keys = Shape::kKeysOffset, exchange = Shape::kExchangeOffset;
  const auto other_keys = [&] { return 2 * Shape::kKeysOffset + Shape::kTileBytes - keys; };
  const auto other_exchange = [&] { return 2 * Shape::kExchangeOffset + Shape::kExchangeBytes - exchange; };
  if (walk.first < walk.end) {
    hw::wait_copies<0>();
    hw::show_copies_to_multiplies();
    // The other block is there, and so are the copies of all threads.
    hw::arrive_cluster();
    hw::wait_cluster();
    warp.start_keys(keys);
    warp.finish_keys(1 - half, exchange);
    hw::arrive_cluster();
    hw::sync_block();
    fill_keys(walk.first + 2, keys);
    hw::wait_cluster();
  }
  DGEMMA_NO_UNROLL
  for (int tile = walk.first; tile < walk.end; ++tile) {
    warp.take_scores(exchange);
    keys = other_keys();
    exchange = other_exchange();
    const bool more = tile + 1 < walk.end;
    // The keys of the next tile came before the values of the last one.
    if (more) warp.start_keys(keys);
    // Nobody multiplies the values of the last tile any more.
    hw::sync_block();
    fill_values(tile, Shape::kValuesOffset);
    warp.finish_scores(p, walk, tile, rows);
    warp.update_softmax();
    // What lay in this half of the exchange was read before the other block arrived for the last tile.
    if (more) warp.finish_keys(1 - half, exchange);
    hw::arrive_cluster();
    hw::wait_copies<0>();
    hw::show_copies_to_multiplies();
    hw::sync_block();
    warp.start_values(Shape::kValuesOffset);
    fill_keys(tile + 3, keys);
    hw::wait_cluster();
    warp.finish_values();
  }
  hw::wait_copies<0>();
  warp.finish(p, walk, rows);
}

}  // namespace dgemma
