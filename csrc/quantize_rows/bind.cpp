#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "config.h"
#include "quantize_rows.h"

namespace dgemma {

void register_quantize_rows(pybind11::module_& m) {
  using P = QuantizeRowsParams;
  pybind11::class_<P> params(m, "QuantizeRowsParams",
                             "Arguments of quantize_rows; the fields are documented in params.h.");
  made_of_fields<P>(params, {
      pointer_field(params, "rows", &P::rows),
      enum_field(params, "dtype", &P::dtype),
      number_field(params, "count", &P::count),
      number_field(params, "width", &P::width),
      number_field(params, "stride", &P::stride),
      pointer_field(params, "numbers", &P::numbers),
      pointer_field(params, "scales", &P::scales),
  });
#if defined(DGEMMA_WITH_CUDA)
  m.def(
      "quantize_rows_cuda",
      [](const P& p, uintptr_t stream) { quantize_rows_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches on a CUDA stream of the current device.");
  describe_kernel(m, "quantize_rows_kernel", kQuantizeRowsThreads, kQuantizeRowsSharedBytes);
#endif
}

}  // namespace dgemma
