#include "quantize_rows.h"

#include <stdexcept>

#include "../common/cuda_check.h"
#include "kernel.cuh"

namespace dgemma {
namespace {

template <class T>
void launch_rows(const QuantizeRowsParams& params, void* stream) {
  launch("quantize_rows", quantize_rows_kernel<T>, dim3(unsigned(params.count)), kQuantizeRowsThreads,
         kQuantizeRowsSharedBytes, stream, params);
}

}  // namespace

void quantize_rows_cuda(const QuantizeRowsParams& params, void* stream) {
  if (params.count > 0x7fffffff) throw std::runtime_error("quantize_rows: more than 2^31 - 1 rows");
  switch (params.dtype) {
    case Dtype::kBFloat16: return launch_rows<Bfloat16>(params, stream);
    case Dtype::kFloat16: return launch_rows<Float16>(params, stream);
    case Dtype::kFloat32: return launch_rows<float>(params, stream);
  }
}

}  // namespace dgemma
