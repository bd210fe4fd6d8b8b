#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "progress.h"

namespace dgemma {

void register_progress(pybind11::module_& m) {
  using P = ProgressParams;
  pybind11::class_<P> params(m, "ProgressParams", "Arguments of progress; the fields are documented in params.h.");
  // After the sizes the fields of `reference.progress.ProgressCall`, in its order.
  made_of_fields<P>(params, {
      number_field(params, "batch", &P::batch),
      number_field(params, "length", &P::length),
      pointer_field(params, "tokens", &P::tokens),
      pointer_field(params, "new_tokens", &P::new_tokens),
      pointer_field(params, "open", &P::open),
      pointer_field(params, "entropy", &P::entropy),
      pointer_field(params, "active", &P::active),
      pointer_field(params, "stuck", &P::stuck),
      pointer_field(params, "nfe", &P::nfe),
      pointer_field(params, "finished", &P::finished),
      number_field(params, "mask_id", &P::mask_id),
      number_field(params, "noise", &P::noise),
      number_field(params, "ends_unchanged", &P::ends_unchanged),
      number_field(params, "last", &P::last),
      pointer_field(params, "new_active", &P::new_active),
      pointer_field(params, "new_stuck", &P::new_stuck),
      pointer_field(params, "new_nfe", &P::new_nfe),
  });

  m.def("progress_host", &progress_host, pybind11::arg("params"),
        pybind11::call_guard<pybind11::gil_scoped_release>(), "Runs on the host, on the caller's thread.");
#if defined(DGEMMA_WITH_CUDA)
  m.def(
      "progress_cuda", [](const P& p, uintptr_t stream) { progress_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches on a CUDA stream of the current device.");
  describe_kernel(m, "progress_kernel", 32, 0);
#endif
}

}  // namespace dgemma
