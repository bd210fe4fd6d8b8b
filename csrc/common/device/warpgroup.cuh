// wgmma, the tensor cores' instructions for four warps (sm_90a only).
//
// Four consecutive warps multiply 64 rows. Operands in shared memory lie in panels of 128 bytes a row whose 16-byte
// chunks are swizzled by the row's number; panels start at multiples of 1024 bytes. Accumulators and left operands in
// registers are laid out as those of mma.m16n8k16, 16 rows a warp. Instructions run while the threads go on:
// begin_multiplies, any number of products, commit_multiplies, wait_multiplies; in between nobody touches the sums, nor left
// operands in registers.
// Source: PTX ISA, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions".
#pragma once

#include "../hardware.cuh"

#if defined(DGEMMA_EMULATED)
#include "emulated_warpgroup.h"
#else

#include "matrix_descriptor.h"
#include "shared_address.cuh"

namespace dgemma::hw {

// An operand in shared memory. leading: bytes from one panel to the next, where columns are the operand's first
// dimension (values); stride: from one group of eight rows to the next.
class SharedMatrix {
 public:
  __device__ __forceinline__ SharedMatrix(uint32_t offset, uint32_t leading, uint32_t stride) {
    const uint64_t bits = matrix_descriptor(shared_address(offset), leading, stride);
    // All lanes have the same one. Where the compiler knows, it counts in registers that a warp has only once.
    low_ = __shfl_sync(0xffffffffu, uint32_t(bits), 0);
    high_ = uint32_t(bits >> 32);
  }

  // The operand that lies so many bytes further on.
  __device__ __forceinline__ SharedMatrix at(uint32_t bytes) const { return {descriptor_at(low_, bytes), high_}; }

  __device__ __forceinline__ uint64_t descriptor() const { return uint64_t(high_) << 32 | low_; }

 private:
  __device__ __forceinline__ SharedMatrix(uint32_t low, uint32_t high) : low_(low), high_(high) {}

  uint32_t low_, high_;
};

// What this thread has copied into shared memory becomes visible to wgmma, and after a barrier so does that of all threads.
DGEMMA_DEVICE void show_copies_to_multiplies() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Keeps the compiler from moving what is done with the sums to the other side.
template <int kTiles>
DGEMMA_DEVICE void pin_sums(float (&sum)[kTiles][4]) {
  DGEMMA_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    DGEMMA_UNROLL
    for (int j = 0; j < 4; ++j) asm volatile("" : "+f"(sum[i][j])::"memory");
  }
}

// Keeps the compiler from making a left operand in registers later than here, when products are under way.
template <int kSteps>
DGEMMA_DEVICE void pin_operand(uint32_t (&left)[kSteps][4]) {
  DGEMMA_UNROLL
  for (int i = 0; i < kSteps; ++i) {
    DGEMMA_UNROLL
    for (int j = 0; j < 4; ++j) asm volatile("" : "+r"(left[i][j])::"memory");
  }
}

template <int kTiles>
DGEMMA_DEVICE void begin_multiplies(float (&sum)[kTiles][4]) {
  pin_sums(sum);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

DGEMMA_DEVICE void commit_multiplies() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most the kPending groups of products that were committed last are under way; `sum` is of others.
template <int kPending, int kTiles>
DGEMMA_DEVICE void wait_multiplies(float (&sum)[kTiles][4]) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
  pin_sums(sum);
}

#define DGEMMA_F4(s) "+f"(s[0]), "+f"(s[1]), "+f"(s[2]), "+f"(s[3])
#define DGEMMA_F32(s, i)                                                                                    \
  DGEMMA_F4(s[i]), DGEMMA_F4(s[i + 1]), DGEMMA_F4(s[i + 2]), DGEMMA_F4(s[i + 3]), DGEMMA_F4(s[i + 4]),      \
      DGEMMA_F4(s[i + 5]), DGEMMA_F4(s[i + 6]), DGEMMA_F4(s[i + 7])
#define DGEMMA_F16(s) DGEMMA_F4(s[0]), DGEMMA_F4(s[1]), DGEMMA_F4(s[2]), DGEMMA_F4(s[3])
#define DGEMMA_SUM_0_15 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define DGEMMA_SUM_0_31                                                                                     \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                 \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DGEMMA_SUM_32_127                                                                                   \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "                       \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "                       \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "                       \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "                       \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "           \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define DGEMMA_MULTIPLY_64_ROWS(type)                                                                        \
  asm volatile(                                                                                             \
      "{\n"                                                                                                 \
      ".reg .pred add;\n"                                                                                   \
      "setp.ne.b32 add, %34, 0;\n"                                                                          \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" DGEMMA_SUM_0_31                      \
      "}, %32, %33, add, 1, 1, 0, 0;\n"                                                                     \
      "}"                                                                                                   \
      : DGEMMA_F32(sum, 0)                                                                                  \
      : "l"(left.descriptor()), "l"(right.descriptor()), "r"(int(add)))
#define DGEMMA_MULTIPLY_32_ROWS(type)                                                                       \
  asm volatile(                                                                                             \
      "{\n"                                                                                                 \
      ".reg .pred add;\n"                                                                                   \
      "setp.ne.b32 add, %18, 0;\n"                                                                          \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " {" DGEMMA_SUM_0_15                      \
      "}, %16, %17, add, 1, 1, 0, 0;\n"                                                                     \
      "}"                                                                                                   \
      : DGEMMA_F16(sum)                                                                                     \
      : "l"(left.descriptor()), "l"(right.descriptor()), "r"(int(add)))
#define DGEMMA_MULTIPLY_32_ROWS_OF_REGISTERS(type)                                                          \
  asm volatile(                                                                                             \
      "{\n"                                                                                                 \
      ".reg .pred add;\n"                                                                                   \
      "setp.ne.b32 add, %21, 0;\n"                                                                          \
      "wgmma.mma_async.sync.aligned.m64n32k16.f32." type "." type " {" DGEMMA_SUM_0_15                      \
      "}, {%16, %17, %18, %19}, %20, add, 1, 1, 0;\n"                                                       \
      "}"                                                                                                   \
      : DGEMMA_F16(sum)                                                                                     \
      : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right.descriptor()), "r"(int(add)))
#define DGEMMA_MULTIPLY_COLUMNS(type)                                                                       \
  asm volatile("wgmma.mma_async.sync.aligned.m64n256k16.f32." type "." type " {" DGEMMA_SUM_0_31 ", "       \
               DGEMMA_SUM_32_127 "}, {%128, %129, %130, %131}, %132, 1, 1, 1, 1;"                           \
               : DGEMMA_F32(sum, 0), DGEMMA_F32(sum, 8), DGEMMA_F32(sum, 16), DGEMMA_F32(sum, 24)           \
               : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "l"(right.descriptor()))

// sum[64, 64] = left[64, 16] right[64, 16]^T, both from shared memory; added to the sum where `add` is true.
template <class T>
DGEMMA_DEVICE void multiply_rows(float (&sum)[8][4], const SharedMatrix& left, const SharedMatrix& right, bool add) {
  if constexpr (std::is_same_v<T, Bfloat16>)
    DGEMMA_MULTIPLY_64_ROWS("bf16");
  else
    DGEMMA_MULTIPLY_64_ROWS("f16");
}

// sum[64, 32] = left[64, 16] right[32, 16]^T, the left operand from shared memory or from registers.
template <class T>
DGEMMA_DEVICE void multiply_rows(float (&sum)[4][4], const SharedMatrix& left, const SharedMatrix& right, bool add) {
  if constexpr (std::is_same_v<T, Bfloat16>)
    DGEMMA_MULTIPLY_32_ROWS("bf16");
  else
    DGEMMA_MULTIPLY_32_ROWS("f16");
}

template <class T>
DGEMMA_DEVICE void multiply_rows(float (&sum)[4][4], const uint32_t (&left)[4], const SharedMatrix& right, bool add) {
  if constexpr (std::is_same_v<T, Bfloat16>)
    DGEMMA_MULTIPLY_32_ROWS_OF_REGISTERS("bf16");
  else
    DGEMMA_MULTIPLY_32_ROWS_OF_REGISTERS("f16");
}

// sum[64, 256] += left[64, 16] right[16, 256], the left operand from registers.
template <class T>
DGEMMA_DEVICE void multiply_columns(float (&sum)[32][4], const uint32_t (&left)[4], const SharedMatrix& right) {
  if constexpr (std::is_same_v<T, Bfloat16>)
    DGEMMA_MULTIPLY_COLUMNS("bf16");
  else
    DGEMMA_MULTIPLY_COLUMNS("f16");
}

#undef DGEMMA_F4
#undef DGEMMA_F32
#undef DGEMMA_F16
#undef DGEMMA_SUM_0_15
#undef DGEMMA_SUM_0_31
#undef DGEMMA_SUM_32_127
#undef DGEMMA_MULTIPLY_64_ROWS
#undef DGEMMA_MULTIPLY_32_ROWS
#undef DGEMMA_MULTIPLY_32_ROWS_OF_REGISTERS
#undef DGEMMA_MULTIPLY_COLUMNS

}  // namespace dgemma::hw

#endif
