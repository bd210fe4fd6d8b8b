// Blocks of threads that run together and write into each other's shared memory (clusters, sm_90 and above).
#pragma once

#include "../hardware.cuh"

#if !defined(DGEMMA_EMULATED)

#include "shared_address.cuh"

#define DGEMMA_CLUSTER(blocks) __cluster_dims__(blocks, 1, 1)

namespace dgemma::hw {

// The barrier of the cluster in its two halves, which every thread calls in turn: what a thread did before it arrived,
// stores into other blocks' memory included, is done for every thread that has waited.
DGEMMA_DEVICE void arrive_cluster() { asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory"); }
DGEMMA_DEVICE void wait_cluster() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// 16 bytes into the shared memory of a block of this cluster, at the offset that they would have in this block's.
DGEMMA_DEVICE void store_in_cluster(int block, uint32_t offset, Words4 value) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "st.shared::cluster.v4.b32 [remote], {%2, %3, %4, %5};\n"
      "}" ::"r"(shared_address(offset)),
      "r"(block), "r"(value.word[0]), "r"(value.word[1]), "r"(value.word[2]), "r"(value.word[3])
      : "memory");
}

}  // namespace dgemma::hw

#else
#include "emulated_warpgroup.h"
#define DGEMMA_CLUSTER(blocks)
#endif
