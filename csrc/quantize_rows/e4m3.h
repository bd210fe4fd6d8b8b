// float8_e4m3fn by integers: GPUs below 8.9 have no conversion to it, and hosts none at all.
#pragma once

#include "../common/numeric.h"

namespace dgemma {

constexpr float kLargestE4m3 = 448.0f;

// The code of the number nearest to x, |x| at most 448, ties to even; NaN for NaN.
DGEMMA_HD uint32_t e4m3_from_float(float x) {
  const uint32_t bits = bits_from_float(x), size = bits & 0x7fffffffu, sign = bits >> 24 & 0x80u;
  if (size > 0x7f800000u) return sign | 0x7fu;
  // Below 2^-6 the last place is 2^-9, which is that of fp32 between 2^14 and 2^15.
  if (size < 0x3c800000u) return sign | (bits_from_float(float_from_bits(size) + 16384.0f) - 0x46800000u);
  // Half of the last place that stays, less one where that place is even; the carry may go into the exponent, which is
  // 120 less there.
  return sign | (((size + 0x7ffffu + (size >> 20 & 1u)) >> 20) - (120u << 3));
}

}  // namespace dgemma
