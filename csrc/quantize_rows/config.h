// The shape of the quantize_rows kernel.
#pragma once

namespace dgemma {

constexpr int kQuantizeRowsThreads = 256;
constexpr int kQuantizeRowsSharedBytes = kQuantizeRowsThreads / 32 * 4;  // a number of each warp
// Vectors of 16 bytes that a thread keeps of its row: at E = 2816 it reads two, and up to 8192 numbers of 16 bits none twice.
constexpr int kQuantizeRowsKept = 4;
constexpr int kQuantizeRowsBlocks = 4;  // on a multiprocessor

}  // namespace dgemma
