// Entry points of `row_stats`; see params.h for the arguments.
#pragma once

#include <cstddef>
#include <string>

#include "../params.h"

namespace dgemma {

size_t row_stats_host_workspace(const RowStatsParams& params);
// `statistics` false: argmax and sample alone, NaN in the other outputs; a greedy row then needs no powers.
void row_stats_host(const RowStatsParams& params, int threads, const std::string& isa, bool statistics);

#if defined(DGEMMA_WITH_CUDA)
size_t row_stats_cuda_workspace(const RowStatsParams& params);
void row_stats_cuda(const RowStatsParams& params, void* stream);
#endif

}  // namespace dgemma
