// Expected embeddings, slice by slice of the vocabulary. The first kernel writes the rounded probabilities of a slice,
// which the caller multiplies with its part of the weight; the second adds the products and divides by the mass.
#pragma once

#include <type_traits>

#include "../common/device/qualifiers.cuh"
#include "../common/device/tensor_core.cuh"
#include "../common/device/warp_sum.cuh"
#include "../common/exponents.cuh"
#include "../common/statistics.h"
#include "../params.h"
#include "config.h"

namespace dgemma {

constexpr int kLaneVectors = kSoftEmbeddingTile / 8 / hw::kWarp / kSoftEmbeddingRounds;  // of a round

// fp16 has no normal number below 6e-5, and a flat row holds 4e-6 by token: there probabilities are stored times 2^14.
template <class T>
constexpr float kStoredOne = std::is_same_v<T, Float16> ? 16384.0f : 1.0f;

DGEMMA_HD int64_t soft_embedding_tiles(int64_t tokens) {
  return (tokens + kSoftEmbeddingTile - 1) / kSoftEmbeddingTile;
}

// Tokens of a slice: all but the last have as many as there are columns.
inline int64_t soft_embedding_slice_tokens(const SoftEmbeddingParams& params, int64_t slice) {
  const int64_t left = params.vocab - slice * params.columns;
  return left < params.columns ? left : params.columns;
}

// Blocks of the first kernel, a tile per warp.
inline int64_t soft_embedding_blocks(const SoftEmbeddingParams& params, int64_t slice) {
  constexpr int kTiles = kSoftEmbeddingThreads / hw::kWarp;
  const int64_t tiles = soft_embedding_tiles(soft_embedding_slice_tokens(params, slice));
  return (params.rows0 * params.rows1 * tiles + kTiles - 1) / kTiles;
}

// top e^d of a logit. None passes `top`, whichever logit the row's place names and whatever a formula rounds beside it;
// NaN stays NaN.
template <class Exponent>
DGEMMA_DEVICE float probability(float x, const Exponent& exponent, float top) {
  return hw::exp2_fast(hw::smaller_or_nan(exponent(x), 0.0f)) * top;
}

// Writes the rounded probabilities of the first `count` logits of a vector, and 0 for the others; returns their mass.
template <class T, class Exponent>
DGEMMA_DEVICE float write_vector(const hw::Words4& logits, int count, const Exponent& exponent, float top,
                                 hw::Words4* target) {
  hw::Words4 result;
  float sums[2] = {0.0f, 0.0f};
  DGEMMA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float low = probability(element<T>(logits, 2 * i), exponent, top);
    const float high = probability(element<T>(logits, 2 * i + 1), exponent, top);
    result.word[i] = hw::pack<T>(2 * i < count ? low : 0.0f, 2 * i + 1 < count ? high : 0.0f);
    sums[0] += element<T>(result, 2 * i);
    sums[1] += element<T>(result, 2 * i + 1);
  }
  *target = result;
  return sums[0] + sums[1];
}

template <class T, class Exponent>
DGEMMA_DEVICE float write_round(const hw::Words4 (&words)[kLaneVectors], const Exponent& exponent, float top,
                                hw::Words4* target) {
  float mass = 0.0f;
  DGEMMA_UNROLL
  for (int v = 0; v < kLaneVectors; ++v)
    mass += write_vector<T>(words[v], 8, exponent, top, target + v * hw::kWarp);
  return mass;
}

// The same of logits at any address, of which `left` are left in their row. They are read one by one.
template <class T, class Exponent>
DGEMMA_DEVICE float write_any_round(const T* logits, int left, const Exponent& exponent, float top,
                                    hw::Words4* target) {
  float mass = 0.0f;
  DGEMMA_NO_UNROLL
  for (int v = 0; v < kLaneVectors; ++v) {
    const int token = (v * hw::kWarp + hw::thread_x() % hw::kWarp) * 8;
    hw::Words4 words{{0, 0, 0, 0}};
    DGEMMA_UNROLL
    for (int i = 0; i < 8; ++i)
      if (token + i < left) words.word[i / 2] |= bits_of(logits[token + i]) << (i % 2 * 16);
    mass += write_vector<T>(words, left - token, exponent, top, target + v * hw::kWarp);
  }
  return mass;
}

template <class T>
DGEMMA_DEVICE void read_round(const T* logits, hw::Words4 (&words)[kLaneVectors]) {
  DGEMMA_UNROLL
  for (int v = 0; v < kLaneVectors; ++v)
    words[v] = hw::load_streaming(logits + (v * hw::kWarp + hw::thread_x() % hw::kWarp) * 8);
}

// Whether a condition holds in all lanes.
DGEMMA_DEVICE bool in_all_lanes(bool condition) { return hw::ballot(condition) == 0xffffffffu; }

template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(kSoftEmbeddingThreads, kSoftEmbeddingBlocks)
    soft_embedding_probabilities_kernel(const SoftEmbeddingParams params, int64_t first, int tiles) {
  const int lane = hw::thread_x() % hw::kWarp;
  const uint32_t rows = uint32_t(params.rows0 * params.rows1);
  const uint32_t index = uint32_t(hw::block_x()) * (kSoftEmbeddingThreads / hw::kWarp) + hw::thread_x() / hw::kWarp;
  const uint32_t row = index / uint32_t(tiles), tile = index - row * uint32_t(tiles);
  if (row >= rows) return;
  const T* start = row_of_logits<T>(params, row);
  const int64_t token = first + int64_t{tile} * kSoftEmbeddingTile, behind = params.vocab - token;
  const T* logits = start + token;
  int left = behind < kSoftEmbeddingTile ? int(behind) : kSoftEmbeddingTile;
  const bool whole = left == kSoftEmbeddingTile && reinterpret_cast<uintptr_t>(logits) % 16 == 0;
  hw::Words4 words[kLaneVectors];
  // The first logits are under way while the row's largest one is looked up.
  if (whole) read_round(logits, words);

  // A place of other logits reads a wrong value, and no memory outside the row.
  const int64_t place = params.argmax[row], last = params.vocab - 1;
  const float peak = to_float(start[place < 0 ? 0 : place > last ? last : place]);
  const float given = params.top1_prob[row], top = given > 0.0f ? given * kStoredOne<T> : 0.0f;
  const Exponents exponents{params.softcap > 0 ? 1.0f / params.softcap : 0.0f,
                            fminf(kLog2E / of_row(params.temperature, row), kLargestFloat)};
  const bool polynomial = whole && exponents.capped() && exponents.polynomial();

  hw::Words4* target = reinterpret_cast<hw::Words4*>(static_cast<T*>(params.probabilities) + row * params.columns +
                                                     int64_t{tile} * kSoftEmbeddingTile) + lane;
  float mass = 0.0f;
  DGEMMA_NO_UNROLL
  for (int round = 0; round < kSoftEmbeddingRounds; ++round) {
    constexpr int kTokens = kLaneVectors * hw::kWarp * 8;
    hw::Words4 next[kLaneVectors];
    if (whole && round + 1 < kSoftEmbeddingRounds) read_round(logits + kTokens, next);
    // The formula has to hold for the row's largest logit too, and is the same in all lanes.
    float relative = 0.0f;
    if (polynomial) relative = fmaxf(extremes_of<T>(words).magnitude, fabsf(peak)) * exponents.inverse_softcap;
    if (top == 0.0f) {
      // Nothing of what a row without a distribution holds reaches the product.
      DGEMMA_UNROLL
      for (int v = 0; v < kLaneVectors; ++v) target[v * hw::kWarp] = hw::Words4{{0, 0, 0, 0}};
    } else if (!exponents.capped()) {
      const Uncapped exponent{exponents.rate, peak};
      mass += whole ? write_round<T>(words, exponent, top, target)
                    : write_any_round(logits, left, exponent, top, target);
    } else if (polynomial && in_all_lanes(relative < 0.5f)) {
      mass += write_round<T>(words, capped_below_half(exponents, peak), top, target);
    } else if (polynomial && in_all_lanes(relative < 1.0f)) {
      mass += write_round<T>(words, capped_below_1(exponents, peak), top, target);
    } else {
      const AnyCapped exponent(exponents, params.softcap, peak);
      mass += write_any_round(logits, left, exponent, top, target);
    }
    DGEMMA_UNROLL
    for (int v = 0; v < kLaneVectors; ++v) words[v] = next[v];
    logits += kTokens;
    target += kTokens / 8;
    left -= kTokens;
  }
  mass = sum_of_warp(mass);
  if (lane == 0)
    params.masses[row * soft_embedding_tiles(params.vocab) + token / kSoftEmbeddingTile] = mass;
}

// The sums over the slices, in their order, of kColumns columns from one of a row's results on.
template <int kColumns>
DGEMMA_DEVICE void add_slices(const SoftEmbeddingParams& params, int slices, int64_t place, float* sums) {
  const int64_t stride = params.rows0 * params.rows1 * params.embedding;
  DGEMMA_NO_UNROLL
  for (int s = 0; s < slices; s += kSoftEmbeddingSumSlices) {
    hw::Words4 share[kSoftEmbeddingSumSlices];
    const float* partial = params.partial + s * stride + place;
    DGEMMA_UNROLL
    for (int i = 0; i < kSoftEmbeddingSumSlices; ++i) {
      if (s + i >= slices) continue;
      if (kColumns == 4)
        share[i] = hw::load_streaming(partial + i * stride);
      else
        share[i].word[0] = bits_of(partial[i * stride]);
    }
    DGEMMA_UNROLL
    for (int i = 0; i < kSoftEmbeddingSumSlices; ++i) {
      if (s + i >= slices) continue;
      DGEMMA_UNROLL
      for (int j = 0; j < kColumns; ++j) sums[j] += float_from_bits(share[i].word[j]);
    }
  }
}

// Grid: x = rows, y = columns of the embedding, four by thread.
template <class T>
DGEMMA_KERNEL DGEMMA_BOUNDS(kSoftEmbeddingSumThreads, 1)
    soft_embedding_sum_kernel(const SoftEmbeddingParams params, int tiles, int slices) {
  const int64_t row = hw::block_x();
  const int64_t column = (hw::block_y() * kSoftEmbeddingSumThreads + hw::thread_x()) * 4;
  const int64_t left = params.embedding - column, place = row * params.embedding + column;
  // Rows of the partial results start on 16-byte boundaries.
  const bool aligned = params.embedding % 4 == 0;
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (aligned && left > 0) {
    add_slices<4>(params, slices, place, sums);
  } else {
    DGEMMA_UNROLL
    for (int j = 0; j < 4; ++j)
      if (j < left) add_slices<1>(params, slices, place + j, sums + j);
  }
  // By every warp for itself: each adds up the same numbers in the same order.
  float mass = 0.0f;
  for (int t = hw::thread_x() % hw::kWarp; t < tiles; t += hw::kWarp) mass += params.masses[row * tiles + t];
  mass = sum_of_warp(mass);

  // Without a distribution a row is zeros, whatever the weight holds: 0 * NaN came this far as NaN.
  const bool valid = params.top1_prob[row] > 0.0f;
  uint32_t pairs[2];
  DGEMMA_UNROLL
  for (int j = 0; j < 2; ++j)
    pairs[j] = valid ? hw::pack<T>(sums[2 * j] / mass, sums[2 * j + 1] / mass) : 0;
  T* output = static_cast<T*>(params.output) + place;
  if (aligned && left > 0) {
    reinterpret_cast<uint32_t*>(output)[0] = pairs[0];
    reinterpret_cast<uint32_t*>(output)[1] = pairs[1];
  } else {
    DGEMMA_UNROLL
    for (int j = 0; j < 4; ++j)
      if (j < left) output[j].bits = uint16_t(pairs[j / 2] >> (j % 2 * 16));
  }
}

}  // namespace dgemma
