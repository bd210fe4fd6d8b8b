#include "launch.cuh"

namespace dgemma {

template void launch_block_attention_wgmma<Float16, 512>(const BlockAttentionParams& params, void* stream);

}  // namespace dgemma
