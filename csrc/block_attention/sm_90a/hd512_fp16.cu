#include "launch.cuh"

namespace dgemma {

template void launch_block_attention_cluster<Float16>(const BlockAttentionParams& params, void* stream);

}  // namespace dgemma
