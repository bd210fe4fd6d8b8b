#pragma once

namespace dgemma {

// As CUDART_VERSION: 1000 * major + 10 * minor.
int cuda_runtime_version();
// The newest CUDA that the installed driver runs, in the same form; 0 without a driver.
int cuda_driver_version();

}  // namespace dgemma
