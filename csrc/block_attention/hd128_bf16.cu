#include "launch.cuh"

namespace dgemma {

template void launch_block_attention<Bfloat16, 128>(const BlockAttentionParams& params, void* stream);

}  // namespace dgemma
