// Shape of the row_stats kernels.
#pragma once

namespace dgemma {

// A block reads one tile of one row; a thread keeps kRowStatsPerThread logits in registers between finding
// their maximum and summing their exponentials, so shared memory holds only the warps' statistics.
constexpr int kRowStatsThreads = 256;
constexpr int kRowStatsPerThread = 32;
constexpr int kRowStatsTile = kRowStatsThreads * kRowStatsPerThread;

}  // namespace dgemma
