// Entry points of `block_attention`; see params.h for the arguments.
#pragma once

#include "../params.h"

namespace dgemma {

// How many blocks of threads should share the keys of one tile of rows on a GPU of that many multiprocessors.
int64_t block_attention_splits(const BlockAttentionParams& params, int multiprocessors);

#if defined(DGEMMA_WITH_CUDA)
void block_attention_cuda(const BlockAttentionParams& params, void* stream);

template <class T, int kHeadDim>
void launch_block_attention(const BlockAttentionParams& params, void* stream);

void launch_block_attention_merge(const BlockAttentionParams& params, void* stream);
#endif

}  // namespace dgemma
