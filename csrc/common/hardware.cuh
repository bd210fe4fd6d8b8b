// The hardware as kernels see it: indices, barriers, shuffles, shared memory, loads, asynchronous copies, mma.
//
// Kernels use only these names, so a host build (DGEMMA_EMULATED) can run the same kernel source thread by thread
// and check what it does with shared memory. PTX stands here and nowhere else.
#pragma once

#include "numeric.h"

#if defined(DGEMMA_EMULATED)
#include "emulated_hardware.h"
#else

#include <cuda_runtime.h>

#include <type_traits>

#define DGEMMA_KERNEL __global__ void

namespace dgemma::hw {

constexpr int kWarp = 32;

struct alignas(16) Words4 {
  uint32_t word[4];
};

DGEMMA_DEVICE int thread_x() { return threadIdx.x; }
DGEMMA_DEVICE int block_threads() { return blockDim.x; }
DGEMMA_DEVICE int64_t block_x() { return blockIdx.x; }
DGEMMA_DEVICE int64_t block_y() { return blockIdx.y; }
DGEMMA_DEVICE int64_t block_z() { return blockIdx.z; }

DGEMMA_DEVICE void sync_block() { __syncthreads(); }
DGEMMA_DEVICE int sync_count(bool predicate) { return __syncthreads_count(predicate); }
DGEMMA_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
DGEMMA_DEVICE T shuffle(T value, int lane) {
  return __shfl_sync(0xffffffffu, value, lane);
}
template <class T>
DGEMMA_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}
template <class T>
DGEMMA_DEVICE T shuffle_up(T value, int delta) {
  return __shfl_up_sync(0xffffffffu, value, delta);
}
DGEMMA_DEVICE uint32_t ballot(bool predicate) { return __ballot_sync(0xffffffffu, predicate); }
// The lanes whose value is the own one.
DGEMMA_DEVICE uint32_t lanes_equal(uint32_t value) { return __match_any_sync(0xffffffffu, value); }
DGEMMA_DEVICE uint32_t smallest_of_warp(uint32_t value) { return __reduce_min_sync(0xffffffffu, value); }
DGEMMA_DEVICE int count_bits(uint32_t mask) { return __popc(mask); }
DGEMMA_DEVICE int find_first_set(uint32_t mask) { return __ffs(mask); }
DGEMMA_DEVICE int count_leading_zeros(uint32_t mask) { return __clz(mask); }
// Four bytes of `low` (numbers 0 to 3) and `high` (4 to 7), chosen by four digits of `numbers`, the lowest byte's first.
DGEMMA_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t numbers) {
  return __byte_perm(low, high, numbers);
}

// A typed view of the block's dynamic shared memory, `offset` bytes from its start.
template <class T>
struct Shared {
  uint32_t offset;

  __device__ __forceinline__ T* pointer() const {
    extern __shared__ __align__(1024) unsigned char memory[];
    return reinterpret_cast<T*>(memory + offset);
  }
  __device__ __forceinline__ T load(int index) const { return pointer()[index]; }
  __device__ __forceinline__ void store(int index, T value) const { pointer()[index] = value; }
};

// A 16-byte load from global memory that is read once; the address is a multiple of 16.
DGEMMA_DEVICE Words4 load_streaming(const void* address) {
  Words4 result;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(result.word[0]), "=r"(result.word[1]), "=r"(result.word[2]), "=r"(result.word[3])
               : "l"(address));
  return result;
}

// The larger and the smaller of two 16-bit numbers of type T, in both halves; of NaN and a number the number.
template <class T>
DGEMMA_DEVICE uint32_t larger_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (std::is_same_v<T, Bfloat16>)
    asm("max.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  else
    asm("max.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}
template <class T>
DGEMMA_DEVICE uint32_t smaller_pair(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (std::is_same_v<T, Bfloat16>)
    asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  else
    asm("min.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// The larger of two 16-bit numbers of type T, in both halves; NaN if one is NaN.
template <class T>
DGEMMA_DEVICE uint32_t larger_pair_or_nan(uint32_t a, uint32_t b) {
  uint32_t result;
  if constexpr (std::is_same_v<T, Bfloat16>)
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  else
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// 2^x within 2 ulp; results below 2^-126 are 0.
DGEMMA_DEVICE float exp2_fast(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// a * b, which no sum or difference that it goes into is fused with.
DGEMMA_DEVICE float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }

// The smaller of two numbers; NaN if one is NaN.
DGEMMA_DEVICE float smaller_or_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// The larger of two numbers; NaN if one is NaN.
DGEMMA_DEVICE float larger_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// 1 / x within 1 ulp; 0 for infinity.
DGEMMA_DEVICE float reciprocal_fast(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

}  // namespace dgemma::hw

#endif
