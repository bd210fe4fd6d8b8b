// One block decides one row of the batch, a thread per position: the ranking is a bitonic sort of 64-bit keys that
// stay in registers while partners are lanes of one warp and pass through shared memory beyond.
#pragma once

#include "../common/hardware.cuh"
#include "config.h"
#include "rules.h"

namespace dgemma {

// Shared memory of a block of `threads` threads.
struct CommitShared {
  hw::Shared<uint64_t> keys;         // [threads]
  hw::Shared<float> score;           // [threads], by position
  hw::Shared<float> entropy;         // [threads], by position; then by rank
  hw::Shared<int32_t> rank;          // [threads], by position
  hw::Shared<int32_t> run_best;      // [threads], by start of the run
  hw::Shared<double> warp_sums;      // [32]
  hw::Shared<int32_t> warp_values;   // [32]
  hw::Shared<int32_t> warp_values2;  // [32]
  hw::Shared<int32_t> taken;         // [1]

  DGEMMA_MEMBER explicit CommitShared(int threads)
      : keys{0},
        score{uint32_t(threads) * 8},
        entropy{uint32_t(threads) * 12},
        rank{uint32_t(threads) * 16},
        run_best{uint32_t(threads) * 20},
        warp_sums{uint32_t(threads) * 24},
        warp_values{uint32_t(threads) * 24 + 256},
        warp_values2{uint32_t(threads) * 24 + 384},
        taken{uint32_t(threads) * 24 + 512} {}
};

// Ascending: thread r ends with the key of rank r + 1. The number of threads is a power of two.
DGEMMA_DEVICE uint64_t sort_block(uint64_t key, const hw::Shared<uint64_t>& exchange) {
  const int thread = hw::thread_x(), threads = hw::block_threads();
  for (int size = 2; size <= threads; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      uint64_t other;
      if (stride < hw::kWarp) {
        other = hw::shuffle_xor(key, stride);
      } else {
        exchange.store(thread, key);
        hw::sync_block();
        other = exchange.load(thread ^ stride);
        hw::sync_block();
      }
      const bool ascending = (thread & size) == 0, lower = (thread & stride) == 0;
      key = (ascending == lower) == (key < other) ? key : other;
    }
  }
  return key;
}

DGEMMA_DEVICE double sum_block(double value, const hw::Shared<double>& warp_sums) {
  const int thread = hw::thread_x(), warps = hw::block_threads() / hw::kWarp;
  for (int mask = hw::kWarp / 2; mask > 0; mask /= 2) value += hw::shuffle_xor(value, mask);
  if (thread % hw::kWarp == 0) warp_sums.store(thread / hw::kWarp, value);
  hw::sync_block();
  double total = 0;
  for (int w = 0; w < warps; ++w) total += warp_sums.load(w);
  return total;
}

DGEMMA_DEVICE int32_t smallest_of_block(int32_t value, const hw::Shared<int32_t>& per_warp) {
  const int thread = hw::thread_x(), warps = hw::block_threads() / hw::kWarp;
  for (int mask = hw::kWarp / 2; mask > 0; mask /= 2) {
    const int32_t other = hw::shuffle_xor(value, mask);
    if (other < value) value = other;
  }
  if (thread % hw::kWarp == 0) per_warp.store(thread / hw::kWarp, value);
  hw::sync_block();
  for (int w = 0; w < warps; ++w) {
    const int32_t other = per_warp.load(w);
    if (other < value) value = other;
  }
  return value;
}

// The largest value of this thread and those before it.
DGEMMA_DEVICE int32_t largest_so_far(int32_t value, const hw::Shared<int32_t>& per_warp) {
  const int thread = hw::thread_x(), lane = thread % hw::kWarp, warp = thread / hw::kWarp;
  for (int delta = 1; delta < hw::kWarp; delta *= 2) {
    const int32_t before = hw::shuffle_up(value, delta);
    if (lane >= delta && before > value) value = before;
  }
  if (lane == hw::kWarp - 1) per_warp.store(warp, value);
  hw::sync_block();
  for (int w = 0; w < warp; ++w) {
    const int32_t before = per_warp.load(w);
    if (before > value) value = before;
  }
  return value;
}

// Whether this thread's position is the best of its run of adjacent ranked positions.
DGEMMA_DEVICE bool is_best_of_run(bool ranked, int32_t rank, int64_t count, const CommitShared& shared) {
  const int thread = hw::thread_x();
  // A run starts behind the latest position that is not ranked.
  const int32_t start = largest_so_far(ranked ? -1 : thread, shared.warp_values) + 1;
  // Later runs have larger starts, so the largest pair so far is the best rank of the own run so far.
  constexpr int32_t kPair = 2 * int32_t(kCommitMaxLength);
  const int32_t pair = ranked ? start * kPair + kPair - 1 - rank : start * kPair;
  const int32_t best = largest_so_far(pair, shared.warp_values2);
  const bool ends = thread + 1 == hw::block_threads() || shared.rank.load(thread + 1) > count;
  if (ranked && ends) shared.run_best.store(start, kPair - 1 - best % kPair);
  hw::sync_block();
  return ranked && shared.run_best.load(start) == rank;
}

// Leading ranks that kFactor or kEntropyBound take. Thread r holds the key of rank r + 1.
DGEMMA_DEVICE int64_t ranks_taken(const CommitParams& params, const RowRule& rule, uint32_t position, int64_t count,
                                  const CommitShared& shared) {
  const int thread = hw::thread_x();
  if (params.select == Select::kFactor) {
    const bool fails = thread < count && !factor_holds(shared.score.load(int(position)), thread + 1, rule.value);
    const int32_t leading = smallest_of_block(fails ? thread : int32_t(count), shared.warp_values);
    return factor_length(leading, count, params.flags);
  }
  const float own = shared.entropy.load(int(position));
  hw::sync_block();
  shared.entropy.store(thread, own);
  hw::sync_block();
  if (thread == 0) {
    // In order and in fp64, so the sum that meets the bound is the same on every backend.
    double sum = 0;
    int32_t taken = 0;
    for (; taken < count; ++taken) {
      const float next = shared.entropy.load(taken);
      if (!entropy_holds(sum, next, taken + 1, rule.value, params.flags)) break;
      sum += double(next);
    }
    shared.taken.store(0, taken);
  }
  hw::sync_block();
  return shared.taken.load(0);
}

DGEMMA_DEVICE void update_row_state(const CommitParams& params, int64_t b, int64_t position, bool inside,
                                    float entropy, const CommitShared& shared) {
  const int64_t canvas = params.batch * params.length, index = b * params.length + position;
  const bool was_finished = params.finished[b];
  int64_t draft = 0;
  bool differs = false;
  if (inside) {
    draft = was_finished ? params.draft[index] : params.argmax[index];
    params.new_draft[index] = draft;
    for (int64_t s = 0; s < params.depth; ++s) differs = differs || params.history[s * canvas + index] != draft;
    for (int64_t s = 0; s < params.depth; ++s)
      params.new_history[s * canvas + index] = s + 1 < params.depth ? params.history[(s + 1) * canvas + index] : draft;
  }
  bool finished = was_finished;
  if (params.has_confidence) {
    const bool stable = hw::sync_count(differs) == 0;
    const double sum = sum_block(inside ? double(entropy) : 0.0, shared.warp_sums);
    finished = finished || (stable && sum / double(params.length) < double(of_row(params.confidence, 0)));
  }
  if (hw::thread_x() == 0) params.new_finished[b] = finished;
}

DGEMMA_KERNEL commit_kernel(CommitParams params) {
  const int thread = hw::thread_x();
  const int64_t b = hw::block_x(), index = b * params.length + thread;
  const bool inside = thread < params.length;
  const CommitShared shared(hw::block_threads());
  const RowRule rule = row_rule(params, b);

  Candidate c{};
  if (inside) {
    const int64_t row = b * params.length + thread;
    const PhiloxWords words = random_words(of_row(params.seed, 0), of_row(params.offset, 0), row);
    c = read_candidate(params, rule, b, thread, words);
  }
  const int64_t count = hw::sync_count(c.ranked);

  Ranking ranking{0.0f, 0};
  int32_t rank = 0;
  bool best_of_run = false;
  if (params.select != Select::kBernoulli) {
    // Threads beyond the canvas sort behind every position of it.
    const uint64_t key = sort_block(inside ? ranking_key(c.ranked, c.score, thread) : ~uint64_t{0}, shared.keys);
    const uint32_t position = key == ~uint64_t{0} ? uint32_t(thread) : position_of(key);
    shared.score.store(thread, c.score);
    shared.entropy.store(thread, c.entropy);
    shared.rank.store(int(position), thread + 1);
    // The keys are no longer needed; their first slot carries the position of rank 1.
    if (thread == 0) shared.keys.store(0, uint64_t{position});
    hw::sync_block();
    rank = shared.rank.load(thread);
    ranking.best = shared.score.load(int(shared.keys.load(0)));
    if (params.select == Select::kFactor || params.select == Select::kEntropyBound)
      ranking.taken_ranks = ranks_taken(params, rule, position, count, shared);
    if (params.select == Select::kHierarchy) {
      best_of_run = is_best_of_run(c.ranked, rank, count, shared);
    }
  }

  const bool committed = inside && is_committed(params, rule, c, rank, ranking, best_of_run);
  if (inside) {
    params.committed[index] = committed;
    params.new_tokens[index] = written_token(params, c, committed);
  }
  const int num_committed = hw::sync_count(committed);
  if (thread == 0) params.num_committed[b] = num_committed;
  if (params.finished != nullptr) update_row_state(params, b, thread, inside, c.entropy, shared);
}

}  // namespace dgemma
