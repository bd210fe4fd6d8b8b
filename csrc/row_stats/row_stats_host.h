// The host implementation of `row_stats`, compiled once per instruction set.
#pragma once

#include "../common/statistics.h"
#include "../params.h"

namespace dgemma {

// Elements of a tile: 16 KB of fp32 stay in the first-level cache between the two passes over it, beside the
// next tile, which is fetched meanwhile.
constexpr int64_t kHostTile = 4096;
// Tiles of a segment, the unit that a thread takes. Fixed, so that results do not depend on the number of threads.
constexpr int64_t kHostSegment = 8;

struct RowStatsHost {
  // Statistics of the tiles of segment `segment` of row `row`, into the workspace.
  void (*segment)(const RowStatsParams& params, bool statistics, int64_t row, int64_t segment);
  // The outputs of row `row`, from the statistics of all its tiles.
  void (*finish)(const RowStatsParams& params, bool statistics, int64_t row);
};

inline int64_t host_tiles(const RowStatsParams& params) { return (params.vocab + kHostTile - 1) / kHostTile; }
inline int64_t host_segments(const RowStatsParams& params) {
  return (host_tiles(params) + kHostSegment - 1) / kHostSegment;
}

// Of an instruction set: without a cutoff, and with one.
extern const RowStatsHost row_stats_host_plain[2];
#if defined(__x86_64__)
extern const RowStatsHost row_stats_host_avx2[2];
extern const RowStatsHost row_stats_host_avx512[2];
#endif

}  // namespace dgemma
