// CUDA errors as exceptions that name the op, the error and the launch.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace dgemma {

inline void check_cuda(cudaError_t error, const std::string& what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error of this call must not show up in the next one
  throw std::runtime_error(what + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + ")");
}

// Launches a kernel with `shared_bytes` of dynamic shared memory, allowing more than the default 48 KB.
template <class... Parameters, class... Arguments>
void launch(const char* op, void (*kernel)(Parameters...), dim3 grid, unsigned block, size_t shared_bytes,
            void* stream, const Arguments&... arguments) {
  const std::string what = std::string(op) + ": kernel launch with grid (" + std::to_string(grid.x) + ", " +
                           std::to_string(grid.y) + ", " + std::to_string(grid.z) + "), block " +
                           std::to_string(block) + ", " + std::to_string(shared_bytes) + " bytes of shared memory";
  if (shared_bytes > 48 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                    cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)),
               what);
  kernel<<<grid, block, shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
  check_cuda(cudaGetLastError(), what);
}

}  // namespace dgemma
