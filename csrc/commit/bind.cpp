#include <string>

#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "commit.h"
#include "config.h"

namespace dgemma {

void register_commit(pybind11::module_& m) {
  using P = CommitParams;
  pybind11::class_<P> params(m, "CommitParams", "Arguments of commit; the fields are documented in params.h.");
  // After the sizes the fields of `reference.commit.CommitCall`, in its order.
  made_of_fields<P>(params, {
      number_field(params, "batch", &P::batch),
      number_field(params, "length", &P::length),
      pointer_field(params, "tokens", &P::tokens),
      pointer_field(params, "argmax", &P::argmax),
      pointer_field(params, "sample", &P::sample),
      pointer_field(params, "entropy", &P::entropy),
      pointer_field(params, "sample_prob", &P::sample_prob),
      pointer_field(params, "top1_prob", &P::top1_prob),
      pointer_field(params, "top2_prob", &P::top2_prob),
      pointer_field(params, "candidates", &P::candidates),
      enum_field(params, "measure", &P::measure),
      enum_field(params, "select", &P::select),
      number_field(params, "flags", &P::flags),
      row_parameter_field(params, "k", &P::k),
      row_parameter_field(params, "value", &P::value),
      row_parameter_field(params, "value2", &P::value2),
      number_field(params, "mask_id", &P::mask_id),
      enum_field(params, "write", &P::write),
      number_field(params, "write_argument", &P::write_argument),
      row_parameter_field(params, "seed", &P::seed),
      row_parameter_field(params, "offset", &P::offset),
      pointer_field(params, "draft", &P::draft),
      pointer_field(params, "history", &P::history),
      pointer_field(params, "finished", &P::finished),
      row_parameter_field(params, "confidence", &P::confidence),
      number_field(params, "depth", &P::depth),
      number_field(params, "has_confidence", &P::has_confidence),
      pointer_field(params, "new_tokens", &P::new_tokens),
      pointer_field(params, "committed", &P::committed),
      pointer_field(params, "num_committed", &P::num_committed),
      pointer_field(params, "new_draft", &P::new_draft),
      pointer_field(params, "new_history", &P::new_history),
      pointer_field(params, "new_finished", &P::new_finished),
  });

  m.def("commit_host", &commit_host, pybind11::arg("params"), pybind11::arg("threads"),
        pybind11::call_guard<pybind11::gil_scoped_release>(), "Runs on the host.");
#if defined(DGEMMA_WITH_CUDA)
  m.attr("COMMIT_CUDA_MAX_LENGTH") = kCommitMaxLength;
  m.def(
      "commit_cuda", [](const P& p, uintptr_t stream) { commit_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches on a CUDA stream of the current device.");
  for (const int threads : {32, 256, 512, 1024})
    describe_kernel(m, ("commit_kernelILi" + std::to_string(threads) + "E").c_str(), threads,
                    commit_shared_bytes(threads));
#endif
}

}  // namespace dgemma
