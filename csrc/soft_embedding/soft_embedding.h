// Entry points of `soft_embedding`; see params.h for the arguments. The products between the two are the caller's.
#pragma once

#include "../params.h"

namespace dgemma {

#if defined(DGEMMA_WITH_CUDA)
// Probabilities and masses of slice `slice` of the vocabulary.
void soft_embedding_probabilities_cuda(const SoftEmbeddingParams& params, int64_t slice, void* stream);
// The output, from the partial results and masses of all slices.
void soft_embedding_sum_cuda(const SoftEmbeddingParams& params, void* stream);

template <class T>
void launch_soft_embedding_probabilities(const SoftEmbeddingParams& params, int64_t slice, void* stream);
template <class T>
void launch_soft_embedding_sum(const SoftEmbeddingParams& params, void* stream);
#endif

}  // namespace dgemma
