// What a launch of each kernel takes, for the tests of budgets.
#pragma once

#include <pybind11/pybind11.h>

namespace dgemma {

// Adds to `CUDA_KERNELS`: threads of a block and bytes of dynamic shared memory of the kernels whose mangled name
// matches the regular expression.
inline void describe_kernel(pybind11::module_& m, const char* pattern, int threads, int shared_bytes) {
  pybind11::dict(m.attr("CUDA_KERNELS"))[pattern] = pybind11::make_tuple(threads, shared_bytes);
}

}  // namespace dgemma
