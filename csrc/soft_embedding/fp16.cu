#include "launch.cuh"

namespace dgemma {

template void launch_soft_embedding_probabilities<Float16>(const SoftEmbeddingParams& params, int64_t slice,
                                                            void* stream);
template void launch_soft_embedding_sum<Float16>(const SoftEmbeddingParams& params, void* stream);

}  // namespace dgemma
