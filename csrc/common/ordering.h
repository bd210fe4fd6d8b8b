// Total order of scores as integers, so that ranking is a sort of keys.
#pragma once

#include "numeric.h"

namespace dgemma {

// Rises with the value; -0.0 equals 0.0, and NaN is above everything as in torch.sort.
DGEMMA_HD uint32_t order_of(float value) {
  const uint32_t bits = bits_from_float(value + 0.0f);  // of 0.0 for -0.0
  const uint32_t order = bits ^ ((bits & 0x80000000u) ? 0xffffffffu : 0x80000000u);
  return value == value ? order : 0xffffffffu;
}

// Ascending keys: ranked positions first, by descending score, the lower position first on ties.
DGEMMA_HD uint64_t ranking_key(bool ranked, float score, uint32_t position) {
  return (uint64_t{!ranked} << 63) | (uint64_t{uint32_t(~order_of(score))} << 31) | position;
}

// The upper half of that key in 32 bits, the same for all that are not ranked: no score has a larger one.
constexpr uint32_t kNotRanked = 0xfffffffeu;
DGEMMA_HD uint32_t descending_key(bool ranked, float score) { return ranked ? ~order_of(score) : kNotRanked; }

// The score of a key of a ranked position; some NaN for NaN, 0.0 for -0.0.
DGEMMA_HD float score_of(uint32_t key) {
  const uint32_t order = ~key;
  return float_from_bits((order & 0x80000000u) ? order & 0x7fffffffu : ~order);
}

DGEMMA_HD uint32_t position_of(uint64_t key) { return uint32_t(key) & 0x7fffffffu; }

}  // namespace dgemma
