#if defined(DGEMMA_WITH_SM_90A)
#include <stdexcept>
#include <string>

#include "../../common/numeric.h"
#include "../block_attention.h"
#include "config.h"
#include "sm_90a.h"

namespace dgemma {

void block_attention_sm_90a(const BlockAttentionParams& params, void* stream) {
  if (params.head_dim != BlockAttentionClusterShape::kHeadDim)
    throw std::runtime_error("block_attention: head_dim " + std::to_string(params.head_dim) +
                             " with wgmma, supported is 512");
  if (!(params.query.aligned && params.key.aligned && params.value.aligned && params.prefix_key.aligned &&
        params.prefix_value.aligned))
    throw std::runtime_error("block_attention: rows that start between multiples of 16 bytes with wgmma");
  switch (params.dtype) {
    case Dtype::kBFloat16: launch_block_attention_cluster<Bfloat16>(params, stream); break;
    case Dtype::kFloat16: launch_block_attention_cluster<Float16>(params, stream); break;
    case Dtype::kFloat32: throw std::runtime_error("block_attention: fp32 has no CUDA kernel");
  }
  if (params.splits > 1) launch_block_attention_merge(params, stream);
}

}  // namespace dgemma
#endif
