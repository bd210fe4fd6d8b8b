// Attention at head_dim 256 with wgmma: a block of threads has all of the head, so its scores are whole.
#pragma once

#include "warp_wgmma.cuh"

namespace dgemma {

// Grid: x = every tile of rows of every batch row and KV head; y = splits.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(BlockAttentionWgmmaShape<256>::kThreads, 1)
    block_attention_wgmma_kernel(const BlockAttentionParams p) {
  using Shape = BlockAttentionWgmmaShape<256>;
  const BlockAttentionTask<T, Shape> task(p);
  fill_queries<T, Shape>(p, task.walk, task.rows, task.part);
  task.fill_keys(task.walk.first, Shape::kKeysOffset);
  task.fill_keys(task.walk.first + 1, Shape::kKeysOffset + Shape::kTileBytes);

  BlockAttentionWgmmaWarp<T, Shape> warp;
  warp.begin();

  // The scores run one tile ahead, so that their products overlap the softmax of the tile before.
  uint32_t keys = Shape::kKeysOffset, values = Shape::kValuesOffset;
  const auto other_keys = [&] { return 2 * Shape::kKeysOffset + Shape::kTileBytes - keys; };
  const auto other_values = [&] { return 2 * Shape::kValuesOffset + Shape::kTileBytes - values; };
  if (task.walk.first < task.walk.end) {
    hw::wait_copies<0>();
    hw::show_copies_to_multiplies();
    hw::sync_block();
    warp.start_keys(keys);
    task.fill_values(task.walk.first, values);
    warp.finish_keys();
    hw::sync_block();
    task.fill_keys(task.walk.first + 2, keys);
  }
  DGEMMA_NO_UNROLL
  for (int tile = task.walk.first; tile < task.walk.end; ++tile) {
    warp.take_scores();
    keys = other_keys();
    // The keys of the next tile came before the values of this one's predecessor were multiplied.
    const bool more = tile + 1 < task.walk.end;
    if (more) warp.start_keys(keys);
    warp.finish_scores(p, task.walk, tile, task.rows);
    warp.update_softmax();
    if (more) warp.finish_keys();
    hw::wait_copies<0>();
    hw::show_copies_to_multiplies();
    // Nobody multiplies the next tile's keys or the last one's values any more.
    hw::sync_block();
    warp.start_values(values);
    task.fill_keys(tile + 3, keys);
    values = other_values();
    task.fill_values(tile + 1, values);
    warp.finish_values();
  }
  hw::wait_copies<0>();
  warp.finish(p, task.walk, task.rows);
}

}  // namespace dgemma
