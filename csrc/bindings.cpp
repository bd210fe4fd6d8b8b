#include "bindings.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Host C++ and CUDA kernels of dgemma_accel; called through dgemma_accel.native.";
#if defined(DGEMMA_WITH_CUDA)
  dgemma::register_device(m);
#endif
  dgemma::register_random(m);
  dgemma::register_row_stats(m);
  dgemma::register_top_k_top_p(m);
  dgemma::register_commit(m);
  dgemma::register_progress(m);
  dgemma::register_block_attention(m);
  dgemma::register_soft_embedding(m);
  dgemma::register_experts(m);
  dgemma::register_quantize_rows(m);
}
