// Which keys a block of threads reads, and how a tile of them gets into shared memory.
#pragma once

#include "../common/device/async_copy.cuh"
#include "../common/device/qualifiers.cuh"
#include "../common/device/recomputed.cuh"
#include "../common/hardware.cuh"
#include "../params.h"
#include "config.h"

namespace dgemma {

// Tiles first ... end - 1 of keys; those below prefix_tiles are slots of the prefix, the others slots of the block.
struct KeyWalk {
  int batch, kv_head;
  int prefix_start, prefix_end, prefix_tiles;
  int block_start;  // the first slot of the block that any row sees
  int first, end;
};

// `heads_index`: batch row * Hkv + KV head; `first_position`, `last_position`: of this block of threads' rows.
template <class Shape>
DGEMMA_DEVICE KeyWalk key_walk(const BlockAttentionParams& p, int64_t heads_index, int first_position, int last_position) {
  constexpr int kKeys = Shape::kKeys;
  KeyWalk walk;
  walk.batch = int(heads_index / p.kv_heads);
  walk.kv_head = int(heads_index % p.kv_heads);
  const int length = int(p.prefix_length);
  const int start = p.prefix_start ? p.prefix_start[walk.batch] : 0;
  const int end = p.prefix_end ? p.prefix_end[walk.batch] : length;
  walk.prefix_start = start < 0 ? 0 : start > length ? length : start;
  walk.prefix_end = end < walk.prefix_start ? walk.prefix_start : end > length ? length : end;
  walk.block_start = 0;
  if (p.causal) {
    // Seen from the block's first position; the row that is furthest ahead of it sees furthest back.
    const int furthest = first_position + 1 - int(p.window);
    walk.block_start = furthest < 0 ? 0 : furthest;
    const int64_t seen = int64_t(walk.prefix_end) + furthest;
    if (seen > walk.prefix_start) walk.prefix_start = seen > walk.prefix_end ? walk.prefix_end : int(seen);
  }
  walk.prefix_tiles = (walk.prefix_end - walk.prefix_start + kKeys - 1) / kKeys;
  const int block_keys = p.causal ? last_position + 1 : int(p.length);
  const int64_t tiles = walk.prefix_tiles + (block_keys - walk.block_start + kKeys - 1) / kKeys;
  walk.first = int(tiles * hw::block_y() / p.splits);
  walk.end = int(tiles * (hw::block_y() + 1) / p.splits);
  return walk;
}

template <class T>
struct SlotRows {
  const T* first;
  int64_t stride;  // elements
  int valid;       // rows that may be read
  bool aligned;
};

// The slots of a tile from `column` on.
template <class T, class Shape, bool kValues>
DGEMMA_DEVICE SlotRows<T> tile_rows(const BlockAttentionParams& p, const KeyWalk& walk, int tile, int column = 0) {
  constexpr int kKeys = Shape::kKeys;
  const bool in_prefix = tile < walk.prefix_tiles;
  const int slot =
      in_prefix ? walk.prefix_start + tile * kKeys : walk.block_start + (tile - walk.prefix_tiles) * kKeys;
  const HeadsView& prefix = kValues ? p.prefix_value : p.prefix_key;
  const HeadsView& block = kValues ? p.value : p.key;
  const int64_t stride = in_prefix ? prefix.slot_stride : block.slot_stride;
  // Four base addresses kept through the loop would cost the registers that the accumulators need.
  const int64_t offset = hw::recomputed(walk.batch) * (in_prefix ? prefix.batch_stride : block.batch_stride) +
                         hw::recomputed(walk.kv_head) * (in_prefix ? prefix.head_stride : block.head_stride);
  const T* data = static_cast<const T*>(in_prefix ? prefix.data : block.data);
  const int end = in_prefix ? walk.prefix_end : int(p.length);
  return {data + offset + slot * stride + column, stride, end - slot, in_prefix ? prefix.aligned : block.aligned};
}

// Where a 16-byte chunk of a slot lies in its buffer: the xor spreads the same chunk of eight slots over all banks.
template <int kHeadDim>
DGEMMA_DEVICE uint32_t swizzled(int slot, int chunk) {
  return uint32_t(slot) * BlockAttentionShape<kHeadDim>::kRowBytes + uint32_t((chunk ^ (slot & 7)) * 16);
}

// The offset of the chunk that is `chunks` (even) further than the one at `offset`, which is the first or second of
// its row of eight: an xor and a constant, so that few addresses take up registers.
DGEMMA_DEVICE uint32_t further(uint32_t offset, int chunks) {
  return (offset ^ uint32_t(chunks % 8 * 16)) + uint32_t(chunks / 8 * 128);
}

template <bool kAligned, class T>
DGEMMA_DEVICE uint32_t load_pair(const T* source) {
  if (kAligned) return *reinterpret_cast<const uint32_t*>(source);
  return source[0].bits | uint32_t(source[1].bits) << 16;
}

// Starts to fill a buffer with kKeys slots; those after the last valid one become zeros.
template <class T, int kHeadDim>
DGEMMA_DEVICE void fill_buffer(uint32_t buffer, const SlotRows<T>& rows) {
  using Shape = BlockAttentionShape<kHeadDim>;
  constexpr int kStep = Shape::kThreads / Shape::kChunks;
  static_assert(kStep * Shape::kChunks == Shape::kThreads && Shape::kKeys % kStep == 0,
                "every thread copies one chunk of every kStep-th slot");
  const int thread = hw::recomputed(hw::thread_x());
  const int chunk = thread % Shape::kChunks, first = thread / Shape::kChunks;
  const T* source = rows.first + first * rows.stride + chunk * 8;
  const int64_t step = kStep * rows.stride;
  if (rows.aligned) {
    DGEMMA_UNROLL
    for (int i = first; i < first + Shape::kKeys; i += kStep, source += step)
      hw::copy_async_16(buffer + swizzled<kHeadDim>(i, chunk), source, i < rows.valid);
  } else {
    DGEMMA_NO_UNROLL
    for (int i = first; i < Shape::kKeys; i += kStep, source += step) {
      hw::Words4 words = {};
      if (i < rows.valid) {
        DGEMMA_UNROLL
        for (int j = 0; j < 4; ++j) words.word[j] = load_pair<false>(source + 2 * j);
      }
      hw::Shared<hw::Words4>{buffer + swizzled<kHeadDim>(i, chunk)}.store(0, words);
    }
  }
}

}  // namespace dgemma
