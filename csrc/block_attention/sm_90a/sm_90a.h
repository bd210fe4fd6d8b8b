// Entry points of `block_attention` with wgmma: head_dim 512, compute capability 9.0, rows on 16-byte boundaries.
#pragma once

#include "../../params.h"

namespace dgemma {

// As block_attention_splits. A tile of rows takes two multiprocessors.
int64_t block_attention_sm_90a_splits(const BlockAttentionParams& params, int multiprocessors);

#if defined(DGEMMA_WITH_SM_90A)
void block_attention_sm_90a(const BlockAttentionParams& params, void* stream);

template <class T>
void launch_block_attention_cluster(const BlockAttentionParams& params, void* stream);
#endif

}  // namespace dgemma
