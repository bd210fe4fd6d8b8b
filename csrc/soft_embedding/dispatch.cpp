#if defined(DGEMMA_WITH_CUDA)
#include <stdexcept>

#include "../common/numeric.h"
#include "config.h"
#include "soft_embedding.h"

namespace dgemma {
namespace {

[[noreturn]] void refuse_fp32() { throw std::runtime_error("soft_embedding: fp32 has no CUDA kernel"); }

}  // namespace

void soft_embedding_probabilities_cuda(const SoftEmbeddingParams& params, int64_t slice, void* stream) {
  if (params.columns < 1 || params.columns % kSoftEmbeddingTile != 0)
    throw std::runtime_error("soft_embedding: the columns of a slice are no whole number of tiles");
  switch (params.dtype) {
    case Dtype::kBFloat16: return launch_soft_embedding_probabilities<Bfloat16>(params, slice, stream);
    case Dtype::kFloat16: return launch_soft_embedding_probabilities<Float16>(params, slice, stream);
    case Dtype::kFloat32: refuse_fp32();
  }
}

void soft_embedding_sum_cuda(const SoftEmbeddingParams& params, void* stream) {
  switch (params.dtype) {
    case Dtype::kBFloat16: return launch_soft_embedding_sum<Bfloat16>(params, stream);
    case Dtype::kFloat16: return launch_soft_embedding_sum<Float16>(params, stream);
    case Dtype::kFloat32: refuse_fp32();
  }
}

}  // namespace dgemma
#endif
