// How 16 bytes of a row of quantised weights become left operands of a product.
//
// A product adds up columns in any order, as long as both operands have the same one. So a lane takes columns that lie
// side by side: of kValues in its 16 bytes, the pairs 2s and 2s + 1 are what mma.m16n8k16 wants of it in its step s.
//
// Numbers are widened in registers. Sign, exponent and mantissa go to where a 16-bit float has them; what the
// exponent's bias is off by is a power of two, which a multiplication takes out again. That brings subnormal numbers
// out right as well. The code of NaN comes out as 480.
#pragma once

#include "../common/device/tensor_core.cuh"
#include "config.h"

namespace dgemma {

template <class T>
struct FloatBits;
template <>
struct FloatBits<Bfloat16> {
  static constexpr int kMantissa = 7;
  static constexpr uint32_t kFp8Bias = 0x7b807b80u;       // 2^(127 - 7), twice
  // As much of 2^(127 - 1) as the largest scale has room for.
  static constexpr float kNvfp4Bias = 0x1p119f;
};
template <>
struct FloatBits<Float16> {
  static constexpr int kMantissa = 10;
  static constexpr uint32_t kFp8Bias = 0x5c005c00u;       // 2^(15 - 7), twice
  static constexpr float kNvfp4Bias = 0x1p7f;             // of 2^(15 - 1)
};
// What is then left of it, for both.
constexpr float kNvfp4Left = 128.0f;

DGEMMA_DEVICE float float_from_e4m3(uint32_t byte) {
  return float_from_bits((byte & 0x80u) << 24 | (byte & 0x7fu) << 20) * 0x1p120f;
}

// The columns 2 * i and 2 * i + 1 of a chunk.
template <class T, WeightFormat kFormat>
struct WeightChunk;

template <class T>
struct WeightChunk<T, WeightFormat::kFp8> {
  hw::Words4 words;

  DGEMMA_DEVICE_MEMBER uint32_t pair(int i) const {
    // Each byte in the upper half of 16 bits.
    const uint32_t upper = hw::permute_bytes(words.word[i / 2], 0, i % 2 == 0 ? 0x1404 : 0x3424);
    // There the mantissa's three bits end at 8, and those of a float at the end of its own.
    constexpr int kShift = 11 - FloatBits<T>::kMantissa;
    const uint32_t bits = (upper & 0x80008000u) | (upper & 0x7f007f00u) >> kShift;
    return hw::multiply_pairs<T>(bits, FloatBits<T>::kFp8Bias);
  }
};

template <class T>
struct WeightChunk<T, WeightFormat::kNvfp4> {
  hw::Words4 words;
  uint32_t scale[2];  // of 16 columns each, twice

  // Scales: two e4m3 numbers.
  DGEMMA_DEVICE_MEMBER void set_scales(uint32_t bytes) {
    DGEMMA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const float one = float_from_e4m3(bytes >> (8 * i) & 0xffu) * FloatBits<T>::kNvfp4Bias;
      scale[i] = hw::pack<T>(one, one);
    }
  }

  DGEMMA_DEVICE_MEMBER uint32_t pair(int i) const {
    const uint32_t byte = hw::permute_bytes(words.word[i / 4], 0, 0x4440 + i % 4);
    // The four bits of each in the lowest of 16 are byte * 0x1001. Factors that shift as well are an instruction less.
    constexpr int kShift = FloatBits<T>::kMantissa - 1;
    const uint32_t bits = (byte * (0x1001u << 12) & 0x80008000u) | (byte * (0x1001u << kShift) & 0x00070007u << kShift);
    return hw::multiply_pairs<T>(bits, scale[i / 8]);
  }
};

}  // namespace dgemma
