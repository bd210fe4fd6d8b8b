// What each op adds to the module.
#pragma once

#include <pybind11/pybind11.h>

namespace dgemma {

void register_random(pybind11::module_& m);
void register_row_stats(pybind11::module_& m);
void register_top_k_top_p(pybind11::module_& m);
void register_commit(pybind11::module_& m);
void register_progress(pybind11::module_& m);
void register_block_attention(pybind11::module_& m);
void register_soft_embedding(pybind11::module_& m);
void register_experts(pybind11::module_& m);
void register_quantize_rows(pybind11::module_& m);
#if defined(DGEMMA_WITH_CUDA)
void register_device(pybind11::module_& m);
#endif

}  // namespace dgemma
