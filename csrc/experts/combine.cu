#include "combine.cuh"

#include "../common/cuda_check.h"
#include "experts.h"

namespace dgemma {

void launch_experts_combine(const ExpertsParams& params, const float* partial, void* stream) {
  const dim3 grid(unsigned(params.rows * experts_combine_across(params.embedding)));
  if (params.dtype == Dtype::kBFloat16)
    launch("experts", experts_combine_kernel<Bfloat16>, grid, kExpertsCombineThreads, 0, stream, params, partial);
  else
    launch("experts", experts_combine_kernel<Float16>, grid, kExpertsCombineThreads, 0, stream, params, partial);
}

}  // namespace dgemma
