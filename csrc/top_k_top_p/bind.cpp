#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "config.h"
#include "top_k_top_p.h"

namespace dgemma {

void register_top_k_top_p(pybind11::module_& m) {
  using P = TopKTopPParams;
  pybind11::class_<P> params(m, "TopKTopPParams", "Arguments of top_k_top_p; the fields are documented in params.h.");
  made_of_fields<P>(params, {
      pointer_field(params, "logits", &P::logits),
      enum_field(params, "dtype", &P::dtype),
      number_field(params, "rows0", &P::rows0),
      number_field(params, "rows1", &P::rows1),
      number_field(params, "vocab", &P::vocab),
      number_field(params, "stride0", &P::stride0),
      number_field(params, "stride1", &P::stride1),
      row_parameter_field(params, "temperature", &P::temperature),
      number_field(params, "top_k", &P::top_k),
      number_field(params, "top_p", &P::top_p),
      number_field(params, "top_k_first", &P::top_k_first),
      number_field(params, "softcap", &P::softcap),
      pointer_field(params, "cutoff", &P::cutoff),
  });

  m.def("top_k_top_p_host", &top_k_top_p_host, pybind11::arg("params"), pybind11::arg("threads"),
        pybind11::arg("isa") = "", pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Runs on the host; `isa` names an instruction set, or is empty for the best.");
#if defined(DGEMMA_WITH_CUDA)
  m.def(
      "top_k_top_p_cuda",
      [](const P& p, uintptr_t stream) { top_k_top_p_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches on a CUDA stream of the current device.");
  describe_kernel(m, "top_k_top_p_kernel", kTopKTopPThreads, kTopKTopPSharedBytes);
#endif
}

}  // namespace dgemma
