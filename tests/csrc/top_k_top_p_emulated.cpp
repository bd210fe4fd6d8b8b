// Runs the CUDA kernel of top_k_top_p on the host: `top_k_top_p_emulated FOLDER...`, a case per folder.
#include "case_files.h"
#include "top_k_top_p/kernel.cuh"

namespace dgemma {
namespace {

template <class T>
void run(const TopKTopPParams& p) {
  emulation::run({p.rows0 * p.rows1, 1, 1}, kTopKTopPThreads, kTopKTopPSharedBytes,
                 [&] { top_k_top_p_kernel<T>(p); });
}

void run_case(const char* folder) {
  Case c(folder);
  TopKTopPParams p;
  p.dtype = Dtype(c.integer("dtype"));
  const int64_t size = p.dtype == Dtype::kFloat32 ? 4 : 2;
  p.logits = c.tensor<char>("logits") + c.integer("storage_offset") * size;
  p.rows0 = c.integer("rows0");
  p.rows1 = c.integer("rows1");
  p.vocab = c.integer("vocab");
  p.stride0 = c.integer("stride0");
  p.stride1 = c.integer("stride1");
  p.temperature = c.row_parameter<float>("temperature");
  p.top_k = c.integer("top_k");
  p.top_p = float(c.number("top_p"));
  p.top_k_first = c.number("top_k_first") != 0;
  p.softcap = float(c.number("softcap"));
  p.cutoff = c.output<float>("cutoff", p.rows0 * p.rows1);
  switch (p.dtype) {
    case Dtype::kFloat32: run<float>(p); break;
    case Dtype::kFloat16: run<Float16>(p); break;
    case Dtype::kBFloat16: run<Bfloat16>(p); break;
  }
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}
