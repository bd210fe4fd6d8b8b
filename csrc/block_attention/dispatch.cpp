#if defined(DGEMMA_WITH_CUDA)
#include <stdexcept>
#include <string>

#include "../common/numeric.h"
#include "block_attention.h"

namespace dgemma {
namespace {

template <class T>
void launch_for_head_dim(const BlockAttentionParams& params, void* stream) {
  switch (params.head_dim) {
    case 64: return launch_block_attention<T, 64>(params, stream);
    case 128: return launch_block_attention<T, 128>(params, stream);
    case 256: return launch_block_attention<T, 256>(params, stream);
    case 512: return launch_block_attention<T, 512>(params, stream);
    default:
      throw std::runtime_error("block_attention: head_dim " + std::to_string(params.head_dim) +
                               ", supported are 64, 128, 256 and 512");
  }
}

}  // namespace

void block_attention_cuda(const BlockAttentionParams& params, void* stream) {
  switch (params.dtype) {
    case Dtype::kBFloat16: launch_for_head_dim<Bfloat16>(params, stream); break;
    case Dtype::kFloat16: launch_for_head_dim<Float16>(params, stream); break;
    case Dtype::kFloat32: throw std::runtime_error("block_attention: fp32 has no CUDA kernel");
  }
  if (params.splits > 1) launch_block_attention_merge(params, stream);
}

}  // namespace dgemma
#endif
