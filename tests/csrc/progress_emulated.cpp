// Runs the CUDA kernel of progress on the host: `progress_emulated FOLDER...`, a case per folder.
#include "case_files.h"
#include "progress/kernel.cuh"

namespace dgemma {
namespace {

void run_case(const char* folder) {
  Case c(folder);
  ProgressParams p;
  p.batch = c.integer("batch");
  p.length = c.integer("length");
  p.tokens = c.tensor<int64_t>("tokens");
  p.new_tokens = c.tensor<int64_t>("new_tokens");
  p.open = c.tensor<bool>("open");
  p.entropy = c.tensor<float>("entropy");
  p.active = c.tensor<bool>("active");
  p.stuck = c.tensor<bool>("stuck");
  p.nfe = c.tensor<int64_t>("nfe");
  p.finished = c.tensor<bool>("finished");
  p.mask_id = c.integer("mask_id");
  p.noise = c.integer("noise");
  p.ends_unchanged = c.integer("ends_unchanged");
  p.last = c.integer("last");
  p.new_active = c.output<bool>("new_active", p.batch);
  p.new_stuck = c.output<bool>("new_stuck", p.batch);
  p.new_nfe = c.output<int64_t>("new_nfe", p.batch);
  emulation::run({p.batch, 1, 1}, hw::kWarp, 0, [&] { progress_kernel(p); });
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}
