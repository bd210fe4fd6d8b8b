// Vectors of fp32 lanes, exp and tanh on them, and loads that widen to fp32. Included once per instruction set.
#pragma once

#include <cstdint>

#include "numeric.h"
#include "statistics.h"

#if defined(DGEMMA_ISA_AVX512)
#include <immintrin.h>
#define DGEMMA_LANES 16
#elif defined(DGEMMA_ISA_AVX2)
#include <immintrin.h>
#define DGEMMA_LANES 8
#else
#define DGEMMA_LANES 4
#endif

namespace dgemma {
namespace {

using dgemma::exp_of_difference;
using dgemma::larger;
using dgemma::smaller;

typedef float Vector __attribute__((vector_size(4 * DGEMMA_LANES)));
typedef int32_t VectorInt __attribute__((vector_size(4 * DGEMMA_LANES)));
typedef uint32_t VectorUint __attribute__((vector_size(4 * DGEMMA_LANES)));
typedef uint16_t HalfVector __attribute__((vector_size(2 * DGEMMA_LANES)));

DGEMMA_HD Vector splat(float value) { return value - Vector{}; }

DGEMMA_HD Vector load(const float* pointer) {
  Vector result;
  __builtin_memcpy(&result, pointer, sizeof result);
  return result;
}

// By the instructions' names where the compiler makes several of the plain form.
#if defined(DGEMMA_ISA_AVX512)
// All lanes by a mask, here and below: the form without makes GCC warn of a variable in its own header.
constexpr __mmask16 kAllLanes = 0xffff;
DGEMMA_HD VectorUint widen(HalfVector bits) { return (VectorUint)_mm512_maskz_cvtepu16_epi32(kAllLanes, (__m256i)bits); }
#else
DGEMMA_HD VectorUint widen(HalfVector bits) { return __builtin_convertvector(bits, VectorUint); }
#endif

DGEMMA_HD Vector load(const Bfloat16* pointer) {
  HalfVector bits;
  __builtin_memcpy(&bits, pointer, sizeof bits);
  return (Vector)(widen(bits) << 16);
}

DGEMMA_HD Vector load(const Float16* pointer) {
  HalfVector bits;
  __builtin_memcpy(&bits, pointer, sizeof bits);
#if defined(DGEMMA_ISA_AVX512)
  return (Vector)_mm512_maskz_cvtph_ps(kAllLanes, (__m256i)bits);
#else
  const VectorUint wide = widen(bits);
  const VectorUint magnitude = wide & 0x7fffu;
  // Moving the exponent field leaves a number 2^112 too small, subnormals included; infinity and NaN keep
  // their meaning by a full exponent field.
  const VectorUint finite = (VectorUint)((Vector)(magnitude << 13) * 0x1p112f);
  const VectorUint special = (magnitude << 13) | 0x7f800000u;
  return (Vector)((magnitude > 0x7bffu ? special : finite) | ((wide & 0x8000u) << 16));
#endif
}

// The next two vectors, in whatever order their lanes come soonest.
template <class T>
DGEMMA_HD void load_two(const T* pointer, Vector& one, Vector& other) {
  one = load(pointer);
  other = load(pointer + DGEMMA_LANES);
}

DGEMMA_HD void load_two(const Bfloat16* pointer, Vector& one, Vector& other) {
  VectorUint pairs;
  __builtin_memcpy(&pairs, pointer, sizeof pairs);
  one = (Vector)(pairs << 16);
  other = (Vector)(pairs & 0xffff0000u);
}

DGEMMA_HD void store(float* pointer, Vector value) { __builtin_memcpy(pointer, &value, sizeof value); }

// a > b ? a : b, so that a NaN in `a` is passed over and one in `b` stays; named because the compiler makes two
// instructions of the comparison where the instruction set has one.
#if defined(DGEMMA_ISA_AVX512)
DGEMMA_HD Vector larger(Vector a, Vector b) {
  return (Vector)_mm512_maskz_max_ps(kAllLanes, (__m512)a, (__m512)b);
}
#elif defined(DGEMMA_ISA_AVX2)
DGEMMA_HD Vector larger(Vector a, Vector b) { return (Vector)_mm256_max_ps((__m256)a, (__m256)b); }
#else
DGEMMA_HD Vector larger(Vector a, Vector b) { return a > b ? a : b; }
#endif

// A NaN in `value` stays.
DGEMMA_HD Vector at_least(Vector value, float bound) { return larger(splat(bound), value); }
DGEMMA_HD Vector at_most(Vector value, float bound) { return value > bound ? splat(bound) : value; }

DGEMMA_HD bool any_lane(VectorInt mask) {
#if defined(DGEMMA_ISA_AVX512)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(DGEMMA_ISA_AVX2)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  return mask[0] | mask[1] | mask[2] | mask[3];
#endif
}

// The lanes for which a comparison holds, in whatever form the instruction set has them.
#if defined(DGEMMA_ISA_AVX512)
typedef __mmask16 Lanes;
DGEMMA_HD Lanes at_least_lanes(Vector a, Vector b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GE_OQ); }
// Where either is NaN.
DGEMMA_HD Lanes unordered_lanes(Vector a, Vector b) { return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q); }
DGEMMA_HD Lanes lanes_of_first_only(Lanes a, Lanes b) { return Lanes(a & ~b); }
DGEMMA_HD bool any_of(Lanes lanes) { return lanes != 0; }
DGEMMA_HD Vector add_where(Lanes lanes, Vector sum, Vector value) {
  return (Vector)_mm512_mask_add_ps((__m512)sum, lanes, (__m512)sum, (__m512)value);
}
#else
typedef VectorInt Lanes;
DGEMMA_HD Lanes at_least_lanes(Vector a, Vector b) { return a >= b; }
DGEMMA_HD Lanes unordered_lanes(Vector a, Vector b) { return (a != a) | (b != b); }
DGEMMA_HD Lanes lanes_of_first_only(Lanes a, Lanes b) { return a & ~b; }
DGEMMA_HD bool any_of(Lanes lanes) { return any_lane(lanes); }
DGEMMA_HD Vector add_where(Lanes lanes, Vector sum, Vector value) { return sum + (Vector)((VectorInt)value & lanes); }
#endif

#if defined(DGEMMA_ISA_AVX2)
// For each set of eight lanes their numbers, a byte each, from the lowest byte on.
struct LaneNumbers {
  uint64_t of[256];
  constexpr LaneNumbers() : of{} {
    for (int set = 0; set < 256; ++set)
      for (int lane = 7; lane >= 0; --lane)
        if (set >> lane & 1) of[set] = of[set] << 8 | uint64_t(lane);
  }
};
constexpr LaneNumbers kLaneNumbers;
#endif

// Writes those lanes of a vector one after the other; returns how many. May write a whole vector.
DGEMMA_HD int64_t store_lanes(float* pointer, Vector value, Lanes lanes) {
#if defined(DGEMMA_ISA_AVX512)
  store(pointer, (Vector)_mm512_maskz_compress_ps(lanes, (__m512)value));
  return __builtin_popcount(lanes);
#elif defined(DGEMMA_ISA_AVX2)
  const unsigned set = unsigned(_mm256_movemask_ps((__m256)lanes));
  const __m256i numbers = _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(int64_t(kLaneNumbers.of[set])));
  store(pointer, (Vector)_mm256_permutevar8x32_ps((__m256)value, numbers));
  return __builtin_popcount(set);
#else
  if (!any_lane(lanes)) return 0;
  int64_t count = 0;
  for (int lane = 0; lane < DGEMMA_LANES; ++lane) {
    pointer[count] = value[lane];
    count -= lanes[lane];
  }
  return count;
#endif
}

// The largest lane.
DGEMMA_HD float largest_lane(Vector value) {
  float result = -INFINITY;
  for (int lane = 0; lane < DGEMMA_LANES; ++lane) result = larger(value[lane], result);
  return result;
}

DGEMMA_HD double sum_of_lanes(Vector value) {
  double result = 0;
  for (int lane = 0; lane < DGEMMA_LANES; ++lane) result += double(value[lane]);
  return result;
}

// 2^f for |f| <= 1/2: minimax fit of (2^f - 1) / f; relative error below 1.7e-7 with fp32's roundings.
DGEMMA_HD Vector exp2_of_fraction(Vector f) {
  Vector p = f * 0x1.5bba14p-10f + 0x1.3cea88p-7f;
  p = p * f + 0x1.c6b752p-5f;
  p = p * f + 0x1.ebf9bcp-3f;
  p = p * f + 0x1.62e42ap-1f;
  return p * f + 1.0f;
}

// 2^t for t in [kLowestPower, 0], within 1.7e-7 of itself, exact at 0; NaN stays. At kLowestPower the exponent field
// is 0, so that the result is exactly 0, as it is for all that is raised to that bound.
constexpr float kLowestPower = -127.0f;

DGEMMA_HD Vector exp2_of_difference(Vector t) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits; 127 more makes them an exponent field.
  const Vector shifted = t + 12583039.0f;
  const Vector f = t - (shifted - 12583039.0f);
  return exp2_of_fraction(f) * (Vector)((VectorInt)shifted << 23);
}

#if defined(DGEMMA_ISA_AVX512)
#define DGEMMA_HAS_EXP2_OF_ANY 1

// The same for any t <= 0, -inf included, by instructions that split and scale: fewer, as no bound is needed. Below
// -126 it is 0 where results are flushed (FlushToZero), else no normal number.
DGEMMA_HD Vector exp2_of_any(Vector t) {
  const Vector f = (Vector)_mm512_maskz_reduce_ps(kAllLanes, (__m512)t, 0);
  return (Vector)_mm512_maskz_scalef_ps(kAllLanes, (__m512)exp2_of_fraction(f), (__m512)(t - f));
}

// While one lives, results that are no normal numbers are 0, if that is wanted. They cost twenty times an ordinary one.
struct FlushToZero {
  unsigned before;
  DGEMMA_MEMBER explicit FlushToZero(bool wanted) : before(_mm_getcsr()) {
    if (wanted) _mm_setcsr(before | 0x8000u);
  }
  DGEMMA_MEMBER ~FlushToZero() { _mm_setcsr(before); }
};
#else
#define DGEMMA_HAS_EXP2_OF_ANY 0
#endif

// e^x = 2^n e^r with n the nearest integer to x / ln 2 and |r| <= ln 2 / 2.
struct Reduced {
  Vector scale;    // 2^n
  Vector expm1_r;  // e^r - 1
};

DGEMMA_HD Reduced reduce(Vector x) {
  // Adding 1.5 * 2^23 rounds to an integer, which then stands in the low bits.
  const Vector shifted = x * 1.44269504089f + 12582912.0f;
  const Vector n = shifted - 12582912.0f;
  const Vector r = (x - n * 0.693359375f) - n * -2.12194440054690583e-4f;
  // Minimax fit of (e^r - 1 - r) / r^2; relative error of e^r - 1 below 1.8e-8.
  Vector q = r * 0x1.6bec02p-10f + 0x1.122794p-7f;
  q = q * r + 0x1.555674p-5f;
  q = q * r + 0x1.5554b0p-3f;
  q = q * r + 0x1.fffffep-2f;
  const VectorInt exponent = ((VectorInt)shifted - (0x4b400000 - 127)) << 23;
  return {(Vector)exponent, q * (r * r) + r};
}

// e^x for x <= 0 within 1 ulp; exactly 0 where the result would not be a normal number; NaN stays.
DGEMMA_HD Vector exp_of_difference(Vector x) {
  const Reduced e = reduce(at_least(x, kLowestExponent));
  const Vector result = e.expm1_r * e.scale + e.scale;
  return x < kLowestExponent ? Vector{} : result;
}

// tanh x = -m / (m + 2) with m = e^(-2|x|) - 1, which keeps the relative accuracy of small x.
DGEMMA_HD Vector tanh(Vector x) {
  const VectorUint sign = (VectorUint)x & 0x80000000u;
  const Vector magnitude = at_most((Vector)((VectorUint)x & 0x7fffffffu), 20.0f);
  const Reduced e = reduce(magnitude * -2.0f);
  const Vector m = e.expm1_r * e.scale + (e.scale - 1.0f);
  return (Vector)((VectorUint)((Vector{} - m) / (m + 2.0f)) | sign);
}

}  // namespace
}  // namespace dgemma
