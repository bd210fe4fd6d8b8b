// Addresses in the shared window, which ldmatrix and cp.async take.
#pragma once

#include "../hardware.cuh"

namespace dgemma::hw {

// `offset`: bytes from the start of the block's dynamic shared memory.
DGEMMA_DEVICE uint32_t shared_address(uint32_t offset) {
  return uint32_t(__cvta_generic_to_shared(Shared<unsigned char>{offset}.pointer()));
}

}  // namespace dgemma::hw
