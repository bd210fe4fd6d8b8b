// Picks the instruction set and runs the host implementation on threads.
#include <algorithm>
#include <atomic>
#include <memory>

#include "../common/instruction_sets.h"
#include "../common/parallel.h"
#include "row_stats.h"
#include "row_stats_host.h"

namespace dgemma {
namespace {

constexpr int64_t kLeastLogits = 16384;

const RowStatsHost& table_of(InstructionSet set, bool cutoff) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return row_stats_host_avx512[cutoff];
  if (set == InstructionSet::kAvx2) return row_stats_host_avx2[cutoff];
#endif
  (void)set;
  return row_stats_host_plain[cutoff];
}

}  // namespace

size_t row_stats_host_workspace(const RowStatsParams& params) {
  return size_t(params.rows0 * params.rows1 * host_tiles(params)) * sizeof(TileStatistics);
}

void row_stats_host(const RowStatsParams& params, int threads, const std::string& isa, bool statistics) {
  const RowStatsHost& host = table_of(instruction_set("row_stats", isa), params.cutoff != nullptr);
  const int64_t segments = host_segments(params), rows = params.rows0 * params.rows1;
  // A row is finished by whoever ends its last segment, so the threads meet once.
  std::unique_ptr<std::atomic<int64_t>[]> left(new std::atomic<int64_t>[size_t(rows)]);
  for (int64_t row = 0; row < rows; ++row) left[row].store(segments, std::memory_order_relaxed);
  // A hand-out is long enough to cost nothing beside its work, and short enough that the threads end together.
  const int64_t even = std::clamp<int64_t>(rows * segments / (int64_t{threads} * 32 + 1), 1, 8);
  // Fewer logits than this are done sooner than another thread wakes up.
  const int64_t least = kLeastLogits * segments / std::max<int64_t>(params.vocab, 1);
  const int64_t grain = std::max(even, least);
  parallel_for(rows * segments, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t row = i / segments;
      host.segment(params, statistics, row, i % segments);
      if (left[row].fetch_sub(1, std::memory_order_acq_rel) == 1) host.finish(params, statistics, row);
    }
  });
}

}  // namespace dgemma
