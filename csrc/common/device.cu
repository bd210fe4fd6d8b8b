// What the compiled CUDA code says of itself.
#include "device.h"

#include <cuda_runtime.h>

namespace dgemma {

int cuda_runtime_version() { return CUDART_VERSION; }

int cuda_driver_version() {
  int version = 0;
  return cudaDriverGetVersion(&version) == cudaSuccess ? version : 0;
}

}  // namespace dgemma
