// What a function needs in front of it to compile for the host, for CUDA, and for the emulated build.
#pragma once

#include <cstdint>

// Everything here has internal linkage on purpose: host files are compiled several times for different
// instruction sets, and a shared inline function could be linked from the wrong one.
#if defined(__CUDACC__)
#define DGEMMA_HD static __host__ __device__ __forceinline__
#define DGEMMA_DEVICE static __device__ __forceinline__
#define DGEMMA_MEMBER __host__ __device__ __forceinline__
#define DGEMMA_UNROLL _Pragma("unroll")
#else
#define DGEMMA_HD static inline __attribute__((always_inline, unused))
#define DGEMMA_DEVICE static inline __attribute__((unused))
#define DGEMMA_MEMBER inline __attribute__((always_inline))
#define DGEMMA_UNROLL
#endif
// Behind the parameters of a lambda, whose captures then stay in registers.
#define DGEMMA_INLINE __attribute__((always_inline))
