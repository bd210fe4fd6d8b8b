// Picks the instruction set and runs the host implementation on threads.
#include <algorithm>
#include <stdexcept>

#include "../common/parallel.h"
#include "row_stats.h"
#include "row_stats_host.h"

namespace dgemma {
namespace {

struct InstructionSet {
  const char* name;
  const RowStatsHost* table;
  bool supported;
};

const InstructionSet* instruction_sets(int& count) {
#if defined(__x86_64__)
  static const InstructionSet sets[] = {
      {"avx512", &row_stats_host_avx512,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")},
      {"avx2", &row_stats_host_avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")},
      {"plain", &row_stats_host_plain, true},
  };
#else
  static const InstructionSet sets[] = {{"plain", &row_stats_host_plain, true}};
#endif
  count = int(sizeof sets / sizeof *sets);
  return sets;
}

const RowStatsHost& table_of(const std::string& isa) {
  int count = 0;
  const InstructionSet* sets = instruction_sets(count);
  for (int i = 0; i < count; ++i)
    if (sets[i].supported && (isa.empty() || isa == sets[i].name)) return *sets[i].table;
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

void row_stats_host(const RowStatsParams& params, int threads, const std::string& isa) {
  const RowStatsHost& host = table_of(isa);
  const int64_t tiles = host_tiles(params), rows = params.rows0 * params.rows1;
  // Work is handed out in runs of tiles, long enough that a hand-out costs nothing beside them and short
  // enough that the threads end together.
  const int64_t grain = std::clamp<int64_t>(rows * tiles / (int64_t{threads} * 32 + 1), 1, 64);
  parallel_for(rows * tiles, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) host.tile(params, i / tiles, i % tiles);
  });
  parallel_for(rows, std::clamp<int64_t>(rows / (int64_t{threads} * 4 + 1), 1, 16), threads,
               [&](int64_t first, int64_t last) {
                 for (int64_t row = first; row < last; ++row) host.finish(params, row);
               });
}

}  // namespace dgemma
