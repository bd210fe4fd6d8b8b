// Attention at head_dim 512 with wgmma, by clusters of two blocks of threads.
//
// 128 rows have an output of 256 KB in fp32, all registers of a multiprocessor, so two multiprocessors share it: each
// multiplies its half of the head's columns for the scores, writes them into the other's shared memory, adds what the
// other has written into its own, and goes on with the same bits for its half of the output. No score is computed
// twice, and no key or value is read by both.
#pragma once

#include "../../common/device/cluster.cuh"
#include "warp_wgmma.cuh"

namespace dgemma {

template <class T>
struct BlockAttentionClusterWarp : BlockAttentionWgmmaWarp<T, BlockAttentionWgmmaShape<512>> {
  using Shape = BlockAttentionWgmmaShape<512>;

  DGEMMA_DEVICE_MEMBER uint32_t place_of(int n, uint32_t exchange) const {
    return exchange + uint32_t(this->row_warp) * Shape::kExchangeWarpBytes +
           uint32_t(n * 32 + this->lane) * 16;
  }

  // Waits for what was started and shows it to the other block.
  DGEMMA_DEVICE_MEMBER void show_keys_to(int block, uint32_t exchange) {
    this->finish_keys();
    DGEMMA_UNROLL
    for (int n = 0; n < Shape::kKeyTiles; ++n) {
      hw::Words4 words;
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) words.word[j] = bits_from_float(this->ahead[n][j]);
      hw::store_in_cluster(block, place_of(n, exchange), words);
    }
  }

  // The scores of the next tile, of both blocks' columns. Addition commutes, so both blocks get the same bits.
  DGEMMA_DEVICE_MEMBER void take_both_scores(uint32_t exchange) {
    DGEMMA_UNROLL
    for (int n = 0; n < Shape::kKeyTiles; ++n) {
      const hw::Words4 words = hw::Shared<hw::Words4>{place_of(n, exchange)}.load(0);
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) this->scores[0][n][j] = this->ahead[n][j] + float_from_bits(words.word[j]);
    }
  }
};

// Grid: x = the two blocks of every tile of rows of every batch row and KV head; y = splits.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(BlockAttentionWgmmaShape<512>::kThreads, 1) DGEMMA_CLUSTER(BlockAttentionWgmmaShape<512>::kCluster)
    block_attention_cluster_kernel(const BlockAttentionParams p) {
  using Shape = BlockAttentionWgmmaShape<512>;
  const BlockAttentionTask<T, Shape> task(p);
  fill_queries<T, Shape>(p, task.walk, task.rows, task.part);
  task.fill_keys(task.walk.first, Shape::kKeysOffset);
  task.fill_keys(task.walk.first + 1, Shape::kKeysOffset + Shape::kTileBytes);

  BlockAttentionClusterWarp<T> warp;
  warp.begin();
  warp.column_warp = task.part;

  // The scores run one tile ahead, so that their products overlap the softmax of the tile before, and the way from block
  // to block the product of its values.
  uint32_t keys = Shape::kKeysOffset, exchange = Shape::kExchangeOffset;
  const auto other_keys = [&] { return 2 * Shape::kKeysOffset + Shape::kTileBytes - keys; };
  const auto other_exchange = [&] { return 2 * Shape::kExchangeOffset + Shape::kExchangeBytes - exchange; };
  if (task.walk.first < task.walk.end) {
    hw::wait_copies<0>();
    hw::show_copies_to_multiplies();
    // The other block is there, and so are the copies of all threads.
    hw::arrive_cluster();
    hw::wait_cluster();
    warp.start_keys(keys);
    warp.show_keys_to(1 - task.part, exchange);
    hw::arrive_cluster();
    hw::sync_block();
    task.fill_keys(task.walk.first + 2, keys);
    hw::wait_cluster();
  }
  DGEMMA_NO_UNROLL
  for (int tile = task.walk.first; tile < task.walk.end; ++tile) {
    warp.take_both_scores(exchange);
    keys = other_keys();
    exchange = other_exchange();
    const bool more = tile + 1 < task.walk.end;
    // The keys of the next tile came before the values of the last one.
    if (more) warp.start_keys(keys);
    // Nobody multiplies the values of the last tile any more.
    hw::sync_block();
    task.fill_values(tile, Shape::kValuesOffset);
    warp.finish_scores(p, task.walk, tile, task.rows);
    warp.update_softmax();
    // What lay in this half of the exchange was read before the other block arrived for the last tile.
    if (more) warp.show_keys_to(1 - task.part, exchange);
    hw::arrive_cluster();
    hw::wait_copies<0>();
    hw::show_copies_to_multiplies();
    hw::sync_block();
    warp.start_values(Shape::kValuesOffset);
    task.fill_keys(tile + 3, keys);
    hw::wait_cluster();
    warp.finish_values();
  }
  hw::wait_copies<0>();
  warp.finish(p, task.walk, task.rows);
}

}  // namespace dgemma
