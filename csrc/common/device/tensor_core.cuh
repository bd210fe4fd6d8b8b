// The tensor cores' instructions and their loads from shared memory, for a whole warp.
//
// Fragment layouts are those of the PTX ISA for mma.m16n8k16 with 16-bit inputs. Addresses in shared memory are
// byte offsets from the start of the block's dynamic shared memory, as in hw::Shared.
#pragma once

#include "../hardware.cuh"

#if !defined(DGEMMA_EMULATED)

#include "shared_address.cuh"

namespace dgemma::hw {

// Four 8x8 matrices of 16-bit values. Lane 8 i + r gives the address (a multiple of 16) of row r of matrix i; this
// lane receives from matrix i the values (lane / 4, 2 (lane % 4)) and the one after it.
DGEMMA_DEVICE void load_matrices(uint32_t (&fragment)[4], uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(offset))
               : "memory");
}

// As load_matrices, with each matrix transposed on the way.
DGEMMA_DEVICE void load_matrices_transposed(uint32_t (&fragment)[4], uint32_t offset) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(offset))
               : "memory");
}

// sum[16, 8] += a[16, 16] b[16, 8], fp32 accumulation.
template <class T>
DGEMMA_DEVICE void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);

template <>
__device__ __forceinline__ void multiply_add<Bfloat16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                       uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void multiply_add<Float16>(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                                      uint32_t b1) {
  asm(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Two values rounded to nearest even, the first one in the low half.
template <class T>
DGEMMA_DEVICE uint32_t pack(float low, float high);

template <>
__device__ __forceinline__ uint32_t pack<Bfloat16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

template <>
__device__ __forceinline__ uint32_t pack<Float16>(float low, float high) {
  uint32_t result;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// Both halves of a times those of b, rounded to nearest even; subnormal numbers count.
template <class T>
DGEMMA_DEVICE uint32_t multiply_pairs(uint32_t a, uint32_t b);

template <>
__device__ __forceinline__ uint32_t multiply_pairs<Bfloat16>(uint32_t a, uint32_t b) {
  uint32_t result;
  // A multiplication of its own begins with sm_90; adding -0 changes nothing.
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(0x80008000u));
  return result;
}

template <>
__device__ __forceinline__ uint32_t multiply_pairs<Float16>(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

}  // namespace dgemma::hw

#endif
