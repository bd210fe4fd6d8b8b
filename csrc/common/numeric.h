// 16-bit floating formats as bits, and their value as fp32.
#pragma once

#include "platform.h"

#if defined(__CUDACC__)
#include <cuda_fp16.h>
#endif

namespace dgemma {

struct Bfloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

DGEMMA_HD float float_from_bits(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
#endif
}

DGEMMA_HD uint32_t bits_from_float(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
#endif
}

DGEMMA_HD uint32_t bits_of(float value) { return bits_from_float(value); }
DGEMMA_HD uint32_t bits_of(Bfloat16 value) { return value.bits; }
DGEMMA_HD uint32_t bits_of(Float16 value) { return value.bits; }

DGEMMA_HD float to_float(float value) { return value; }
DGEMMA_HD float to_float(Bfloat16 value) { return float_from_bits(uint32_t(value.bits) << 16); }
DGEMMA_HD float to_float(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  const uint32_t magnitude = value.bits & 0x7fffu, sign = (value.bits & 0x8000u) << 16;
  if (magnitude > 0x7bffu) return float_from_bits(sign | 0x7f800000u | (magnitude << 13));
  return float_from_bits(sign | bits_from_float(float_from_bits(magnitude << 13) * 0x1p112f));
#endif
}

// Round to nearest even.
DGEMMA_HD Bfloat16 to_bfloat16(float value) {
  const uint32_t bits = bits_from_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {uint16_t((bits >> 16) | 0x40u)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};
}

DGEMMA_HD Float16 to_float16(float value) {
#if defined(__CUDA_ARCH__)
  return {__half_as_ushort(__float2half_rn(value))};
#else
  const uint32_t bits = bits_from_float(value), magnitude = bits & 0x7fffffffu;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000u);
  if (magnitude > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (magnitude >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};
  if (magnitude < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the rounded multiple of 2^-24 in the low bits.
    const uint32_t rounded = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000u;
    return {uint16_t(sign | rounded)};
  }
  return {uint16_t(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13))};
#endif
}

}  // namespace dgemma
