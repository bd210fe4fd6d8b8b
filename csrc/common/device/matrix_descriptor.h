// How wgmma is told where an operand lies in shared memory.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout", "Matrix Descriptor Format".
#pragma once

#include "../numeric.h"

namespace dgemma::hw {

// address: of the operand in the shared window, which holds a cluster's blocks 16 MB apart; a descriptor has the
// lowest 18 bits of it, and a higher one would reach into `leading`. leading, stride: bytes, as in SharedMatrix.
DGEMMA_DEVICE constexpr uint64_t matrix_descriptor(uint32_t address, uint32_t leading, uint32_t stride) {
  constexpr uint64_t kSwizzle128 = uint64_t(1) << 62;
  return uint64_t((address & 0x3ffff) >> 4) | uint64_t(leading >> 4) << 16 | uint64_t(stride >> 4) << 32 | kSwizzle128;
}

// The lower half of the descriptor of the same operand, so many bytes further on.
DGEMMA_DEVICE constexpr uint32_t descriptor_at(uint32_t low, uint32_t bytes) { return low + (bytes >> 4); }

}  // namespace dgemma::hw
