#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "../common/instruction_sets.h"
#include "config.h"
#include "row_stats.h"

namespace dgemma {

void register_row_stats(pybind11::module_& m) {
  using P = RowStatsParams;
  pybind11::class_<P> params(m, "RowStatsParams", "Arguments of row_stats; the fields are documented in params.h.");
  made_of_fields<P>(params, {
      pointer_field(params, "logits", &P::logits),
      enum_field(params, "dtype", &P::dtype),
      number_field(params, "rows0", &P::rows0),
      number_field(params, "rows1", &P::rows1),
      number_field(params, "vocab", &P::vocab),
      number_field(params, "stride0", &P::stride0),
      number_field(params, "stride1", &P::stride1),
      row_parameter_field(params, "temperature", &P::temperature),
      row_parameter_field(params, "stats_temperature", &P::stats_temperature),
      number_field(params, "has_stats_temperature", &P::has_stats_temperature),
      number_field(params, "softcap", &P::softcap),
      pointer_field(params, "uniform", &P::uniform),
      row_parameter_field(params, "seed", &P::seed),
      row_parameter_field(params, "offset", &P::offset),
      pointer_field(params, "argmax", &P::argmax),
      pointer_field(params, "sample", &P::sample),
      pointer_field(params, "entropy", &P::entropy),
      pointer_field(params, "logsumexp", &P::logsumexp),
      pointer_field(params, "top1_prob", &P::top1_prob),
      pointer_field(params, "top2_prob", &P::top2_prob),
      pointer_field(params, "sample_prob", &P::sample_prob),
      pointer_field(params, "workspace", &P::workspace),
      pointer_field(params, "cutoff", &P::cutoff),
  });

  m.def("row_stats_host_workspace", &row_stats_host_workspace, pybind11::arg("params"), "Bytes of workspace.");
  m.def("row_stats_host", &row_stats_host, pybind11::arg("params"), pybind11::arg("threads"),
        pybind11::arg("isa") = "", pybind11::arg("statistics") = true,
        pybind11::call_guard<pybind11::gil_scoped_release>(),
        "Runs on the host; `isa` names an instruction set, or is empty for the best; without `statistics`, argmax and "
        "sample alone.");
  m.def("host_instruction_sets", &host_instruction_sets, "What this CPU can run, best first.");
#if defined(DGEMMA_WITH_CUDA)
  m.def("row_stats_cuda_workspace", &row_stats_cuda_workspace, pybind11::arg("params"), "Bytes of workspace.");
  m.def(
      "row_stats_cuda",
      [](const P& p, uintptr_t stream) { row_stats_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches on a CUDA stream of the current device.");
  describe_kernel(m, "row_stats_tile_kernel", kRowStatsTileThreads, 0);
  describe_kernel(m, "row_stats_row_kernel", kRowStatsThreads, kRowStatsRowSharedBytes);
#endif
}

}  // namespace dgemma
