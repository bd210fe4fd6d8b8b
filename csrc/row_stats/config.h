// Shape of the row_stats kernels.
#pragma once

namespace dgemma {

// A block reads one tile of one row; a thread keeps kRowStatsPerThread logits in registers between finding
// their maximum and summing their exponentials, so shared memory holds only the warps' statistics.
constexpr int kRowStatsThreads = 256;
constexpr int kRowStatsPerThread = 32;
constexpr int kRowStatsTile = kRowStatsThreads * kRowStatsPerThread;

// Dynamic shared memory, bytes: extremes and sums per warp; the plan of a row, and per warp a sum, two tokens and a rank.
constexpr int kRowStatsTileSharedBytes = kRowStatsThreads / 32 * 20;
constexpr int kRowStatsRowSharedBytes = 320;

}  // namespace dgemma
