// Tile shapes of block_attention with wgmma. docs/cuda_block_attention.md derives them.
#pragma once

#include <cstdint>

namespace dgemma {

// A row of a panel in shared memory: 64 columns, as wgmma's swizzle wants them.
constexpr uint32_t kWgmmaPanelRowBytes = 128;

// kCluster blocks of threads share kRows rows, each with its part of the head's columns of queries, keys, values and
// output.
template <int kHeadDim>
struct BlockAttentionWgmmaTiles;

template <>
struct BlockAttentionWgmmaTiles<256> {
  static constexpr int kCluster = 1, kValueBuffers = 2;
};
template <>
struct BlockAttentionWgmmaTiles<512> {
  static constexpr int kCluster = 2, kValueBuffers = 1;
};

// Eight warps, two warpgroups, own 16 rows each.
template <int kDim>
struct BlockAttentionWgmmaShape : BlockAttentionWgmmaTiles<kDim> {
  using Tiles = BlockAttentionWgmmaTiles<kDim>;
  static constexpr int kHeadDim = kDim;
  static constexpr int kRowTiles = 1, kRowWarps = 8, kColumnWarps = Tiles::kCluster, kKeys = 64, kBlocks = 1;
  static constexpr int kThreads = 32 * kRowWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kColumns = kHeadDim / Tiles::kCluster;
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr int kPanels = kColumns / 64;
  static constexpr uint32_t kPanelRowBytes = kWgmmaPanelRowBytes, kGroupBytes = 8 * kPanelRowBytes;
  static constexpr uint32_t kQueryPanelBytes = kRows * kPanelRowBytes, kPanelBytes = kKeys * kPanelRowBytes;
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  static constexpr uint32_t kQueryBytes = kPanels * kQueryPanelBytes;
  // Queries, two tiles of keys, those of values, and in a cluster twice the scores of the other block.
  static constexpr uint32_t kKeysOffset = kQueryBytes;
  static constexpr uint32_t kValuesOffset = kKeysOffset + 2 * kTileBytes;
  static constexpr uint32_t kExchangeOffset = kValuesOffset + Tiles::kValueBuffers * kTileBytes;
  static constexpr uint32_t kExchangeWarpBytes = kRowTiles * kKeyTiles * 32 * 16;
  static constexpr uint32_t kExchangeBytes = Tiles::kCluster == 1 ? 0 : kRowWarps * kExchangeWarpBytes;
  static constexpr uint32_t kSharedBytes = kExchangeOffset + 2 * kExchangeBytes;
  static_assert(kColumns == 256, "what one wgmma multiplies with values");
  static_assert(kSharedBytes <= 232448, "the limit of sm_90");
};

}  // namespace dgemma
