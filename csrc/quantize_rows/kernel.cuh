// A block finds the scale of a row and rounds it to FP8.
#pragma once

#include "../common/device/qualifiers.cuh"
#include "../common/exponents.cuh"
#include "../common/hardware.cuh"
#include "../params.h"
#include "config.h"
#include "e4m3.h"

namespace dgemma {

constexpr float kSmallestNormal = 0x1p-126f;

// Numbers of a vector of 16 bytes.
template <class T>
constexpr int kVectorNumbers = 16 / int(sizeof(T));

// The codes of a vector, by words.
struct alignas(8) TwoWords {
  uint32_t word[2];
};

// The bits of |x|, in the order of numbers, infinity and NaN last.
DGEMMA_DEVICE uint32_t magnitude(float x) { return bits_from_float(x) & 0x7fffffffu; }

DGEMMA_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

template <class T>
DGEMMA_DEVICE uint32_t largest_of(const hw::Words4& vector) {
  uint32_t result = 0;
  DGEMMA_UNROLL
  for (int i = 0; i < kVectorNumbers<T>; ++i) result = larger(result, magnitude(element<T>(vector, i)));
  return result;
}

// The largest of a block, in all its threads.
DGEMMA_DEVICE uint32_t largest_of_block(uint32_t value) {
  const hw::Shared<uint32_t> of_warps{0};
  DGEMMA_UNROLL
  for (int mask = hw::kWarp / 2; mask > 0; mask /= 2) value = larger(value, hw::shuffle_xor(value, mask));
  if (hw::thread_x() % hw::kWarp == 0) of_warps.store(hw::thread_x() / hw::kWarp, value);
  hw::sync_block();
  DGEMMA_UNROLL
  for (int i = 0; i < kQuantizeRowsThreads / hw::kWarp; ++i) value = larger(value, of_warps.load(i));
  return value;
}

template <class T>
DGEMMA_DEVICE void write_codes(const hw::Words4& vector, float scale, uint8_t* target) {
  TwoWords codes{{0, 0}};
  DGEMMA_UNROLL
  for (int i = 0; i < kVectorNumbers<T>; ++i)
    codes.word[i / 4] |= e4m3_from_float(element<T>(vector, i) / scale) << (i % 4 * 8);
  if (kVectorNumbers<T> == 8)
    *reinterpret_cast<TwoWords*>(target) = codes;
  else
    *reinterpret_cast<uint32_t*>(target) = codes.word[0];
}

template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(kQuantizeRowsThreads, kQuantizeRowsBlocks)
    quantize_rows_kernel(const QuantizeRowsParams params) {
  constexpr int kNumbers = kVectorNumbers<T>, kStep = kQuantizeRowsThreads;
  const int64_t row = hw::block_x(), width = params.width;
  const int thread = hw::thread_x();
  const T* source = static_cast<const T*>(params.rows) + row * params.stride;
  uint8_t* target = params.numbers + row * width;
  const bool by_vector = width % kNumbers == 0 && reinterpret_cast<uintptr_t>(source) % 16 == 0;
  const int64_t vectors = by_vector ? width / kNumbers : 0;

  hw::Words4 kept[kQuantizeRowsKept];
  uint32_t largest = 0;
  DGEMMA_UNROLL
  for (int v = 0; v < kQuantizeRowsKept; ++v) {
    const int64_t i = thread + v * kStep;
    kept[v] = i < vectors ? hw::load_streaming(source + i * kNumbers) : hw::Words4{{0, 0, 0, 0}};
  }
  DGEMMA_UNROLL
  for (int v = 0; v < kQuantizeRowsKept; ++v) largest = larger(largest, largest_of<T>(kept[v]));
  DGEMMA_NO_UNROLL
  for (int64_t i = thread + kQuantizeRowsKept * kStep; i < vectors; i += kStep)
    largest = larger(largest, largest_of<T>(hw::load_streaming(source + i * kNumbers)));
  // What does not lie on vectors, number by number.
  DGEMMA_NO_UNROLL
  for (int64_t i = vectors * kNumbers + thread; i < width; i += kStep)
    largest = larger(largest, magnitude(to_float(source[i])));

  const float quotient = float_from_bits(largest_of_block(largest)) * (1.0f / kLargestE4m3);
  // NaN stays.
  const float scale = quotient < kSmallestNormal ? kSmallestNormal : quotient;
  if (thread == 0) params.scales[row] = scale;

  DGEMMA_UNROLL
  for (int v = 0; v < kQuantizeRowsKept; ++v) {
    const int64_t i = thread + v * kStep;
    if (i < vectors) write_codes<T>(kept[v], scale, target + i * kNumbers);
  }
  DGEMMA_NO_UNROLL
  for (int64_t i = thread + kQuantizeRowsKept * kStep; i < vectors; i += kStep)
    write_codes<T>(hw::load_streaming(source + i * kNumbers), scale, target + i * kNumbers);
  DGEMMA_NO_UNROLL
  for (int64_t i = vectors * kNumbers + thread; i < width; i += kStep)
    target[i] = uint8_t(e4m3_from_float(to_float(source[i]) / scale));
}

}  // namespace dgemma
