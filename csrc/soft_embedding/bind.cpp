#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "config.h"
#include "soft_embedding.h"

namespace dgemma {

void register_soft_embedding(pybind11::module_& m) {
  using P = SoftEmbeddingParams;
  pybind11::class_<P> params(m, "SoftEmbeddingParams",
                             "Arguments of soft_embedding; the fields are documented in params.h.");
  made_of_fields<P>(params, {
      pointer_field(params, "logits", &P::logits),
      enum_field(params, "dtype", &P::dtype),
      number_field(params, "rows0", &P::rows0),
      number_field(params, "rows1", &P::rows1),
      number_field(params, "vocab", &P::vocab),
      number_field(params, "stride0", &P::stride0),
      number_field(params, "stride1", &P::stride1),
      pointer_field(params, "argmax", &P::argmax),
      pointer_field(params, "top1_prob", &P::top1_prob),
      row_parameter_field(params, "temperature", &P::temperature),
      number_field(params, "softcap", &P::softcap),
      number_field(params, "columns", &P::columns),
      number_field(params, "embedding", &P::embedding),
      pointer_field(params, "probabilities", &P::probabilities),
      pointer_field(params, "masses", &P::masses),
      pointer_field(params, "partial", &P::partial),
      pointer_field(params, "output", &P::output),
  });
  m.attr("SOFT_EMBEDDING_TILE") = kSoftEmbeddingTile;

#if defined(DGEMMA_WITH_CUDA)
  m.def(
      "soft_embedding_probabilities_cuda",
      [](const P& p, int64_t slice, uintptr_t stream) {
        soft_embedding_probabilities_cuda(p, slice, reinterpret_cast<void*>(stream));
      },
      pybind11::arg("params"), pybind11::arg("slice"), pybind11::arg("stream"),
      pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches the probabilities of a slice on a CUDA stream of the current device.");
  m.def(
      "soft_embedding_sum_cuda",
      [](const P& p, uintptr_t stream) { soft_embedding_sum_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches the sum of all slices on a CUDA stream of the current device.");
  describe_kernel(m, "soft_embedding_probabilities_kernel", kSoftEmbeddingThreads, 0);
  describe_kernel(m, "soft_embedding_sum_kernel", kSoftEmbeddingSumThreads, 0);
#endif
}

}  // namespace dgemma
