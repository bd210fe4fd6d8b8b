#if defined(DGEMMA_WITH_CUDA)
#include "../bindings.h"
#include "device.h"

namespace dgemma {

void register_device(pybind11::module_& m) {
  m.attr("CUDA_ARCHS") = DGEMMA_CUDA_ARCHS;
  m.attr("CUDA_KERNELS") = pybind11::dict();  // filled by the ops: describe_kernel
  m.def("cuda_runtime_version", &cuda_runtime_version, "1000 * major + 10 * minor of the CUDA built against.");
  m.def("cuda_driver_version", &cuda_driver_version, "The newest CUDA that the driver runs; 0 without a driver.");
}

}  // namespace dgemma
#endif
