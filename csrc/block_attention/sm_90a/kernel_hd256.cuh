// Attention at head_dim 256 with wgmma: a block of threads has all of the head, so its scores are whole.
#pragma once

#include "warp_wgmma.cuh"

namespace dgemma {

template <class T>
struct BlockAttentionHeadWarp : BlockAttentionWgmmaWarp<T, BlockAttentionWgmmaShape<256>> {
  using Shape = BlockAttentionWgmmaShape<256>;
  using Probabilities = uint32_t[Shape::kKeyTiles / 2][4];

  DGEMMA_DEVICE_MEMBER void start_keys(uint32_t keys) {
    const hw::SharedMatrix left = this->queries(), right = this->keys_at(keys);
    hw::begin_multiplies(this->ahead);
    DGEMMA_UNROLL
    for (int step = 0; step < Shape::kHeadDim / 16; ++step)
      hw::multiply_rows<T>(this->ahead, left.at(this->to_step(step, Shape::kQueryPanelBytes)),
                           right.at(this->to_step(step, Shape::kKeyPanelBytes)), step > 0);
    hw::commit_multiplies();
  }

  // Waits for what was started, but for the kPending groups of products that were committed after it.
  template <int kPending>
  DGEMMA_DEVICE_MEMBER void finish_keys() {
    hw::wait_multiplies<kPending>(this->ahead);
    this->take_scores();
  }

  // Scores of a tile become probabilities. Returns whether the output has to be rescaled.
  DGEMMA_DEVICE_MEMBER bool take_softmax(const BlockAttentionTask<T, Shape>& task, int tile, float (&correction)[1][2]) {
    this->finish_scores(task.p, task.walk, tile, task.rows);
    float largest[1][2];
    this->find_largest(largest);
    return this->take_probabilities(largest, correction);
  }

  DGEMMA_DEVICE_MEMBER void start_values(const Probabilities& probabilities, uint32_t values) {
    hw::begin_multiplies(this->output[0]);
    this->multiply_values(probabilities, values);
    hw::commit_multiplies();
  }
  DGEMMA_DEVICE_MEMBER void finish_values() { hw::wait_multiplies<0>(this->output[0]); }
};

// One tile. kMore: another one follows, whose scores are made. kLeads: this warpgroup takes the softmax of a tile while the
// other one multiplies values and makes scores, and multiplies while the other one takes its softmax; so it comes with
// probabilities and goes with those of the next tile, where the other one has scores.
template <bool kMore, bool kLeads, class T>
DGEMMA_DEVICE void take_tile(const BlockAttentionTask<T, BlockAttentionWgmmaShape<256>>& task,
                             BlockAttentionHeadWarp<T>& warp, int tile, uint32_t odd,
                             typename BlockAttentionHeadWarp<T>::Probabilities& probabilities) {
  using Shape = BlockAttentionWgmmaShape<256>;
  const uint32_t keys = Shape::kKeysOffset + odd * Shape::kKeyTileBytes,
                 next_keys = Shape::kKeysOffset + (1 - odd) * Shape::kKeyTileBytes;
  const uint32_t values = Shape::kValuesOffset + odd * Shape::kValueTileBytes,
                 next_values = Shape::kValuesOffset + (1 - odd) * Shape::kValueTileBytes;
  hw::wait_copies<0>();
  hw::show_copies_to_multiplies();
  // Nobody multiplies this tile's keys or the last one's values any more.
  hw::sync_block();
  task.fill_keys(tile + 2, keys);
  task.fill_values(tile + 1, next_values);
  float correction[1][2];
  if constexpr (!kLeads) {
    if (warp.take_softmax(task, tile, correction)) warp.rescale_output(correction);
    warp.pack_probabilities(probabilities);
    hw::pin_operand(probabilities);
  }
  if constexpr (kMore) warp.start_keys(next_keys);
  warp.start_values(probabilities, values);
  if constexpr (kMore && kLeads) {
    warp.template finish_keys<1>();
    const bool rescale = warp.take_softmax(task, tile + 1, correction);
    warp.finish_values();
    if (rescale) warp.rescale_output(correction);
    // Those before were multiplied until now.
    warp.pack_probabilities(probabilities);
  } else {
    warp.finish_values();
    if constexpr (kMore) warp.template finish_keys<0>();
  }
}

// All tiles, the scores of the first of which are there.
template <bool kLeads, class T>
DGEMMA_DEVICE void take_tiles(const BlockAttentionTask<T, BlockAttentionWgmmaShape<256>>& task,
                              BlockAttentionHeadWarp<T>& warp) {
  const int first = task.walk.first, end = task.walk.end;
  typename BlockAttentionHeadWarp<T>::Probabilities probabilities;
  float correction[1][2];
  if constexpr (kLeads) {
    warp.take_softmax(task, first, correction);
    warp.pack_probabilities(probabilities);
  }
  uint32_t odd = 0;
  DGEMMA_NO_UNROLL
  for (int tile = first; tile < end - 1; ++tile) {
    take_tile<true, kLeads>(task, warp, tile, odd, probabilities);
    odd = 1 - odd;
  }
  take_tile<false, kLeads>(task, warp, end - 1, odd, probabilities);
}

// Grid: x = every tile of rows of every batch row and KV head; y = splits.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(BlockAttentionWgmmaShape<256>::kThreads, 1)
    block_attention_wgmma_kernel(const BlockAttentionParams p) {
  using Shape = BlockAttentionWgmmaShape<256>;
  const BlockAttentionTask<T, Shape> task(p);
  const int first = task.walk.first;
  BlockAttentionHeadWarp<T> warp;
  warp.begin();
  if (first < task.walk.end) {
    fill_queries<T, Shape>(p, task.walk, task.rows);
    task.fill_keys(first, Shape::kKeysOffset);
    task.fill_keys(first + 1, Shape::kKeysOffset + Shape::kKeyTileBytes);
    task.fill_values(first, Shape::kValuesOffset);
    // The first keys; their values have time.
    hw::wait_copies<2>();
    hw::show_copies_to_multiplies();
    hw::sync_block();
    warp.start_keys(Shape::kKeysOffset);
    warp.template finish_keys<0>();
    if (warp.row_warp < Shape::kRowWarps / 2)
      take_tiles<true>(task, warp);
    else
      take_tiles<false>(task, warp);
  }
  warp.finish(p, task.walk, task.rows);
}

}  // namespace dgemma
