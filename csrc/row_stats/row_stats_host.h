// The host implementation of `row_stats`, compiled once per instruction set.
#pragma once

#include "../common/statistics.h"
#include "../params.h"

namespace dgemma {

// Elements of a tile: its fp32 copy (16 KB) stays in the first-level cache between the two passes over it.
constexpr int64_t kHostTile = 4096;

struct RowStatsHost {
  // Statistics of tile `tile` of row `row`, into the workspace.
  void (*tile)(const RowStatsParams& params, int64_t row, int64_t tile);
  // The outputs of row `row`, from the statistics of all its tiles.
  void (*finish)(const RowStatsParams& params, int64_t row);
};

inline int64_t host_tiles(const RowStatsParams& params) { return (params.vocab + kHostTile - 1) / kHostTile; }

extern const RowStatsHost row_stats_host_plain;
#if defined(__x86_64__)
extern const RowStatsHost row_stats_host_avx2;
extern const RowStatsHost row_stats_host_avx512;
#endif

}  // namespace dgemma
