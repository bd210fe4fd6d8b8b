// The two products of an expert, as weights times rows: rows of weights are the first dimension of mma.m16n8k16, of
// which there are enough for its 16, and the few pairs of a tile the second, of 8.
//
// Weights and rows come through a ring of stages in shared memory by cp.async, weights as they are stored. Each warp
// owns two times 16 rows of weights: in the first product the same columns of gate and up.
#pragma once

#include "../common/device_math.cuh"
#include "copies.cuh"
#include "scales.cuh"
#include "weights.cuh"

namespace dgemma {

// One warp's rows of weights times all pairs of the tile.
template <class T, WeightFormat kFormat, int kPairs>
struct ExpertsWarp {
  using Shape = ExpertsShape<kFormat, kPairs>;
  using Scales = typename ExpertsScalesOf<kFormat>::Type;

  int lane, warp;
  float sum[2][Shape::kPairTiles][4];
  Scales scales;

  // Of the block's rows of weights: row lane / 4 (+ 8) of the warp's first or second 16.
  DGEMMA_DEVICE_MEMBER int row(int i, int half) const { return warp * 32 + i * 16 + half * 8 + lane / 4; }

  DGEMMA_DEVICE_MEMBER void begin() {
    lane = hw::thread_x() % 32;
    warp = hw::thread_x() / 32;
    clear(sum);
  }

  DGEMMA_DEVICE_MEMBER static void clear(float (&values)[2][Shape::kPairTiles][4]) {
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int n = 0; n < Shape::kPairTiles; ++n) {
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) values[i][n][j] = 0.0f;
      }
    }
  }

  DGEMMA_DEVICE_MEMBER void multiply(uint32_t buffer, int stage, int stages) {
    if constexpr (kFormat == WeightFormat::kFp8) {
      // A stage is a block, whose scale multiplies the product over its columns, and arrives while that is computed.
      float scale[2][2], product[2][Shape::kPairTiles][4];
      scales.load(scale, stage);
      clear(product);
      multiply_into(product, buffer, nullptr);
      DGEMMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        DGEMMA_UNROLL
        for (int n = 0; n < Shape::kPairTiles; ++n) {
          DGEMMA_UNROLL
          for (int j = 0; j < 4; ++j) sum[i][n][j] = fmaf(product[i][n][j], scale[i][j / 2], sum[i][n][j]);
        }
      }
    } else if constexpr (kFormat == WeightFormat::kNvfp4) {
      const uint32_t scale[4] = {scales.next[0][0], scales.next[0][1], scales.next[1][0], scales.next[1][1]};
      if (stage + 1 < stages) scales.load_next(stage + 1);
      multiply_into(sum, buffer, scale);
    } else {
      multiply_plain(buffer);
    }
  }

  // Of weights in the dtype of the rows, which ldmatrix loads as operands.
  DGEMMA_DEVICE_MEMBER void multiply_plain(uint32_t buffer) {
    // Matrices: rows 0 ... 7 and 8 ... 15 at the first chunk of a step, then at its second; of pairs the first eight at
    // both chunks, then the others.
    const int weight = lane % 16, weight_chunk = lane / 16, pair = lane / 16 * 8 + lane % 8, pair_chunk = lane / 8 % 2;
    DGEMMA_UNROLL
    for (int step = 0; step < Shape::kChunks / 2; ++step) {
      uint32_t left[2][4];
      DGEMMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int row = warp * 32 + i * 16 + weight;
        hw::load_matrices(left[i], buffer + weight_place<kFormat, kPairs>(row, step * 2 + weight_chunk));
      }
      DGEMMA_UNROLL
      for (int n = 0; n < Shape::kPairTiles; n += 2) {
        uint32_t right[4];
        hw::load_matrices(right, buffer + pair_place<kFormat, kPairs>(n * 8 + pair, step * 2 + pair_chunk));
        DGEMMA_UNROLL
        for (int i = 0; i < 2; ++i) {
          hw::multiply_add<T>(sum[i][n], left[i], right[0], right[1]);
          hw::multiply_add<T>(sum[i][n + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

  // group_scales: of NVFP4 weights, of the two rows of the first 16 and of the second.
  DGEMMA_DEVICE_MEMBER void multiply_into(float (&into)[2][Shape::kPairTiles][4], uint32_t buffer,
                                          const uint32_t* group_scales) const {
    constexpr int kPairChunksOfLane = ExpertsFormat<kFormat>::kValues / 8;
    // Two sums of 64 pairs leave no registers for operands of the next group.
    constexpr int kAtOnce = kFormat == WeightFormat::kFp8 && kPairs == kExpertsMany ? 1 : Shape::kGroups;
    DGEMMA_UNROLL_BY(kAtOnce)
    for (int group = 0; group < Shape::kGroups; ++group) {
      const int chunk = group * 4 + lane % 4;
      WeightChunk<T, kFormat> weights[2][2];
      DGEMMA_UNROLL
      for (int i = 0; i < 2; ++i) {
        DGEMMA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const uint32_t place = weight_place<kFormat, kPairs>(row(i, half), chunk);
          weights[i][half].words = hw::Shared<hw::Words4>{buffer + place}.load(0);
          if constexpr (kFormat == WeightFormat::kNvfp4) weights[i][half].set_scales(group_scales[2 * i + half]);
        }
      }
      DGEMMA_UNROLL
      for (int c = 0; c < kPairChunksOfLane; ++c) {
        uint32_t left[2][2][4];
        DGEMMA_UNROLL
        for (int step = 0; step < 2; ++step) {
          DGEMMA_UNROLL
          for (int i = 0; i < 2; ++i) {
            DGEMMA_UNROLL
            for (int j = 0; j < 4; ++j) left[step][i][j] = weights[i][j % 2].pair(c * 4 + step * 2 + j / 2);
          }
        }
        DGEMMA_UNROLL
        for (int n = 0; n < Shape::kPairTiles; ++n) {
          const uint32_t place = pair_place<kFormat, kPairs>(n * 8 + lane / 4, chunk * kPairChunksOfLane + c);
          const hw::Words4 pairs = hw::Shared<hw::Words4>{buffer + place}.load(0);
          DGEMMA_UNROLL
          for (int step = 0; step < 2; ++step) {
            DGEMMA_UNROLL
            for (int i = 0; i < 2; ++i)
              hw::multiply_add<T>(into[i][n], left[step][i], pairs.word[2 * step], pairs.word[2 * step + 1]);
          }
        }
      }
    }
  }
};

// sum = the block's rows of weights times its pairs.
template <bool kGated, class T, WeightFormat kFormat, int kPairs>
DGEMMA_DEVICE void multiply_tile(ExpertsWarp<T, kFormat, kPairs>& warp,
                                 const ExpertsCopies<T, kFormat, kPairs, kGated>& copies, const ExpertsMatrix& matrix,
                                 const ExpertsTile& tile, const ExpertsSides& sides) {
  using Shape = ExpertsShape<kFormat, kPairs>;
  constexpr int kAhead = Shape::kStages - 1;
  const int stages = (copies.depth + ExpertsFormat<kFormat>::kColumns - 1) / ExpertsFormat<kFormat>::kColumns;
  DGEMMA_UNROLL
  for (int stage = 0; stage < kAhead; ++stage) {
    if (stage < stages) copies.fill(stage * Shape::kStageBytes, stage);
    hw::commit_copies();
  }
  warp.begin();
  warp.scales.begin(matrix, tile.expert, sides, [&](int i) DGEMMA_INLINE {
    // Beyond the edge the first column stands in: computed, not stored.
    const int row = warp.row(i, 0);
    return matrix_row<kGated>(tile, column_of<kGated>(tile, row) < sides.columns ? row : i * 16, sides);
  });
  uint32_t used = 0, filled = kAhead * Shape::kStageBytes;
  const auto after = [](uint32_t buffer) DGEMMA_INLINE {
    return buffer + Shape::kStageBytes == Shape::kSharedBytes ? 0 : buffer + Shape::kStageBytes;
  };
  DGEMMA_NO_UNROLL
  for (int stage = 0; stage < stages; ++stage) {
    hw::wait_copies<kAhead - 1>();
    // Behind it everybody has used up the stage before, which is filled again.
    hw::sync_block();
    if (stage + kAhead < stages) copies.fill(filled, stage + kAhead);
    hw::commit_copies();
    warp.multiply(used, stage, stages);
    used = after(used);
    filled = after(filled);
  }
}

// The block's tile; false where there is none. Columns of the result vary fastest: blocks of one expert run close
// together, so L2 hands its rows, and the weights of a second tile, to all of them.
template <bool kGated>
DGEMMA_DEVICE bool tile_of_block(const ExpertsPlaces& places, int64_t columns, int tile_pairs, ExpertsTile& tile) {
  const int64_t across = experts_blocks_across<kGated>(columns);
  const int64_t i = hw::block_x() / across;
  tile.column = int(hw::block_x() % across) * kExpertsColumns<kGated>;
  tile.expert = places.tiles[i];
  if (tile.expert < 0) return false;
  tile.begin = places.tiles[places.most + i];
  const int end = places.tiles[2 * places.most + i];
  tile.end = end < tile.begin + tile_pairs ? end : tile.begin + tile_pairs;
  return true;
}

// Lanes 4 apart have neighbouring columns of the same two places. Both columns of one of the two: the lower lane's are
// of the first, the upper one's of the second. Conditions that lanes do not share come after all shuffles of a place, or
// the compiler makes a copy of them for either case.
DGEMMA_DEVICE void pair_columns(const float* values, float& low, float& high) {
  const bool upper = hw::thread_x() / 4 % 2 != 0;
  const float other = hw::shuffle_xor(upper ? values[0] : values[1], 4);
  low = upper ? other : values[0];
  high = upper ? values[1] : other;
}

// act(gate) * up. 0.5 (1 + tanh(u)) is 1 / (1 + e^(-2u)), which cancels nowhere.
DGEMMA_DEVICE float gated(Activation activation, float gate, float up) {
  const float u = activation == Activation::kGeluTanh
                      ? 1.5957691216057308f * fmaf(0.044715f * gate * gate, gate, gate)
                      : gate;
  return gate * hw::reciprocal_fast(1.0f + hw::exp2_fast(-u * kLog2E)) * up;
}

// middle [P, I] by place: act(gate) * up. Grid: tiles times blocks of columns.
template <class T, WeightFormat kFormat, int kPairs>
DGEMMA_KERNEL DGEMMA_BOUNDS(kExpertsThreads, 2)
    experts_gate_up_kernel(const ExpertsParams p, const ExpertsPlaces places, T* middle) {
  ExpertsTile tile;
  if (!tile_of_block<true>(places, p.width, kPairs, tile)) return;
  const int width = int(p.width), top_k = int(p.top_k);
  ExpertsCopies<T, kFormat, kPairs, true> copies;
  const ExpertsSides sides = {2 * width, width, width, int(p.embedding)};
  copies.begin(p.gate_up, tile, sides);
  copies.begin_pairs(p.hidden, p.hidden_stride, tile,
                     [&](int place) DGEMMA_INLINE { return places.order[place] / top_k; });
  ExpertsWarp<T, kFormat, kPairs> warp;
  multiply_tile<true>(warp, copies, p.gate_up, tile, sides);

  float of_gate = 1.0f, of_up = 1.0f;
  if constexpr (kFormat == WeightFormat::kNvfp4) {
    const float* scale = p.gate_up.global_scale + tile.expert * p.gate_up.global_scales;
    of_gate = kNvfp4Left * scale[0];
    of_up = kNvfp4Left * scale[p.gate_up.global_scales - 1];
  }
  DGEMMA_UNROLL
  for (int n = 0; n < kPairs / 8; ++n) {
    uint32_t both[2];
    DGEMMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      float values[2], low, high;
      DGEMMA_UNROLL
      for (int j = 0; j < 2; ++j)
        values[j] = gated(p.activation, of_gate * warp.sum[0][n][2 * half + j], of_up * warp.sum[1][n][2 * half + j]);
      pair_columns(values, low, high);
      both[half] = hw::pack<T>(low, high);
    }
    const int place = tile.begin + n * 8 + warp.lane % 4 * 2 + warp.lane / 4 % 2;
    if (place >= tile.end) continue;
    DGEMMA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int column = column_of<true>(tile, warp.row(0, half)) & ~1;
      if (column < width) *reinterpret_cast<uint32_t*>(middle + int64_t(place) * width + column) = both[half];
    }
  }
}

// partial [P, E] by pair: middle @ down^T in fp32. Grid: tiles times blocks of columns.
template <class T, WeightFormat kFormat, int kPairs>
DGEMMA_KERNEL DGEMMA_BOUNDS(kExpertsThreads, 2)
    experts_down_kernel(const ExpertsParams p, const ExpertsPlaces places, const T* middle, float* partial) {
  struct alignas(8) Two {
    float low, high;
  };
  ExpertsTile tile;
  if (!tile_of_block<false>(places, p.embedding, kPairs, tile)) return;
  const int embedding = int(p.embedding);
  ExpertsCopies<T, kFormat, kPairs, false> copies;
  const ExpertsSides sides = {embedding, embedding, 0, int(p.width)};
  copies.begin(p.down, tile, sides);
  copies.begin_pairs(middle, p.width, tile, [](int place) DGEMMA_INLINE { return place; });
  ExpertsWarp<T, kFormat, kPairs> warp;
  multiply_tile<false>(warp, copies, p.down, tile, sides);

  const float scale = kFormat == WeightFormat::kNvfp4 ? kNvfp4Left * p.down.global_scale[tile.expert] : 1.0f;
  DGEMMA_UNROLL
  for (int n = 0; n < kPairs / 8; ++n) {
    Two both[2][2];
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float values[2] = {scale * warp.sum[i][n][2 * half], scale * warp.sum[i][n][2 * half + 1]};
        pair_columns(values, both[i][half].low, both[i][half].high);
      }
    }
    const int place = tile.begin + n * 8 + warp.lane % 4 * 2 + warp.lane / 4 % 2;
    if (place >= tile.end) continue;
    float* row = partial + int64_t(places.order[place]) * embedding;
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int column = column_of<false>(tile, warp.row(i, half)) & ~1;
        if (column < embedding) *reinterpret_cast<Two*>(row + column) = both[i][half];
      }
    }
  }
}

}  // namespace dgemma
