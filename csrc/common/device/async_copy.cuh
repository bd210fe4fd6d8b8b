// Copies from global to shared memory that run while the thread goes on (cp.async, sm_80 and above).
//
// The bytes may be read by the thread that copied them after it waited, and by other threads after it waited and a
// barrier.
#pragma once

#include "../hardware.cuh"

#if !defined(DGEMMA_EMULATED)

#include "shared_address.cuh"

namespace dgemma::hw {

// Starts a copy of 16 bytes, both addresses multiples of 16; zeros are written where `valid` is false, and then
// `source` is not read. The copy passes L1 by.
DGEMMA_DEVICE void copy_async_16(uint32_t offset, const void* source, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(offset)), "l"(source),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes the group of the copies that this thread started since the last call; a group may be empty.
DGEMMA_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kPending groups closed last are still running.
template <int kPending>
DGEMMA_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

}  // namespace dgemma::hw

#endif
