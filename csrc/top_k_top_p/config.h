// The shape of the top_k_top_p kernel.
#pragma once

namespace dgemma {

// A block reads a row, several times.
constexpr int kTopKTopPThreads = 512;
// Vectors of 16 bytes that a thread has under way while it looks at one.
constexpr int kTopKTopPAhead = 3;
// Places that a walk over the row tries at once.
constexpr int kTopKTopPPivots = 8;

// Dynamic shared memory, bytes: of each warp the least and the largest logit and a sum by pivot, of two walks by turns.
constexpr int kTopKTopPWalkBytes = kTopKTopPThreads / 32 * (4 + 4 + 4 * kTopKTopPPivots);
constexpr int kTopKTopPSharedBytes = 2 * kTopKTopPWalkBytes;

}  // namespace dgemma
