// The launches of one dtype; each file that includes this holds one.
#pragma once

#include <stdexcept>

#include "../common/cuda_check.h"
#include "kernel.cuh"
#include "soft_embedding.h"

namespace dgemma {

template <class T>
void launch_soft_embedding_probabilities(const SoftEmbeddingParams& params, int64_t slice, void* stream) {
  const int64_t blocks = soft_embedding_blocks(params, slice), rows = params.rows0 * params.rows1;
  const int64_t tiles = soft_embedding_tiles(soft_embedding_slice_tokens(params, slice));
  if (rows * tiles > 0x7fffffff) throw std::runtime_error("soft_embedding: more than 2^31 - 1 tiles of a slice");
  launch("soft_embedding", soft_embedding_probabilities_kernel<T>, dim3(unsigned(blocks)), kSoftEmbeddingThreads, 0,
         stream, params, slice * params.columns, int(tiles));
}

template <class T>
void launch_soft_embedding_sum(const SoftEmbeddingParams& params, void* stream) {
  constexpr int kColumns = kSoftEmbeddingSumThreads * 4;
  const int64_t slices = (params.vocab + params.columns - 1) / params.columns;
  const dim3 grid(unsigned(params.rows0 * params.rows1), unsigned((params.embedding + kColumns - 1) / kColumns));
  launch("soft_embedding", soft_embedding_sum_kernel<T>, grid, kSoftEmbeddingSumThreads, 0, stream, params,
         int(soft_embedding_tiles(params.vocab)), int(slices));
}

}  // namespace dgemma
