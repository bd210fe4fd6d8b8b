#include <stdexcept>

#include "../common/cuda_check.h"
#include "kernel.cuh"
#include "row_stats.h"

namespace dgemma {
namespace {

template <class T, bool kCutoff>
void launch_both(const RowStatsParams& params, void* stream) {
  const int64_t rows = params.rows0 * params.rows1, tiles = row_stats_tiles(params);
  if (rows * tiles > 0x7fffffff) throw std::runtime_error("row_stats: more than 2^31 - 1 tiles of logits");
  launch("row_stats", row_stats_tile_kernel<T, kCutoff>, dim3(unsigned(row_stats_tile_blocks(params))),
         kRowStatsTileThreads, 0, stream, params, int(tiles));
  launch("row_stats", row_stats_row_kernel<T, kCutoff>, dim3(unsigned(rows)), kRowStatsThreads, kRowStatsRowSharedBytes,
         stream, params, int(tiles));
}

template <bool kCutoff>
void launch_of_dtype(const RowStatsParams& params, void* stream) {
  switch (params.dtype) {
    case Dtype::kFloat32: return launch_both<float, kCutoff>(params, stream);
    case Dtype::kFloat16: return launch_both<Float16, kCutoff>(params, stream);
    case Dtype::kBFloat16: return launch_both<Bfloat16, kCutoff>(params, stream);
  }
}

}  // namespace

size_t row_stats_cuda_workspace(const RowStatsParams& params) {
  return size_t(params.rows0 * params.rows1 * row_stats_tiles(params)) * sizeof(TileRecord);
}

void row_stats_cuda(const RowStatsParams& params, void* stream) {
  return params.cutoff ? launch_of_dtype<true>(params, stream) : launch_of_dtype<false>(params, stream);
}

}  // namespace dgemma
