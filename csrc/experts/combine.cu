#include "combine.cuh"

#include "../common/cuda_check.h"
#include "experts.h"

namespace dgemma {

void launch_experts_combine(const ExpertsParams& params, const float* partial, void* stream) {
  const int64_t across = (params.embedding + 4 * kExpertsCombineThreads - 1) / (4 * kExpertsCombineThreads);
  const dim3 grid(unsigned(params.rows * across));
  if (params.dtype == Dtype::kBFloat16)
    launch("experts", experts_combine_kernel<Bfloat16>, grid, kExpertsCombineThreads, 0, stream, params, partial);
  else
    launch("experts", experts_combine_kernel<Float16>, grid, kExpertsCombineThreads, 0, stream, params, partial);
}

}  // namespace dgemma
