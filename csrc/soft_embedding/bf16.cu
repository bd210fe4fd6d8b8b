#include "launch.cuh"

namespace dgemma {

template void launch_soft_embedding_probabilities<Bfloat16>(const SoftEmbeddingParams& params, int64_t slice,
                                                             void* stream);
template void launch_soft_embedding_sum<Bfloat16>(const SoftEmbeddingParams& params, void* stream);

}  // namespace dgemma
