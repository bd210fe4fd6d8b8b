// Shape of the row_stats kernels.
#pragma once

namespace dgemma {

// A warp reads one tile of one row with eight 16-byte loads a lane and keeps it in registers.
constexpr int kRowStatsTileBytes = 4096;
constexpr int kRowStatsTileThreads = 128;
constexpr int kRowStatsTileBlocks = 8;  // on a multiprocessor
// A block merges the tiles of a row; a thread reads 16 bytes of the tiles that are read again.
constexpr int kRowStatsThreads = 256;

// Dynamic shared memory, bytes: the plan of a row, and per warp a rank and a sum.
constexpr int kRowStatsRowSharedBytes = 192;

}  // namespace dgemma
