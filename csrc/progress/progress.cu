#include "../common/cuda_check.h"
#include "kernel.cuh"
#include "progress.h"

namespace dgemma {

void progress_cuda(const ProgressParams& params, void* stream) {
  launch("progress", progress_kernel, dim3(unsigned(params.batch)), unsigned(hw::kWarp), 0, stream, params);
}

}  // namespace dgemma
