#include "merge.cuh"

#include "../common/cuda_check.h"
#include "block_attention.h"

namespace dgemma {

void launch_block_attention_merge(const BlockAttentionParams& params, void* stream) {
  const int64_t rows = params.batch * params.query_heads * params.length;
  const int64_t rows_per_block = kBlockAttentionMergeThreads / (params.head_dim / 4);
  const dim3 grid(unsigned((rows + rows_per_block - 1) / rows_per_block));
  if (params.dtype == Dtype::kBFloat16)
    launch("block_attention", block_attention_merge_kernel<Bfloat16>, grid, kBlockAttentionMergeThreads, 0, stream,
           params);
  else
    launch("block_attention", block_attention_merge_kernel<Float16>, grid, kBlockAttentionMergeThreads, 0, stream,
           params);
}

}  // namespace dgemma
