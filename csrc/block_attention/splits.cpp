#include <algorithm>
#include <limits>

#include "block_attention.h"
#include "config.h"
#include "sm_90a/config.h"
#include "sm_90a/sm_90a.h"

namespace dgemma {
namespace {

constexpr int64_t kMaxSplits = 32;
// What it costs a block of threads to begin and to end, and to pass its output through memory, counted in keys of
// the time that reading and multiplying them takes. docs/cuda_block_attention.md has the arithmetic.
constexpr int64_t kStartKeys = 64, kShareKeys = 256;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `together`: multiprocessors that a tile of rows takes.
template <class Shape>
int64_t splits_of(const BlockAttentionParams& p, int multiprocessors, int together = 1) {
  const int64_t work = ceil_div(p.query_heads / p.kv_heads * p.length, Shape::kRows) * p.batch * p.kv_heads;
  const int64_t at_once = std::max<int64_t>(int64_t(multiprocessors) * Shape::kBlocks / together, 1);
  int64_t tiles = ceil_div(p.prefix_length, Shape::kKeys) + ceil_div(p.length, Shape::kKeys);
  // What the first position of a tile of rows sees behind it, and the tile's own positions.
  if (p.causal) {
    const int64_t positions = ceil_div(Shape::kRows * p.kv_heads, p.query_heads);
    tiles = std::min(tiles, ceil_div(p.window + positions, Shape::kKeys) + 1);
  }
  int64_t best = 1, least = std::numeric_limits<int64_t>::max();
  for (int64_t splits = 1; splits <= std::min(kMaxSplits, tiles); ++splits) {
    const int64_t keys = ceil_div(tiles, splits) * Shape::kKeys + kStartKeys + (splits > 1 ? kShareKeys : 0);
    const int64_t cost = ceil_div(work * splits, at_once) * keys;
    if (cost < least) {
      least = cost;
      best = splits;
    }
  }
  return best;
}

}  // namespace

int64_t block_attention_splits(const BlockAttentionParams& params, int multiprocessors) {
  switch (params.head_dim) {
    case 64: return splits_of<BlockAttentionShape<64>>(params, multiprocessors);
    case 128: return splits_of<BlockAttentionShape<128>>(params, multiprocessors);
    case 256: return splits_of<BlockAttentionShape<256>>(params, multiprocessors);
    case 512: return splits_of<BlockAttentionShape<512>>(params, multiprocessors);
    default: return 1;
  }
}

int64_t block_attention_sm_90a_splits(const BlockAttentionParams& params, int multiprocessors) {
  switch (params.head_dim) {
    case 256: return splits_of<BlockAttentionWgmmaShape<256>>(params, multiprocessors);
    case 512: return splits_of<BlockAttentionWgmmaShape<512>>(params, multiprocessors, BlockAttentionWgmmaShape<512>::kCluster);
    default: return 1;
  }
}

}  // namespace dgemma
