#include "../bindings.h"
#include "../common/bind_kernels.h"
#include "../common/bind_params.h"
#include "block_attention.h"
#include "config.h"
#include "sm_90a/config.h"
#include "sm_90a/sm_90a.h"

namespace dgemma {
namespace {

using P = BlockAttentionParams;

// Set as (address, batch stride, head stride, slot stride, aligned).
void heads_field(pybind11::class_<P>& bound, const char* name, HeadsView P::* field) {
  bound.def_property(
      name,
      [field](const P& self) {
        const HeadsView& view = self.*field;
        return pybind11::make_tuple(reinterpret_cast<uintptr_t>(view.data), view.batch_stride, view.head_stride,
                                    view.slot_stride, view.aligned);
      },
      [field](P& self, const pybind11::tuple& value) {
        self.*field = {reinterpret_cast<const void*>(value[0].cast<uintptr_t>()), value[1].cast<int64_t>(),
                       value[2].cast<int64_t>(), value[3].cast<int64_t>(), value[4].cast<bool>()};
      });
}

#if defined(DGEMMA_WITH_CUDA)
template <int kHeadDim>
void describe_instances(pybind11::module_& m, const char* pattern) {
  describe_kernel(m, pattern, BlockAttentionShape<kHeadDim>::kThreads, BlockAttentionShape<kHeadDim>::kSharedBytes);
}
#endif

}  // namespace

void register_block_attention(pybind11::module_& m) {
  pybind11::class_<P> params(m, "BlockAttentionParams",
                             "Arguments of block_attention; the fields are documented in params.h.");
  params.def(pybind11::init<>());
  enum_field(params, "dtype", &P::dtype);
  params.def_readwrite("batch", &P::batch);
  params.def_readwrite("query_heads", &P::query_heads);
  params.def_readwrite("kv_heads", &P::kv_heads);
  params.def_readwrite("length", &P::length);
  params.def_readwrite("prefix_length", &P::prefix_length);
  params.def_readwrite("head_dim", &P::head_dim);
  heads_field(params, "query", &P::query);
  heads_field(params, "key", &P::key);
  heads_field(params, "value", &P::value);
  heads_field(params, "prefix_key", &P::prefix_key);
  heads_field(params, "prefix_value", &P::prefix_value);
  pointer_field(params, "prefix_start", &P::prefix_start);
  pointer_field(params, "prefix_end", &P::prefix_end);
  params.def_readwrite("scale", &P::scale);
  params.def_readwrite("softcap", &P::softcap);
  params.def_readwrite("causal", &P::causal);
  params.def_readwrite("window", &P::window);
  pointer_field(params, "output", &P::output);
  pointer_field(params, "lse", &P::lse);
  params.def_readwrite("splits", &P::splits);
  pointer_field(params, "partial_output", &P::partial_output);
  pointer_field(params, "partial_lse", &P::partial_lse);

  m.def("block_attention_splits", &block_attention_splits, pybind11::arg("params"), pybind11::arg("multiprocessors"),
        "Blocks of threads that should share the keys of one tile of rows.");
#if defined(DGEMMA_WITH_CUDA)
  m.def(
      "block_attention_cuda",
      [](const P& p, uintptr_t stream) { block_attention_cuda(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches on a CUDA stream of the current device.");
  describe_instances<64>(m, "block_attention_kernel.*Li64E");
  describe_instances<128>(m, "block_attention_kernel.*Li128E");
  describe_instances<256>(m, "block_attention_kernel.*Li256E");
  describe_instances<512>(m, "block_attention_kernel.*Li512E");
#if defined(DGEMMA_WITH_SM_90A)
  m.def("block_attention_sm_90a_splits", &block_attention_sm_90a_splits, pybind11::arg("params"),
        pybind11::arg("multiprocessors"), "As block_attention_splits, for block_attention_sm_90a.");
  m.def(
      "block_attention_sm_90a",
      [](const P& p, uintptr_t stream) { block_attention_sm_90a(p, reinterpret_cast<void*>(stream)); },
      pybind11::arg("params"), pybind11::arg("stream"), pybind11::call_guard<pybind11::gil_scoped_release>(),
      "Launches the wgmma variant on a CUDA stream of the current device.");
  describe_kernel(m, "block_attention_wgmma_kernel", BlockAttentionWgmmaShape<256>::kThreads,
                  BlockAttentionWgmmaShape<256>::kSharedBytes);
  describe_kernel(m, "block_attention_cluster_kernel", BlockAttentionWgmmaShape<512>::kThreads,
                  BlockAttentionWgmmaShape<512>::kSharedBytes);
#endif
  describe_kernel(m, "block_attention_merge_kernel", kBlockAttentionMergeThreads, 0);
#endif
}

}  // namespace dgemma
