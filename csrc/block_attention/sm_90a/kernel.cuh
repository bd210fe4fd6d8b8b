// Attention at head_dim 512 with wgmma, by clusters of two blocks of threads.
//
// 128 rows have an output of 256 KB in fp32, all registers of a multiprocessor, so two multiprocessors share it. Each
// takes half of a tile's keys, over all columns of the head, to scores and probabilities, tells the other the
// probabilities, and multiplies those of all keys with its half of the values' columns. No score is computed twice, and
// no key or value is read by both. What goes from block to block is 8 KB of probabilities by tile, and of every row the
// largest score of a tile further on, so that both blocks take the same maximum and need to meet once a tile.
#pragma once

#include "../../common/device/cluster.cuh"
#include "warp_wgmma.cuh"

namespace dgemma {

template <class T>
struct BlockAttentionClusterWarp : BlockAttentionWgmmaWarp<T, BlockAttentionWgmmaShape<512>> {
  using Shape = BlockAttentionWgmmaShape<512>;
  static constexpr int kQuerySteps = Shape::kQueryColumnsInRegisters / 16, kProbabilitySteps = Shape::kKeyTiles / 2;

  using Probabilities = uint32_t[kProbabilitySteps][4];

  uint32_t first_queries[kQuerySteps][4];  // of the columns that shared memory does not hold
  // Of this block's keys: the largest scores of a tile, the probabilities of the one before it.
  float largest[1][2];
  Probabilities probabilities;

  // Kept through the loop, what derives from it would cost registers that the accumulators need.
  DGEMMA_DEVICE_MEMBER int first_key() const { return hw::recomputed(this->column_warp) * Shape::kOwnKeys; }

  DGEMMA_DEVICE_MEMBER void load_queries(const BlockAttentionParams& p, const KeyWalk& walk, const QueryRows& rows) {
    DGEMMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const T* source = query_row<T>(p, walk, rows, this->row(rows, 0, half)) + this->lane % 4 * 2;
      DGEMMA_UNROLL
      for (int step = 0; step < kQuerySteps; ++step) {
        first_queries[step][half] = load_pair<true>(source + step * 16);
        first_queries[step][2 + half] = load_pair<true>(source + step * 16 + 8);
      }
    }
  }

  // Starts on the scores of this block's keys.
  DGEMMA_DEVICE_MEMBER void start_keys(uint32_t keys) {
    const hw::SharedMatrix left = this->queries(), right = this->keys_at(keys);
    hw::begin_multiplies(this->ahead);
    DGEMMA_UNROLL
    for (int step = 0; step < Shape::kHeadDim / 16; ++step) {
      const hw::SharedMatrix columns = right.at(this->to_step(step, Shape::kKeyPanelBytes));
      if (step < kQuerySteps)
        hw::multiply_rows<T>(this->ahead, first_queries[step], columns, step > 0);
      else
        hw::multiply_rows<T>(this->ahead, left.at(this->to_step(step - kQuerySteps, Shape::kQueryPanelBytes)), columns, true);
    }
    hw::commit_multiplies();
  }

  // Waits for what was started, but for the kPending groups of products that were committed after it.
  template <int kPending>
  DGEMMA_DEVICE_MEMBER void finish_keys(const BlockAttentionParams& p, const KeyWalk& walk, int tile, const QueryRows& rows) {
    hw::wait_multiplies<kPending>(this->ahead);
    this->take_scores();
    this->finish_scores(p, walk, tile, rows, first_key());
    this->find_largest(largest);
  }

  DGEMMA_DEVICE_MEMBER hw::Shared<hw::Words4> place_of_largest(uint32_t buffer) const {
    return {buffer + uint32_t(hw::recomputed(hw::thread_x()) / 4) * 16};
  }

  DGEMMA_DEVICE_MEMBER void tell_largest(int block, uint32_t buffer) const {
    if (this->lane % 4 == 0)
      hw::store_in_cluster(block, place_of_largest(buffer).offset,
                           {{bits_from_float(largest[0][0]), bits_from_float(largest[0][1]), 0, 0}});
  }

  // Scores become probabilities, below the largest score of both blocks' keys. Returns whether the output has to be
  // rescaled.
  DGEMMA_DEVICE_MEMBER bool take_softmax(uint32_t told, float (&correction)[1][2]) {
    const hw::Words4 words = place_of_largest(told).load(0);
    DGEMMA_UNROLL
    for (int half = 0; half < 2; ++half) largest[0][half] = fmaxf(largest[0][half], float_from_bits(words.word[half]));
    return this->take_probabilities(largest, correction);
  }

  DGEMMA_DEVICE_MEMBER hw::Shared<hw::Words4> place_of_probabilities(int step, uint32_t buffer) const {
    return {buffer + uint32_t(hw::recomputed(hw::thread_x()) + step * Shape::kThreads) * 16};
  }

  DGEMMA_DEVICE_MEMBER void tell_probabilities(const Probabilities& own, int block, uint32_t buffer) const {
    DGEMMA_UNROLL
    for (int step = 0; step < kProbabilitySteps; ++step)
      hw::store_in_cluster(block, place_of_probabilities(step, buffer).offset,
                           {{own[step][0], own[step][1], own[step][2], own[step][3]}});
  }

  // Starts on output += probabilities x values, of this block's keys and of the other's.
  DGEMMA_DEVICE_MEMBER void start_values(uint32_t values, uint32_t told) {
    Probabilities others;
    DGEMMA_UNROLL
    for (int step = 0; step < kProbabilitySteps; ++step) {
      const hw::Words4 words = place_of_probabilities(step, told).load(0);
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) others[step][j] = words.word[j];
    }
    hw::begin_multiplies(this->output[0]);
    this->multiply_values(probabilities, values + uint32_t(first_key() / 8) * Shape::kGroupBytes);
    this->multiply_values(others, values + uint32_t((Shape::kOwnKeys - first_key()) / 8) * Shape::kGroupBytes);
    hw::commit_multiplies();
  }

  DGEMMA_DEVICE_MEMBER void finish_values() { hw::wait_multiplies<0>(this->output[0]); }

  // What the lane has seen, and what the same lane of the other block has: addition commutes, so both get the same bits.
  DGEMMA_DEVICE_MEMBER void tell_sums(int block, uint32_t buffer) const {
    hw::store_in_cluster(block, place_of_probabilities(0, buffer).offset,
                         {{bits_from_float(this->sum[0][0]), bits_from_float(this->sum[0][1]), 0, 0}});
  }
  DGEMMA_DEVICE_MEMBER void add_sums(uint32_t told) {
    const hw::Words4 words = place_of_probabilities(0, told).load(0);
    DGEMMA_UNROLL
    for (int half = 0; half < 2; ++half) this->sum[0][half] += float_from_bits(words.word[half]);
  }
};

// Which of two buffers a tile has.
struct ClusterBuffers {
  using Shape = BlockAttentionWgmmaShape<512>;
  uint32_t odd;

  DGEMMA_DEVICE_MEMBER ClusterBuffers other() const { return {1 - odd}; }
  DGEMMA_DEVICE_MEMBER uint32_t keys() const { return Shape::kKeysOffset + odd * Shape::kKeyTileBytes; }
  DGEMMA_DEVICE_MEMBER uint32_t probabilities() const {
    return Shape::kProbabilitiesOffset + odd * Shape::kProbabilityBytes;
  }
  DGEMMA_DEVICE_MEMBER uint32_t largest() const { return Shape::kLargestOffset + odd * Shape::kLargestBytes; }
};

// The values of one tile, beside them the probabilities of the next one and the scores of the one after that. kMore: of
// those two, how many there are. kLeads: this warpgroup's scores are made while the other one takes its softmax, and the
// other's while this one does, so that the tensor cores always have something to do.
template <int kMore, bool kLeads, class T>
DGEMMA_DEVICE void take_tile(const BlockAttentionTask<T, BlockAttentionWgmmaShape<512>>& task,
                             BlockAttentionClusterWarp<T>& warp, int tile, ClusterBuffers own) {
  using Shape = BlockAttentionWgmmaShape<512>;
  const int other_block = 1 - task.part;
  hw::wait_copies<0>();
  hw::show_copies_to_multiplies();
  // Nobody multiplies the last tile's values any more, nor the next tile's keys.
  hw::sync_block();
  if constexpr (kMore > 1 && kLeads) warp.start_keys(own.keys());
  task.fill_values(tile, Shape::kValuesOffset);
  task.fill_keys(tile + 3, own.other().keys());
  typename BlockAttentionClusterWarp<T>::Probabilities next;
  float correction[1][2];
  bool rescale = false;
  if constexpr (kMore > 0) {
    rescale = warp.take_softmax(own.other().largest(), correction);
    warp.pack_probabilities(next);
    // What lay there was read before the other block arrived for the last tile.
    warp.tell_probabilities(next, other_block, own.other().probabilities());
  }
  if constexpr (kMore > 1 && !kLeads) warp.start_keys(own.keys());
  hw::wait_copies<1>();
  hw::show_copies_to_multiplies();
  hw::sync_block();
  if constexpr (kMore > 1 && kLeads) {
    warp.template finish_keys<0>(task.p, task.walk, tile + 2, task.rows);
    warp.tell_largest(other_block, own.largest());
  }
  warp.start_values(Shape::kValuesOffset, own.probabilities());
  if constexpr (kMore > 1 && !kLeads) {
    warp.template finish_keys<1>(task.p, task.walk, tile + 2, task.rows);
    warp.tell_largest(other_block, own.largest());
  }
  if constexpr (kMore > 0) hw::arrive_cluster();
  warp.finish_values();
  if constexpr (kMore > 0) {
    if (rescale) warp.rescale_output(correction);
    DGEMMA_UNROLL
    for (int step = 0; step < warp.kProbabilitySteps; ++step) {
      DGEMMA_UNROLL
      for (int j = 0; j < 4; ++j) warp.probabilities[step][j] = next[step][j];
    }
    hw::wait_cluster();
  }
}

// All tiles from the first one on; returns the buffers of the last one.
template <bool kLeads, class T>
DGEMMA_DEVICE ClusterBuffers take_tiles(const BlockAttentionTask<T, BlockAttentionWgmmaShape<512>>& task,
                                        BlockAttentionClusterWarp<T>& warp, ClusterBuffers own) {
  const int first = task.walk.first, end = task.walk.end;
  DGEMMA_NO_UNROLL
  for (int tile = first; tile < end - 2; ++tile) {
    take_tile<2, kLeads>(task, warp, tile, own);
    own = own.other();
  }
  if (first + 1 < end) {
    take_tile<1, kLeads>(task, warp, end - 2, own);
    own = own.other();
  }
  take_tile<0, kLeads>(task, warp, end - 1, own);
  return own;
}

// Grid: x = the two blocks of every tile of rows of every batch row and KV head; y = splits.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(BlockAttentionWgmmaShape<512>::kThreads, 1) DGEMMA_CLUSTER(BlockAttentionWgmmaShape<512>::kCluster)
    block_attention_cluster_kernel(const BlockAttentionParams p) {
  using Shape = BlockAttentionWgmmaShape<512>;
  const BlockAttentionTask<T, Shape> task(p);
  const int first = task.walk.first, end = task.walk.end, other_block = 1 - task.part;
  ClusterBuffers own{0};
  BlockAttentionClusterWarp<T> warp;
  warp.begin();
  warp.column_warp = task.part;
  if (first < end) {
    fill_queries<T, Shape>(p, task.walk, task.rows);
    task.fill_keys(first, own.keys());
    task.fill_keys(first + 1, own.other().keys());
    warp.load_queries(p, task.walk, task.rows);
    hw::wait_copies<0>();
    hw::show_copies_to_multiplies();
    // The other block is there, and so are the copies of all threads.
    hw::arrive_cluster();
    hw::wait_cluster();
    warp.start_keys(own.keys());
    warp.template finish_keys<0>(p, task.walk, first, task.rows);
    warp.tell_largest(other_block, own.largest());
    hw::arrive_cluster();
    hw::wait_cluster();
    task.fill_keys(first + 2, own.keys());
    const bool more = first + 1 < end;
    if (more) warp.start_keys(own.other().keys());
    float correction[1][2];
    warp.take_softmax(own.largest(), correction);
    warp.pack_probabilities(warp.probabilities);
    warp.tell_probabilities(warp.probabilities, other_block, own.probabilities());
    if (more) {
      warp.template finish_keys<0>(p, task.walk, first + 1, task.rows);
      warp.tell_largest(other_block, own.other().largest());
    }
    hw::arrive_cluster();
    hw::wait_cluster();

    own = warp.row_warp < Shape::kRowWarps / 2 ? take_tiles<true>(task, warp, own) : take_tiles<false>(task, warp, own);
    warp.tell_sums(other_block, own.other().probabilities());
    hw::arrive_cluster();
    hw::wait_cluster();
    warp.add_sums(own.other().probabilities());
  }
  warp.finish(p, task.walk, task.rows);
}

}  // namespace dgemma
