// What one warp computes: its queries and its part of the output stay in registers from the first tile to the last.
#pragma once

#include "../common/device/tensor_core.cuh"
#include "../common/device_math.cuh"
#include "key_walk.cuh"

namespace dgemma {

constexpr float kLn2 = 0.693147180559945f;

// exp2 of the difference to a maximum, where a row that has seen no key yet has a maximum of -inf.
DGEMMA_DEVICE float exp2_below(float x, float maximum) {
  return hw::exp2_fast(x - (maximum == -INFINITY ? 0.0f : maximum));
}

// The rows of a KV head: row r is position r / group of query head r % group.
struct QueryRows {
  int first, count, group;  // first row of this block of threads; rows in all; query heads per KV head
};

// Where a row begins in the queries; those after the last one repeat it.
template <class T>
DGEMMA_DEVICE const T* query_row(const BlockAttentionParams& p, const KeyWalk& walk, const QueryRows& rows, int row) {
  const int r = row < rows.count ? row : rows.count - 1, position = r / rows.group;
  const int64_t head = int64_t(walk.kv_head) * rows.group + r - position * rows.group;
  return static_cast<const T*>(p.query.data) + walk.batch * p.query.batch_stride + head * p.query.head_stride +
         position * p.query.slot_stride;
}

template <class T, int kHeadDim, class S = BlockAttentionShape<kHeadDim>>
struct BlockAttentionWarp {
  using Shape = S;
  static constexpr int kRowTiles = Shape::kRowTiles, kKeyTiles = Shape::kKeyTiles;
  static constexpr int kSteps = Shape::kColumns / 16, kColumnTiles = Shape::kColumns / 8;

  int lane, row_warp, column_warp;
  uint32_t query[kRowTiles][kSteps][4];
  float output[kRowTiles][kColumnTiles][4];
  float scores[kRowTiles][kKeyTiles][4];  // then, as exp2 of them, probabilities
  float maximum[kRowTiles][2];            // of rows lane / 4 and lane / 4 + 8, in units of log2
  float sum[kRowTiles][2];                // of the probabilities that this lane has seen

  // The row of an accumulator's upper (half = 0) or lower (half = 1) two values.
  DGEMMA_DEVICE_MEMBER int row(const QueryRows& rows, int row_tile, int half) const {
    return rows.first + (row_warp * kRowTiles + row_tile) * 16 + half * 8 + lane / 4;
  }

  // Nothing seen yet.
  DGEMMA_DEVICE_MEMBER void begin() {
    lane = hw::thread_x() % 32;
    row_warp = hw::thread_x() / 32 % Shape::kRowWarps;
    column_warp = Shape::kColumnWarps == 1 ? 0 : hw::thread_x() / 32 / Shape::kRowWarps;
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        maximum[i][half] = -INFINITY;
        sum[i][half] = 0.0f;
      }
      DGEMMA_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) output[i][n][j] = 0.0f;
      }
    }
  }

  DGEMMA_DEVICE_MEMBER void start(const BlockAttentionParams& p, const KeyWalk& walk, const QueryRows& rows) {
    begin();
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        // Nothing of the rows after the last one is written.
        const T* source = query_row<T>(p, walk, rows, row(rows, i, half)) + column_warp * Shape::kColumns + lane % 4 * 2;
        if (p.query.aligned)
          load_query<true>(i, half, source);
        else
          load_query<false>(i, half, source);
      }
    }
  }

  template <bool kAligned>
  DGEMMA_DEVICE_MEMBER void load_query(int row_tile, int half, const T* source) {
    DGEMMA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      query[row_tile][step][half] = load_pair<kAligned>(source + step * 16);
      query[row_tile][step][2 + half] = load_pair<kAligned>(source + step * 16 + 8);
    }
  }

  // scores = query x keys over this warp's columns of the head.
  DGEMMA_DEVICE_MEMBER void multiply_keys(uint32_t buffer) {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) scores[i][n][j] = 0.0f;
      }
    }
    // Matrices: keys 0 ... 7 at the two chunks of a step, then keys 8 ... 15.
    const int key = lane / 16 * 8 + lane % 8, chunk = column_warp * (Shape::kColumns / 8) + lane / 8 % 2;
    const uint32_t first = buffer + swizzled<kHeadDim>(key, chunk);
    DGEMMA_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      DGEMMA_UNROLL
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t keys[4];
        hw::load_matrices(keys, further(first, step * 2) + n * 8 * Shape::kRowBytes);
        DGEMMA_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          hw::multiply_add<T>(scores[i][n], query[i][step], keys[0], keys[1]);
          hw::multiply_add<T>(scores[i][n + 1], query[i][step], keys[2], keys[3]);
        }
      }
    }
  }

  DGEMMA_DEVICE_MEMBER hw::Shared<hw::Words4> exchange(int of_column_warp) const {
    const int warp = of_column_warp * Shape::kRowWarps + row_warp;
    return {Shape::kExchangeOffset + warp * Shape::kExchangeWarpBytes};
  }

  // For the other warp of these rows, which has multiplied the other columns.
  DGEMMA_DEVICE_MEMBER void show_scores() const {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        hw::Words4 words;
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) words.word[j] = bits_from_float(scores[i][n][j]);
        exchange(column_warp).store((i * kKeyTiles + n) * 32 + lane, words);
      }
    }
  }

  // Addition commutes, so both warps get the same bits.
  DGEMMA_DEVICE_MEMBER void add_shown_scores() {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        const hw::Words4 words = exchange(1 - column_warp).load((i * kKeyTiles + n) * 32 + lane);
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) scores[i][n][j] += float_from_bits(words.word[j]);
      }
    }
  }

  DGEMMA_DEVICE_MEMBER void scale_scores(float factor) {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int n = 0; n < kKeyTiles; ++n) {
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) scores[i][n][j] *= factor;
      }
    }
  }

  // Scores in units of log2 after scale and softcap; -inf for keys that a row does not see. first_key: of the tile's that
  // they are of.
  DGEMMA_DEVICE_MEMBER void finish_scores(const BlockAttentionParams& p, const KeyWalk& walk, int tile,
                                          const QueryRows& rows, int first_key = 0) {
    scale_scores(p.softcap == 0.0f ? p.scale * kLog2E : p.scale / p.softcap);
    if (p.softcap != 0.0f) {
      const float cap = p.softcap * kLog2E;
      DGEMMA_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        DGEMMA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
          DGEMMA_UNROLL
          for (int j = 0; j < 4; ++j) scores[i][n][j] = cap * tanh_device(scores[i][n][j]);
        }
      }
    }
    const bool in_prefix = tile < walk.prefix_tiles;
    const int slot = in_prefix ? walk.prefix_start + tile * Shape::kKeys
                               : walk.block_start + (tile - walk.prefix_tiles) * Shape::kKeys;
    const int slots = (in_prefix ? walk.prefix_end : int(p.length)) - slot;
    // The rows' windows start within kRows keys of each other, the first one's where the walk does.
    const bool causal = p.causal && (!in_prefix || tile * Shape::kKeys < Shape::kRows);
    if (slots >= Shape::kKeys && !causal) return;
    // Where the block's first position is, in slots after this tile's first one.
    const int block = in_prefix ? slots : -slot;
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const int up_to_own = hw::recomputed(row(rows, i, half)) / rows.group + 1 + block;
        const int visible = causal && up_to_own < slots ? up_to_own : slots;
        const int hidden = causal ? up_to_own - int(p.window) : 0;
        DGEMMA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
          DGEMMA_UNROLL
          for (int j = 0; j < 2; ++j)
            if (const int key = first_key + n * 8 + lane % 4 * 2 + j; key >= visible || key < hidden)
              scores[i][n][2 * half + j] = -INFINITY;
        }
      }
    }
  }

  // The largest score of each row; -inf where it sees no key.
  DGEMMA_DEVICE_MEMBER void find_largest(float (&found)[kRowTiles][2]) const {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float largest = -INFINITY;
        DGEMMA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n)
          largest = fmaxf(largest, fmaxf(scores[i][n][2 * half], scores[i][n][2 * half + 1]));
        largest = fmaxf(largest, hw::shuffle_xor(largest, 1));
        found[i][half] = fmaxf(largest, hw::shuffle_xor(largest, 2));
      }
    }
  }

  // Online softmax: new maxima, what was summed so far scaled to them, scores replaced by probabilities.
  DGEMMA_DEVICE_MEMBER void update_softmax() {
    float largest[kRowTiles][2], correction[kRowTiles][2];
    find_largest(largest);
    if (take_probabilities(largest, correction)) rescale_output(correction);
  }

  // All of it but the output, for which it returns whether it has to be rescaled. of_tile: the largest scores of the
  // tile, of keys that others have, too.
  DGEMMA_DEVICE_MEMBER bool take_probabilities(const float (&of_tile)[kRowTiles][2], float (&correction)[kRowTiles][2]) {
    bool changed = false;
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        const float largest = fmaxf(maximum[i][half], of_tile[i][half]);
        correction[i][half] = exp2_below(maximum[i][half], largest);
        changed = changed || largest != maximum[i][half];
        maximum[i][half] = largest;
        float total = 0.0f;
        DGEMMA_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) {
          DGEMMA_UNROLL
          for (int j = 2 * half; j < 2 * half + 2; ++j) {
            scores[i][n][j] = exp2_below(scores[i][n][j], largest);
            total += scores[i][n][j];
          }
        }
        sum[i][half] = sum[i][half] * correction[i][half] + total;
      }
    }
    // Maxima rarely move after the first tiles, and the output is most of the registers.
    return hw::ballot(changed) != 0;
  }

  DGEMMA_DEVICE_MEMBER void rescale_output(const float (&correction)[kRowTiles][2]) {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) output[i][n][j] *= correction[i][j / 2];
      }
    }
  }

  // output += probabilities x values, over this warp's columns.
  DGEMMA_DEVICE_MEMBER void multiply_values(uint32_t buffer) {
    // Matrices, transposed on the way: keys 0 ... 7 and 8 ... 15 at one chunk of columns, then at the next.
    const int key = lane % 16, chunk = column_warp * (Shape::kColumns / 8) + lane / 16;
    const uint32_t first = buffer + swizzled<kHeadDim>(key, chunk);
    DGEMMA_UNROLL
    for (int k = 0; k < kKeyTiles; k += 2) {
      // An accumulator is laid out like half a left operand, so probabilities stay in their lanes.
      uint32_t probabilities[kRowTiles][4];
      DGEMMA_UNROLL
      for (int i = 0; i < kRowTiles; ++i) {
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j)
          probabilities[i][j] = hw::pack<T>(scores[i][k + j / 2][j % 2 * 2], scores[i][k + j / 2][j % 2 * 2 + 1]);
      }
      DGEMMA_UNROLL
      for (int n = 0; n < kColumnTiles; n += 2) {
        uint32_t values[4];
        hw::load_matrices_transposed(values, further(first, n) + k * 8 * Shape::kRowBytes);
        DGEMMA_UNROLL
        for (int i = 0; i < kRowTiles; ++i) {
          hw::multiply_add<T>(output[i][n], probabilities[i], values[0], values[1]);
          hw::multiply_add<T>(output[i][n + 1], probabilities[i], values[2], values[3]);
        }
      }
    }
  }

  // Divides by the sums and writes the rows, or this split's share of them. A row that saw no key has a
  // log-sum-exp of -inf, and its share is not read.
  DGEMMA_DEVICE_MEMBER void finish(const BlockAttentionParams& p, const KeyWalk& walk, const QueryRows& rows) {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowTiles; ++i) {
      DGEMMA_UNROLL
      for (int half = 0; half < 2; ++half) {
        float total = sum[i][half];
        total += hw::shuffle_xor(total, 1);
        total += hw::shuffle_xor(total, 2);
        const int r = row(rows, i, half);
        if (r >= rows.count) continue;
        const float inverse = 1.0f / total;
        const float lse = (maximum[i][half] + log2f(total)) * kLn2;
        const int column = column_warp * Shape::kColumns + lane % 4 * 2;
        if (p.splits > 1) {
          const int64_t heads_index = walk.batch * p.kv_heads + walk.kv_head;
          const int64_t share = (hw::block_y() * p.batch * p.kv_heads + heads_index) * rows.count + r;
          if (column == 0) p.partial_lse[share] = lse;
          Pair* target = reinterpret_cast<Pair*>(p.partial_output + share * kHeadDim + column);
          DGEMMA_UNROLL
          for (int n = 0; n < kColumnTiles; ++n)
            target[n * 4] = {output[i][n][2 * half] * inverse, output[i][n][2 * half + 1] * inverse};
          continue;
        }
        const int position = r / rows.group;
        const int64_t head = int64_t(walk.kv_head) * rows.group + r - position * rows.group;
        if (column == 0) p.lse[(walk.batch * p.query_heads + head) * p.length + position] = lse;
        T* target = static_cast<T*>(p.output) +
                    ((walk.batch * p.length + position) * p.query_heads + head) * kHeadDim + column;
        DGEMMA_UNROLL
        for (int n = 0; n < kColumnTiles; ++n)
          *reinterpret_cast<uint32_t*>(target + n * 8) =
              hw::pack<T>(output[i][n][2 * half] * inverse, output[i][n][2 * half + 1] * inverse);
      }
    }
  }

  struct alignas(8) Pair {
    float low, high;
  };
};

}  // namespace dgemma
