#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "config.h"
#include "experts.h"

namespace dgemma {
namespace {

using P = ExpertsParams;

// Set as (format, weights, scale, scale by row, global scale, global scales).
template <class Class>
Field<P> matrix_field(Class& bound, const char* name, ExpertsMatrix P::* field) {
  return property_field<Class, P>(
      bound, name,
      [field](const P& self) {
        const ExpertsMatrix& matrix = self.*field;
        return pybind11::make_tuple(int(matrix.format), reinterpret_cast<uintptr_t>(matrix.weights),
                                    reinterpret_cast<uintptr_t>(matrix.scale), matrix.scale_by_row,
                                    reinterpret_cast<uintptr_t>(matrix.global_scale), matrix.global_scales);
      },
      [field](P& self, pybind11::handle value) {
        const auto parts = pybind11::reinterpret_borrow<pybind11::tuple>(value);
        self.*field = {static_cast<WeightFormat>(parts[0].cast<int>()),
                       reinterpret_cast<const void*>(address_of(parts[1])),
                       reinterpret_cast<const void*>(address_of(parts[2])),
                       parts[3].cast<bool>(),
                       reinterpret_cast<const float*>(address_of(parts[4])),
                       parts[5].cast<int64_t>()};
      });
}

#if defined(DGEMMA_WITH_CUDA)
template <WeightFormat kFormat, int kPairs>
void describe_products(pybind11::module_& m) {
  const std::string of = "LNS_12WeightFormatE" + std::to_string(int(kFormat)) + "ELi" + std::to_string(kPairs) + "E";
  for (const char* kernel : {"experts_gate_up_kernel.*", "experts_down_kernel.*"})
    describe_kernel(m, (kernel + of).c_str(), kExpertsThreads, ExpertsShape<kFormat, kPairs>::kSharedBytes);
}

template <WeightFormat kFormat>
void describe_format(pybind11::module_& m) {
  describe_products<kFormat, kExpertsFew>(m);
  describe_products<kFormat, kExpertsMany>(m);
}
#endif

}  // namespace

void register_experts(pybind11::module_& m) {
  pybind11::class_<P> params(m, "ExpertsParams", "Arguments of experts; the fields are documented in params.h.");
  made_of_fields<P>(params, {
      enum_field(params, "dtype", &P::dtype),
      number_field(params, "rows", &P::rows),
      number_field(params, "top_k", &P::top_k),
      number_field(params, "experts", &P::experts),
      number_field(params, "width", &P::width),
      number_field(params, "embedding", &P::embedding),
      enum_field(params, "activation", &P::activation),
      pointer_field(params, "hidden", &P::hidden),
      number_field(params, "hidden_stride", &P::hidden_stride),
      pointer_field(params, "index", &P::index),
      pointer_field(params, "choice_weights", &P::choice_weights),
      enum_field(params, "choice_dtype", &P::choice_dtype),
      number_field(params, "choice_stride0", &P::choice_stride0),
      number_field(params, "choice_stride1", &P::choice_stride1),
      matrix_field(params, "gate_up", &P::gate_up),
      matrix_field(params, "down", &P::down),
      pointer_field(params, "output", &P::output),
      pointer_field(params, "workspace", &P::workspace),
  });
#if defined(DGEMMA_WITH_CUDA)
  m.attr("EXPERTS_CUDA_MOST") = kExpertsMost;
  m.def("experts_cuda_workspace", &experts_cuda_workspace, pybind11::arg("params"), "Bytes of workspace.");
  m.def(
      "experts_cuda", [](const P& p, uintptr_t stream) { experts_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches on a CUDA stream of the current device.");
  describe_kernel(m, "experts_route_kernel", kExpertsRouteThreads, experts_route_shared_bytes(kExpertsMost));
  describe_format<WeightFormat::kPlain>(m);
  describe_format<WeightFormat::kFp8>(m);
  describe_format<WeightFormat::kNvfp4>(m);
  describe_kernel(m, "experts_combine_kernel", kExpertsCombineThreads, 0);
#endif
}

}  // namespace dgemma
