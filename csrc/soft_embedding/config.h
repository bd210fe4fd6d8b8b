// Shapes of the soft_embedding kernels. docs/head.md derives them.
#pragma once

namespace dgemma {

// A warp makes the probabilities of one tile of one row in rounds of two 16-byte loads a lane, which it keeps in
// registers with those of the next round. A slice is a whole number of tiles.
constexpr int kSoftEmbeddingTile = 2048;  // tokens
constexpr int kSoftEmbeddingRounds = 4;
constexpr int kSoftEmbeddingThreads = 128;
constexpr int kSoftEmbeddingBlocks = 8;   // on a multiprocessor

// A thread adds up four columns of a row of the result, with the loads of so many slices under way. Blocks of 64
// threads leave no thread idle at E = 2816.
constexpr int kSoftEmbeddingSumThreads = 64;
constexpr int kSoftEmbeddingSumSlices = 8;

}  // namespace dgemma
