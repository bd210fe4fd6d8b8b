// Philox 4x32-10 (Salmon, Moraes, Dror, Shaw, SC11) and what is made of its words.
#pragma once

#include "platform.h"

namespace dgemma {

struct PhiloxWords {
  uint32_t word[4];
};

// Fixed uses of the four words of a row, so that draws under one seed and offset are independent.
constexpr int kWordSample = 0;
constexpr int kWordRenoiseHigh = 1;
constexpr int kWordRenoiseLow = 2;
constexpr int kWordSelect = 3;

DGEMMA_HD PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  DGEMMA_UNROLL
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = uint64_t{0xD2511F53u} * c0;
    const uint64_t product1 = uint64_t{0xCD9E8D57u} * c2;
    const uint32_t high0 = uint32_t(product0 >> 32), high1 = uint32_t(product1 >> 32);
    c0 = high1 ^ c1 ^ key0;
    c2 = high0 ^ c3 ^ key1;
    c1 = uint32_t(product1);
    c3 = uint32_t(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// The words of a row: the key is the seed, the counter is (row, offset), low half first.
DGEMMA_HD PhiloxWords random_words(int64_t seed, int64_t offset, int64_t row) {
  const PhiloxWords counter{{uint32_t(row), uint32_t(uint64_t(row) >> 32), uint32_t(offset),
                             uint32_t(uint64_t(offset) >> 32)}};
  return philox4x32(counter, uint32_t(seed), uint32_t(uint64_t(seed) >> 32));
}

// fp32 in [0, 1) from the upper 24 bits, exact.
DGEMMA_HD float uniform_from_word(uint32_t word) { return float(word >> 8) * 0x1p-24f; }

// An integer in [0, bound), bound < 2^31: the upper 64 bits of (64 random bits) * bound.
DGEMMA_HD int64_t below(uint32_t high, uint32_t low, int64_t bound) {
  const uint64_t carry = (uint64_t(low) * uint64_t(bound)) >> 32;
  return int64_t((uint64_t(high) * uint64_t(bound) + carry) >> 32);
}

}  // namespace dgemma
