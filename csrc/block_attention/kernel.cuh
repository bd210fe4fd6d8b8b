// Attention of a block's queries over [prefix[start:end] ; block], with mma.m16n8k16 and cp.async.
//
// The query heads of a KV head are packed into rows, so a tile of rows reads the keys of its KV head once. Tiles of
// keys and of values alternate through a ring of buffers in shared memory. At head_dim 512 two warps share 16 rows:
// each multiplies half of the head's columns for the scores, which the two add, and owns half of the output.
#pragma once

#include "warp.cuh"

namespace dgemma {

// Grid: x = tiles of rows of every batch row and KV head, those of one KV head side by side; y = splits.
template <class T, int kHeadDim>
DGEMMA_KERNEL DGEMMA_BOUNDS(BlockAttentionShape<kHeadDim>::kThreads, BlockAttentionShape<kHeadDim>::kBlocks)
    block_attention_kernel(const BlockAttentionParams p) {
  using Shape = BlockAttentionShape<kHeadDim>;
  QueryRows rows;
  rows.group = int(p.query_heads / p.kv_heads);
  rows.count = rows.group * int(p.length);
  const int row_tiles = (rows.count + Shape::kRows - 1) / Shape::kRows;
  rows.first = int(hw::block_x() % row_tiles) * Shape::kRows;
  const int last_row = rows.first + Shape::kRows < rows.count ? rows.first + Shape::kRows - 1 : rows.count - 1;
  const KeyWalk walk = key_walk<Shape>(p, hw::block_x() / row_tiles, rows.first / rows.group, last_row / rows.group);

  // Steps alternate between the keys and the values of a tile. The buffer that the step before has used up is filled
  // for the step that is kAhead ahead, after the barrier that says so.
  constexpr int kAhead = Shape::kBuffers - 1;
  constexpr bool kSameKind = kAhead % 2 == 0;
  DGEMMA_UNROLL
  for (int step = 0; step < kAhead; ++step) {
    const int tile = walk.first + step / 2;
    const uint32_t buffer = step * Shape::kBufferBytes;
    if (tile < walk.end) {
      if (step % 2 == 0)
        fill_buffer<T, kHeadDim>(buffer, tile_rows<T, Shape, false>(p, walk, tile));
      else
        fill_buffer<T, kHeadDim>(buffer, tile_rows<T, Shape, true>(p, walk, tile));
    }
    hw::commit_copies();
  }

  BlockAttentionWarp<T, kHeadDim> warp;
  warp.start(p, walk, rows);

  uint32_t used = 0, filled = kAhead * Shape::kBufferBytes;
  const auto after = [](uint32_t buffer) {
    return buffer + Shape::kBufferBytes == Shape::kExchangeOffset ? 0 : buffer + Shape::kBufferBytes;
  };
  DGEMMA_NO_UNROLL
  for (int tile = walk.first; tile < walk.end; ++tile) {
    hw::wait_copies<kAhead - 1>();
    hw::sync_block();
    if (tile + kAhead / 2 < walk.end)
      fill_buffer<T, kHeadDim>(filled, tile_rows<T, Shape, !kSameKind>(p, walk, tile + kAhead / 2));
    hw::commit_copies();
    warp.multiply_keys(used);
    if constexpr (Shape::kColumnWarps > 1) warp.show_scores();

    hw::wait_copies<kAhead - 1>();
    hw::sync_block();
    const uint32_t keys = used;
    used = after(used);
    if constexpr (Shape::kColumnWarps > 1) warp.add_shown_scores();
    warp.finish_scores(p, walk, tile, rows);
    warp.update_softmax();
    warp.multiply_values(used);
    // Only here, because the scores' registers are free now.
    if (tile + (kAhead + 1) / 2 < walk.end)
      fill_buffer<T, kHeadDim>(keys, tile_rows<T, Shape, kSameKind>(p, walk, tile + (kAhead + 1) / 2));
    hw::commit_copies();
    filled = used;
    used = after(used);
  }
  warp.finish(p, walk, rows);
}

}  // namespace dgemma
