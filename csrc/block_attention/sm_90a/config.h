// Tile shapes of block_attention with wgmma. docs/cuda_block_attention.md derives them.
#pragma once

#include <cstdint>

namespace dgemma {

// A row of a panel in shared memory: 64 columns, as wgmma's swizzle wants them.
constexpr uint32_t kWgmmaPanelRowBytes = 128;

// Eight warps, two warpgroups, own 16 rows each and 256 columns of the output. kBlocksTogether blocks of threads share the
// rows: each has its part of a tile's keys, with all columns of the head, and its columns of values and output. Shared
// memory begins with the queries, but for columns that stay in registers, two tiles of keys, and values.
template <int kDim, int kBlocksTogether, int kColumnsInRegisters>
struct BlockAttentionWgmmaBlock {
  static constexpr int kHeadDim = kDim, kCluster = kBlocksTogether, kColumnWarps = kBlocksTogether;
  static constexpr int kQueryColumnsInRegisters = kColumnsInRegisters;
  static constexpr int kRowTiles = 1, kRowWarps = 8, kKeys = 64, kBlocks = 1;
  static constexpr int kThreads = 32 * kRowWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kColumns = kHeadDim / kCluster;
  static constexpr int kOwnKeys = kKeys / kCluster, kKeyTiles = kOwnKeys / 8;
  static constexpr uint32_t kGroupBytes = 8 * kWgmmaPanelRowBytes;
  static constexpr uint32_t kQueryPanelBytes = kRows * kWgmmaPanelRowBytes;
  static constexpr uint32_t kKeyPanelBytes = kOwnKeys * kWgmmaPanelRowBytes;
  static constexpr uint32_t kValuePanelBytes = kKeys * kWgmmaPanelRowBytes;
  static constexpr uint32_t kKeyTileBytes = kHeadDim / 64 * kKeyPanelBytes;
  static constexpr uint32_t kValueTileBytes = kColumns / 64 * kValuePanelBytes;
  static constexpr uint32_t kKeysOffset = (kHeadDim - kQueryColumnsInRegisters) / 64 * kQueryPanelBytes;
  static constexpr uint32_t kValuesOffset = kKeysOffset + 2 * kKeyTileBytes;
  static_assert(kColumns == 256, "what one wgmma multiplies with values");
};

template <int kDim>
struct BlockAttentionWgmmaShape;

// Two tiles of values.
template <>
struct BlockAttentionWgmmaShape<256> : BlockAttentionWgmmaBlock<256, 1, 0> {
  static constexpr uint32_t kSharedBytes = kValuesOffset + 2 * kValueTileBytes;
  static_assert(kSharedBytes <= 232448, "the limit of sm_90");
};

// One tile of values, and twice what the other block tells: probabilities of its keys, and the largest scores of its
// next ones.
template <>
struct BlockAttentionWgmmaShape<512> : BlockAttentionWgmmaBlock<512, 2, 64> {
  static constexpr uint32_t kProbabilitiesOffset = kValuesOffset + kValueTileBytes;
  static constexpr uint32_t kProbabilityBytes = kRows * kOwnKeys * 2;
  static constexpr uint32_t kLargestOffset = kProbabilitiesOffset + 2 * kProbabilityBytes;
  static constexpr uint32_t kLargestBytes = kRows / 2 * 16;  // rows r and r + 8 together
  static constexpr uint32_t kSharedBytes = kLargestOffset + 2 * kLargestBytes;
  static_assert(kSharedBytes <= 232448, "the limit of sm_90");
};

}  // namespace dgemma
