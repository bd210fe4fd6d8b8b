// Tile shapes of block_attention. docs/cuda_block_attention.md derives them.
#pragma once

#include <cstdint>

namespace dgemma {

// A warp owns 16 * kRowTiles rows and head_dim / kColumnWarps columns of the output. kKeys slots of keys, or of
// values, fill one of kBuffers buffers. kBlocks: blocks of threads that a multiprocessor has to hold.
template <int kHeadDim>
struct BlockAttentionTiles;

template <>
struct BlockAttentionTiles<64> {
  static constexpr int kRowTiles = 2, kRowWarps = 4, kColumnWarps = 1, kKeys = 32, kBuffers = 8, kBlocks = 2;
};
template <>
struct BlockAttentionTiles<128> {
  static constexpr int kRowTiles = 1, kRowWarps = 8, kColumnWarps = 1, kKeys = 32, kBuffers = 6, kBlocks = 1;
};
template <>
struct BlockAttentionTiles<256> {
  static constexpr int kRowTiles = 1, kRowWarps = 8, kColumnWarps = 1, kKeys = 16, kBuffers = 6, kBlocks = 1;
};
template <>
struct BlockAttentionTiles<512> {
  static constexpr int kRowTiles = 1, kRowWarps = 4, kColumnWarps = 2, kKeys = 16, kBuffers = 5, kBlocks = 1;
};

template <int kHeadDim>
struct BlockAttentionShape : BlockAttentionTiles<kHeadDim> {
  using Tiles = BlockAttentionTiles<kHeadDim>;
  static constexpr int kWarps = Tiles::kRowWarps * Tiles::kColumnWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kRows = 16 * Tiles::kRowTiles * Tiles::kRowWarps;
  static constexpr int kColumns = kHeadDim / Tiles::kColumnWarps;  // of a warp
  static constexpr int kChunks = kHeadDim / 8;                     // 16-byte pieces of a slot
  static constexpr int kKeyTiles = Tiles::kKeys / 8;
  static constexpr uint32_t kRowBytes = 2 * kHeadDim;
  static constexpr uint32_t kBufferBytes = Tiles::kKeys * kRowBytes;
  // Partial scores that the warps of one row group show each other: 16 bytes per lane and 16 x 8 tile.
  static constexpr uint32_t kExchangeOffset = Tiles::kBuffers * kBufferBytes;
  static constexpr uint32_t kExchangeWarpBytes = Tiles::kRowTiles * kKeyTiles * 32 * 16;
  static constexpr uint32_t kExchangeBytes = Tiles::kColumnWarps == 1 ? 0 : kWarps * kExchangeWarpBytes;
  static constexpr uint32_t kSharedBytes = kExchangeOffset + kExchangeBytes;
  static_assert(kSharedBytes <= 101376, "the limit of sm_86, 89, 120 and 121");
  static_assert(Tiles::kColumnWarps <= 2, "the exchange of scores is between two warps");
};

constexpr int kBlockAttentionMergeThreads = 128;

}  // namespace dgemma
