// Runs the CUDA kernels of row_stats on the host: `row_stats_emulated FOLDER...`, a case per folder.
#include "case_files.h"
#include "row_stats/kernel.cuh"

namespace dgemma {
namespace {

template <class T, bool kCutoff>
void run(const RowStatsParams& params) {
  const int64_t tiles = row_stats_tiles(params), rows = params.rows0 * params.rows1;
  emulation::run({row_stats_tile_blocks(params), 1, 1}, kRowStatsTileThreads, 0,
                 [&] { row_stats_tile_kernel<T, kCutoff>(params, int(tiles)); });
  emulation::run({rows, 1, 1}, kRowStatsThreads, kRowStatsRowSharedBytes,
                 [&] { row_stats_row_kernel<T, kCutoff>(params, int(tiles)); });
}

template <bool kCutoff>
void run_of_dtype(const RowStatsParams& params) {
  switch (params.dtype) {
    case Dtype::kFloat32: return run<float, kCutoff>(params);
    case Dtype::kFloat16: return run<Float16, kCutoff>(params);
    case Dtype::kBFloat16: return run<Bfloat16, kCutoff>(params);
  }
}

void run_case(const char* folder) {
  Case c(folder);
  RowStatsParams p;
  p.dtype = Dtype(c.integer("dtype"));
  const int64_t size = p.dtype == Dtype::kFloat32 ? 4 : 2;
  p.logits = c.tensor<char>("logits") + c.integer("storage_offset") * size;
  p.rows0 = c.integer("rows0");
  p.rows1 = c.integer("rows1");
  p.vocab = c.integer("vocab");
  p.stride0 = c.integer("stride0");
  p.stride1 = c.integer("stride1");
  p.temperature = c.row_parameter<float>("temperature");
  p.has_stats_temperature = c.has("stats_temperature");
  p.stats_temperature = c.row_parameter<float>("stats_temperature");
  p.softcap = float(c.number("softcap"));
  p.uniform = c.tensor<float>("uniform");
  if (p.uniform == nullptr) {
    p.seed = c.row_parameter<int64_t>("seed");
    p.offset = c.row_parameter<int64_t>("offset");
  }
  const int64_t rows = p.rows0 * p.rows1;
  p.argmax = c.output<int64_t>("argmax", rows);
  p.sample = c.output<int64_t>("sample", rows);
  p.entropy = c.output<float>("entropy", rows);
  p.logsumexp = c.output<float>("logsumexp", rows);
  p.top1_prob = c.output<float>("top1_prob", rows);
  p.top2_prob = c.output<float>("top2_prob", rows);
  p.sample_prob = c.output<float>("sample_prob", rows);
  p.workspace = c.output<char>("workspace", rows * row_stats_tiles(p) * int64_t(sizeof(TileRecord)));
  p.cutoff = c.tensor<float>("cutoff");
  p.cutoff ? run_of_dtype<true>(p) : run_of_dtype<false>(p);
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}
