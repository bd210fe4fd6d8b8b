// Tile shapes of block_attention with wgmma. docs/cuda_block_attention.md derives them.
#pragma once

#include <cstdint>

namespace dgemma {

// A row of a panel in shared memory: 64 columns, as wgmma's swizzle wants them.
constexpr uint32_t kWgmmaPanelRowBytes = 128;

// Eight warps, two warpgroups, own 16 rows each and 256 columns of the output.
struct BlockAttentionWgmmaBlock {
  static constexpr int kRowTiles = 1, kRowWarps = 8, kKeys = 64, kBlocks = 1;
  static constexpr int kThreads = 32 * kRowWarps;
  static constexpr int kRows = 16 * kRowTiles * kRowWarps;
  static constexpr int kColumns = 256;
  static constexpr uint32_t kGroupBytes = 8 * kWgmmaPanelRowBytes;
  static constexpr uint32_t kQueryPanelBytes = kRows * kWgmmaPanelRowBytes;
  static constexpr uint32_t kValuePanelBytes = kKeys * kWgmmaPanelRowBytes;
  static constexpr uint32_t kValueTileBytes = kColumns / 64 * kValuePanelBytes;
};

template <int kDim>
struct BlockAttentionWgmmaShape;

// A block of threads has all of the head. Queries, two tiles of keys, two of values.
template <>
struct BlockAttentionWgmmaShape<256> : BlockAttentionWgmmaBlock {
  static constexpr int kHeadDim = 256, kCluster = 1, kColumnWarps = 1;
  static constexpr int kOwnKeys = kKeys, kKeyTiles = kOwnKeys / 8;
  static constexpr int kQueryColumnsInRegisters = 0;
  static constexpr uint32_t kQueryBytes = kHeadDim / 64 * kQueryPanelBytes;
  static constexpr uint32_t kKeyPanelBytes = kOwnKeys * kWgmmaPanelRowBytes;
  static constexpr uint32_t kKeyTileBytes = kHeadDim / 64 * kKeyPanelBytes;
  static constexpr uint32_t kKeysOffset = kQueryBytes;
  static constexpr uint32_t kValuesOffset = kKeysOffset + 2 * kKeyTileBytes;
  static constexpr uint32_t kSharedBytes = kValuesOffset + 2 * kValueTileBytes;
  static_assert(kSharedBytes <= 232448, "the limit of sm_90");
};

// Two blocks of threads share 128 rows: each has half the keys of a tile with all columns of the head, and half the
// columns of values and output. Queries but for those columns that stay in registers, two tiles of keys, one of values,
// and twice what the other block tells: probabilities of its keys, and the largest scores of its next ones.
template <>
struct BlockAttentionWgmmaShape<512> : BlockAttentionWgmmaBlock {
  static constexpr int kHeadDim = 512, kCluster = 2, kColumnWarps = 2;
  static constexpr int kOwnKeys = kKeys / kCluster, kKeyTiles = kOwnKeys / 8;
  static constexpr int kQueryColumnsInRegisters = 64;
  static constexpr uint32_t kQueryBytes = (kHeadDim - kQueryColumnsInRegisters) / 64 * kQueryPanelBytes;
  static constexpr uint32_t kKeyPanelBytes = kOwnKeys * kWgmmaPanelRowBytes;
  static constexpr uint32_t kKeyTileBytes = kHeadDim / 64 * kKeyPanelBytes;
  static constexpr uint32_t kKeysOffset = kQueryBytes;
  static constexpr uint32_t kValuesOffset = kKeysOffset + 2 * kKeyTileBytes;
  static constexpr uint32_t kProbabilitiesOffset = kValuesOffset + kValueTileBytes;
  static constexpr uint32_t kProbabilityBytes = kRows * kOwnKeys * 2;
  static constexpr uint32_t kLargestOffset = kProbabilitiesOffset + 2 * kProbabilityBytes;
  static constexpr uint32_t kLargestBytes = kRows / 2 * 16;  // rows r and r + 8 together
  static constexpr uint32_t kSharedBytes = kLargestOffset + 2 * kLargestBytes;
  static_assert(kSharedBytes <= 232448, "the limit of sm_90");
};

}  // namespace dgemma
