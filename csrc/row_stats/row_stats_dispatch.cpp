// Picks the instruction set and runs the host implementation on threads.
#include <algorithm>
#include <atomic>
#include <memory>
#include <stdexcept>

#include "../common/parallel.h"
#include "row_stats.h"
#include "row_stats_host.h"

namespace dgemma {
namespace {

constexpr int64_t kLeastLogits = 16384;

struct InstructionSet {
  const char* name;
  const RowStatsHost* table;
  bool supported;
};

const InstructionSet* instruction_sets(int& count) {
#if defined(__x86_64__)
  static const InstructionSet sets[] = {
      {"avx512", row_stats_host_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {"avx2", row_stats_host_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"plain", row_stats_host_plain, true},
  };
#else
  static const InstructionSet sets[] = {{"plain", row_stats_host_plain, true}};
#endif
  count = int(sizeof sets / sizeof *sets);
  return sets;
}

const RowStatsHost& table_of(const std::string& isa, bool cutoff) {
  int count = 0;
  const InstructionSet* sets = instruction_sets(count);
  for (int i = 0; i < count; ++i)
    if (sets[i].supported && (isa.empty() || isa == sets[i].name)) return sets[i].table[cutoff];
  throw std::invalid_argument("row_stats: instruction set '" + isa + "' is not among those of this CPU (" +
                              host_instruction_sets() + ")");
}

}  // namespace

std::string host_instruction_sets() {
  int count = 0;
  const InstructionSet* sets = instruction_sets(count);
  std::string names;
  for (int i = 0; i < count; ++i) {
    if (!sets[i].supported) continue;
    if (!names.empty()) names += ' ';
    names += sets[i].name;
  }
  return names;
}

size_t row_stats_host_workspace(const RowStatsParams& params) {
  return size_t(params.rows0 * params.rows1 * host_tiles(params)) * sizeof(TileStatistics);
}

void row_stats_host(const RowStatsParams& params, int threads, const std::string& isa, bool statistics) {
  const RowStatsHost& host = table_of(isa, params.cutoff != nullptr);
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
