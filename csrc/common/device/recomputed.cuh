// A hint about registers, for kernels that need nearly all of them.
#pragma once

#include "../platform.h"

namespace dgemma::hw {

// The value itself, which the compiler has to take as a new one: what derives from it in a loop is computed again
// in each round instead of being kept in registers.
DGEMMA_DEVICE int recomputed(int value) {
#if !defined(DGEMMA_EMULATED)
  asm volatile("" : "+r"(value));
#endif
  return value;
}

}  // namespace dgemma::hw
