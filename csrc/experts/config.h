// Tile shapes of experts. docs/experts.md derives them.
#pragma once

#include <cstdint>

#include "../params.h"

namespace dgemma {

// A block of threads computes a tile of pairs times 32 rows of weights by warp. kValues weights of a row are 16 bytes,
// the chunk that a lane multiplies at a time; a stage of the pipeline holds kColumns columns.
template <WeightFormat kFormat>
struct ExpertsFormat;

template <>
struct ExpertsFormat<WeightFormat::kPlain> {
  static constexpr int kValues = 8, kColumns = 64;
};
// Rows and columns of FP8 numbers that share a scale. A stage has one block.
constexpr int kExpertsScaleBlock = 128;
template <>
struct ExpertsFormat<WeightFormat::kFp8> {
  static constexpr int kValues = 16, kColumns = kExpertsScaleBlock;
};
template <>
struct ExpertsFormat<WeightFormat::kNvfp4> {
  static constexpr int kValues = 32, kColumns = 128;
};

constexpr int kExpertsWarps = 4, kExpertsThreads = 32 * kExpertsWarps;

template <WeightFormat kFormat, int kPairs>
struct ExpertsShape : ExpertsFormat<kFormat> {
  using Format = ExpertsFormat<kFormat>;
  static constexpr int kPairTiles = kPairs / 8;
  static constexpr int kRows = 32 * kExpertsWarps;                          // of weights
  static constexpr int kChunks = Format::kColumns / Format::kValues;        // of a row of weights
  static constexpr int kPairChunks = Format::kColumns / 8;                  // of a row of 16-bit values
  static constexpr int kGroups = kChunks / 4;                               // a group is a chunk for each lane of four
  static constexpr uint32_t kRowBytes = 16 * kChunks, kPairBytes = 16 * kPairChunks;
  static constexpr uint32_t kPairsOffset = kRows * kRowBytes;
  static constexpr uint32_t kStageBytes = kPairsOffset + kPairs * kPairBytes;
  // Three of the smallest let two blocks share a multiprocessor of 100 KB: one starts while the other streams.
  static constexpr int kStages = kStageBytes <= 16 * 1024 || kStageBytes > 24 * 1024 ? 3 : 4;
  static constexpr uint32_t kSharedBytes = kStages * kStageBytes;
  static_assert(kSharedBytes <= 101376, "the limit of sm_86, 89, 120 and 121");
};

// Rows of weights in a block of threads are columns of the result. The first product, of gate and up, has half as many:
// 16 rows of gate and 16 of up alternate.
template <bool kGated>
constexpr int kExpertsColumns = 32 * kExpertsWarps / (kGated ? 2 : 1);

// Blocks of threads that so many columns of a product's result take.
template <bool kGated>
DGEMMA_HD int64_t experts_blocks_across(int64_t columns) {
  return (columns + kExpertsColumns<kGated> - 1) / kExpertsColumns<kGated>;
}

// Pairs of a tile: a canvas gives most experts no more than 32, a long prompt gives them hundreds.
constexpr int kExpertsFew = 32, kExpertsMany = 64;
// The mean number of pairs by expert up to which a call takes the tiles for few.
constexpr int64_t kExpertsFewMean = 24;

constexpr int kExpertsRouteThreads = 256;
constexpr int64_t kExpertsMost = 1024;
constexpr int kExpertsRouteWarps = kExpertsRouteThreads / 32;

// A number of pairs by warp and expert, the last one for none; then two sums by warp.
constexpr int experts_route_shared_bytes(int64_t experts) {
  return int(4 * kExpertsRouteWarps * (experts + 1 + 2));
}

constexpr int kExpertsCombineThreads = 128;

// Blocks of threads that a row of the result takes, four columns by thread.
DGEMMA_HD int64_t experts_combine_across(int64_t embedding) {
  return (embedding + 4 * kExpertsCombineThreads - 1) / (4 * kExpertsCombineThreads);
}

// Where what the kernels leave each other lies in the workspace, in bytes. Every part starts at a multiple of 16.
struct ExpertsWorkspace {
  int64_t pairs, most;                         // P = R * K; tiles that any routing can need
  int tile_pairs;
  int64_t order, tile_list, middle, partial;   // [P] int32; [3, most] int32; [P, I] 16 bits; [P, E] fp32
  int64_t bytes;
};

inline ExpertsWorkspace experts_workspace(const ExpertsParams& p) {
  const auto after = [](int64_t offset, int64_t size) { return (offset + size + 15) / 16 * 16; };
  ExpertsWorkspace w;
  w.pairs = p.rows * p.top_k;
  w.tile_pairs = w.pairs <= kExpertsFewMean * p.experts ? kExpertsFew : kExpertsMany;
  w.most = (w.pairs + (w.pairs < p.experts ? w.pairs : p.experts) * (w.tile_pairs - 1)) / w.tile_pairs;
  w.order = 0;
  w.tile_list = after(w.order, 4 * w.pairs);
  w.middle = after(w.tile_list, 4 * 3 * w.most);
  w.partial = after(w.middle, 2 * w.pairs * p.width);
  w.bytes = after(w.partial, 4 * w.pairs * p.embedding);
  return w;
}

}  // namespace dgemma
