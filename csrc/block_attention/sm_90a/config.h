// Tile shapes of block_attention with wgmma. docs/cuda_block_attention.md derives them.
#pragma once

#include <cstdint>

namespace dgemma {

// Two blocks of threads, a cluster, share kRows rows at head_dim 512: each has half of the head's columns of queries,
// keys, values and output. Eight warps, two warpgroups, own 16 rows each.
struct BlockAttentionClusterShape {
  static constexpr int kHeadDim = 512, kCluster = 2;
  static constexpr int kRowTiles = 1, kRowWarps = 8, kColumnWarps = kCluster, kKeys = 64, kBlocks = 1;
  static constexpr int kThreads = 32 * kRowWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kColumns = kHeadDim / kCluster;
  static constexpr int kChunks = kColumns / 8;
  static constexpr int kKeyTiles = kKeys / 8;
  // Shared memory holds panels of 64 columns, 128 bytes a row, as wgmma's swizzle wants them.
  static constexpr int kPanels = kColumns / 64;
  static constexpr uint32_t kPanelRowBytes = 128, kGroupBytes = 8 * kPanelRowBytes;
  static constexpr uint32_t kQueryPanelBytes = kRows * kPanelRowBytes, kPanelBytes = kKeys * kPanelRowBytes;
  static constexpr uint32_t kTileBytes = kPanels * kPanelBytes;
  static constexpr uint32_t kQueryBytes = kPanels * kQueryPanelBytes;
  // Queries, two tiles of keys, one of values, and twice the scores of the other block of the cluster.
  static constexpr uint32_t kKeysOffset = kQueryBytes;
  static constexpr uint32_t kValuesOffset = kKeysOffset + 2 * kTileBytes;
  static constexpr uint32_t kExchangeOffset = kValuesOffset + kTileBytes;
  static constexpr uint32_t kExchangeWarpBytes = kRowTiles * kKeyTiles * 32 * 16;
  static constexpr uint32_t kExchangeBytes = kRowWarps * kExchangeWarpBytes;
  static constexpr uint32_t kSharedBytes = kExchangeOffset + 2 * kExchangeBytes;
  static_assert(kSharedBytes <= 232448, "the limit of sm_90");
};

}  // namespace dgemma
