// Runs the CUDA kernel of quantize_rows on the host: `quantize_rows_emulated FOLDER...`, a case per folder.
#include "case_files.h"
#include "quantize_rows/kernel.cuh"

namespace dgemma {
namespace {

template <class T>
void run(const QuantizeRowsParams& p) {
  emulation::run({p.count, 1, 1}, kQuantizeRowsThreads, kQuantizeRowsSharedBytes,
                 [&] { quantize_rows_kernel<T>(p); });
}

void run_case(const char* folder) {
  Case c(folder);
  QuantizeRowsParams p;
  p.dtype = Dtype(c.integer("dtype"));
  p.count = c.integer("count");
  p.width = c.integer("width");
  p.stride = c.integer("stride");
  p.rows = c.tensor<char>("rows") + c.integer("first_byte");
  p.numbers = c.output<uint8_t>("numbers", p.count * p.width);
  p.scales = c.output<float>("scales", p.count);
  if (p.dtype == Dtype::kBFloat16)
    run<Bfloat16>(p);
  else if (p.dtype == Dtype::kFloat16)
    run<Float16>(p);
  else
    run<float>(p);
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}
