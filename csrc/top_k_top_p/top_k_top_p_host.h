// The host implementation of `top_k_top_p`, compiled once per instruction set.
#pragma once

#include "../params.h"

namespace dgemma {

struct TopKTopPHost {
  // The cutoff of row `row`; `scratch` is of `host_scratch` numbers.
  void (*row)(const TopKTopPParams& params, int64_t row, float* scratch);
};

// Vectors of a tile. Lane by lane their largest logits are kept: each is that of 16 tokens.
constexpr int kHostTileVectors = 16;
// Lanes of the widest vector, and what is written behind an array at most.
constexpr int64_t kHostMostLanes = 16, kHostBehind = 4 * kHostMostLanes;

// Numbers for the candidates of a row, for the maxima of its groups, and for those of sixteen groups.
inline int64_t host_candidates(int64_t vocab) { return vocab + kHostBehind; }
inline int64_t host_maxima(int64_t vocab) { return vocab / kHostTileVectors + kHostBehind; }
inline int64_t host_scratch(int64_t vocab) {
  return host_candidates(vocab) + host_maxima(vocab) + host_maxima(host_maxima(vocab));
}

extern const TopKTopPHost top_k_top_p_host_plain;
#if defined(__x86_64__)
extern const TopKTopPHost top_k_top_p_host_avx2;
extern const TopKTopPHost top_k_top_p_host_avx512;
#endif

}  // namespace dgemma
