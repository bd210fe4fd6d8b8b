#include "launch.cuh"

namespace dgemma {

template void launch_block_attention_cluster<Bfloat16>(const BlockAttentionParams& params, void* stream);

}  // namespace dgemma
