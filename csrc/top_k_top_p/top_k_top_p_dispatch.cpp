// Picks the instruction set and runs the host implementation on threads.
#include <algorithm>
#include <memory>
#include <mutex>
#include <vector>

#include "../common/instruction_sets.h"
#include "../common/parallel.h"
#include "top_k_top_p.h"
#include "top_k_top_p_host.h"

namespace dgemma {
namespace {

// Fewer logits than this are done sooner than another thread wakes up.
constexpr int64_t kLeastLogits = 16384;

const TopKTopPHost& table_of(InstructionSet set) {
#if defined(__x86_64__)
  if (set == InstructionSet::kAvx512) return top_k_top_p_host_avx512;
  if (set == InstructionSet::kAvx2) return top_k_top_p_host_avx2;
#endif
  (void)set;
  return top_k_top_p_host_plain;
}

}  // namespace

void top_k_top_p_host(const TopKTopPParams& params, int threads, const std::string& isa) {
  const TopKTopPHost& host = table_of(instruction_set("top_k_top_p", isa));
  const int64_t rows = params.rows0 * params.rows1;
  const int64_t grain = kLeastLogits / std::max<int64_t>(params.vocab, 1) + 1;
  const int64_t most = std::clamp<int64_t>((rows + grain - 1) / grain, 1, std::max(threads, 1));
  // One scratch for each thread, handed from range to range. Only the pages that a row touches are ever there.
  const int64_t each = host_scratch(params.vocab);
  std::unique_ptr<float[]> scratch(new float[size_t(most * each)]);
  std::vector<float*> free;
  for (int64_t i = 0; i < most; ++i) free.push_back(scratch.get() + i * each);
  std::mutex mutex;
  parallel_for(rows, grain, int(most), [&](int64_t first, int64_t last) {
    std::unique_lock<std::mutex> lock(mutex);
    float* own = free.back();
    free.pop_back();
    lock.unlock();
    for (int64_t row = first; row < last; ++row) host.row(params, row, own);
    lock.lock();
    free.push_back(own);
  });
}

}  // namespace dgemma
