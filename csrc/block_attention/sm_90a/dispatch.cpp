#if defined(DGEMMA_WITH_SM_90A)
#include <stdexcept>
#include <string>

#include "../../common/numeric.h"
#include "../block_attention.h"
#include "sm_90a.h"

namespace dgemma {

namespace {

template <int kHeadDim>
void launch_head_dim(const BlockAttentionParams& params, void* stream) {
  switch (params.dtype) {
    case Dtype::kBFloat16: return launch_block_attention_wgmma<Bfloat16, kHeadDim>(params, stream);
    case Dtype::kFloat16: return launch_block_attention_wgmma<Float16, kHeadDim>(params, stream);
    case Dtype::kFloat32: throw std::runtime_error("block_attention: fp32 has no CUDA kernel");
  }
}

}  // namespace

void block_attention_sm_90a(const BlockAttentionParams& params, void* stream) {
  if (!(params.query.aligned && params.key.aligned && params.value.aligned && params.prefix_key.aligned &&
        params.prefix_value.aligned))
    throw std::runtime_error("block_attention: rows that start between multiples of 16 bytes with wgmma");
  switch (params.head_dim) {
    case 256: launch_head_dim<256>(params, stream); break;
    case 512: launch_head_dim<512>(params, stream); break;
    default:
      throw std::runtime_error("block_attention: head_dim " + std::to_string(params.head_dim) +
                               " with wgmma, supported are 256 and 512");
  }
  if (params.splits > 1) launch_block_attention_merge(params, stream);
}

}  // namespace dgemma
#endif
