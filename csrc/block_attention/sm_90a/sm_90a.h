// Entry points of `block_attention` with wgmma: head_dim 256 and 512, compute capability 9.0, rows on 16-byte boundaries.
#pragma once

#include "../../params.h"

namespace dgemma {

// As block_attention_splits. At head_dim 512 a tile of rows takes two multiprocessors.
int64_t block_attention_sm_90a_splits(const BlockAttentionParams& params, int multiprocessors);

#if defined(DGEMMA_WITH_SM_90A)
void block_attention_sm_90a(const BlockAttentionParams& params, void* stream);

template <class T, int kHeadDim>
void launch_block_attention_wgmma(const BlockAttentionParams& params, void* stream);
#endif

}  // namespace dgemma
