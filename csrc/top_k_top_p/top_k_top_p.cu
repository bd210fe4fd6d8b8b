#include "top_k_top_p.h"

#include <stdexcept>

#include "../common/cuda_check.h"
#include "kernel.cuh"

namespace dgemma {
namespace {

template <class T>
void launch_rows(const TopKTopPParams& params, void* stream) {
  launch("top_k_top_p", top_k_top_p_kernel<T>, dim3(unsigned(params.rows0 * params.rows1)), kTopKTopPThreads,
         kTopKTopPSharedBytes, stream, params);
}

}  // namespace

void top_k_top_p_cuda(const TopKTopPParams& params, void* stream) {
  if (params.rows0 * params.rows1 > 0x7fffffff) throw std::runtime_error("top_k_top_p: more than 2^31 - 1 rows");
  switch (params.dtype) {
    case Dtype::kFloat32: return launch_rows<float>(params, stream);
    case Dtype::kFloat16: return launch_rows<Float16>(params, stream);
    case Dtype::kBFloat16: return launch_rows<Bfloat16>(params, stream);
  }
}

}  // namespace dgemma
