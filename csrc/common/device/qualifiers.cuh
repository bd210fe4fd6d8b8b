// What stands in front of kernels, of members that only run on the device, and of loops that are unrolled in part or not.
#pragma once

#if defined(DGEMMA_EMULATED)
#define DGEMMA_BOUNDS(threads, blocks)
#define DGEMMA_DEVICE_MEMBER inline
#define DGEMMA_NO_UNROLL
#define DGEMMA_UNROLL_BY(rounds)
#else
// Threads of a block, and how many blocks a multiprocessor has to hold: the compiler's budget of registers.
#define DGEMMA_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#define DGEMMA_DEVICE_MEMBER __device__ __forceinline__
#define DGEMMA_NO_UNROLL _Pragma("unroll 1")
#define DGEMMA_PRAGMA(text) _Pragma(#text)
#define DGEMMA_UNROLL_BY(rounds) DGEMMA_PRAGMA(unroll (rounds))
#endif
