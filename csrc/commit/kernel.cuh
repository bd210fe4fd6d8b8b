// One block decides one row of the batch, a thread per position. A warp ranks its own 32 keys by comparing them with
// one another; sorted runs then merge by binary search, 8 of them at a time.
#pragma once

#include "../common/device/qualifiers.cuh"
#include "../common/device/warp_sum.cuh"
#include "../common/hardware.cuh"
#include "config.h"
#include "rules.h"

namespace dgemma {

template <int kThreads>
struct CommitBlock {
  static constexpr int kWarps = kThreads / hw::kWarp;

  DGEMMA_DEVICE_MEMBER static int thread() { return hw::thread_x(); }
  DGEMMA_DEVICE_MEMBER static int lane() { return int(uint32_t(hw::thread_x()) % hw::kWarp); }
  DGEMMA_DEVICE_MEMBER static int warp() { return int(uint32_t(hw::thread_x()) / hw::kWarp); }

  // Shared memory: values per thread, which is a rank for `entropy` and otherwise a position, and values per warp.
  template <class T>
  using Shared = hw::Shared<T>;
  DGEMMA_DEVICE_MEMBER static Shared<double> entropy() { return {0}; }
  DGEMMA_DEVICE_MEMBER static Shared<uint32_t> keys() { return {kThreads * 8}; }
  DGEMMA_DEVICE_MEMBER static Shared<hw::Words4> four_keys() { return {kThreads * 8}; }
  DGEMMA_DEVICE_MEMBER static Shared<uint32_t> runs() { return {kThreads * 12}; }
  DGEMMA_DEVICE_MEMBER static Shared<int32_t> rank() { return {kThreads * 16}; }
  DGEMMA_DEVICE_MEMBER static Shared<int32_t> run_best() { return {kThreads * 20}; }  // by the run's start
  DGEMMA_DEVICE_MEMBER static Shared<double> warp_sums() { return {kThreads * 24}; }
  DGEMMA_DEVICE_MEMBER static Shared<uint32_t> warp_smallest() { return {kThreads * 24 + 256}; }
  DGEMMA_DEVICE_MEMBER static Shared<int32_t> warp_starts() { return {kThreads * 24 + 256}; }
  DGEMMA_DEVICE_MEMBER static Shared<int32_t> warp_bests() { return {kThreads * 24 + 384}; }
  DGEMMA_DEVICE_MEMBER static Shared<int32_t> taken() { return {kThreads * 24 + 512}; }  // one number
};

// The ranking of a row as one thread sees it.
struct Place {
  int rank;   // of the own position, 0-based; those that are not ranked come last
  int count;  // positions that are ranked
};

// How many keys of the other runs among `kRuns` neighbours come before this one; each has `kRun` ascending keys.
template <int kRun, int kRuns>
DGEMMA_DEVICE int keys_before(uint32_t key, const hw::Shared<uint32_t>& runs) {
  const int run = int(uint32_t(hw::thread_x()) / kRun);
  hw::Shared<uint32_t> rest[kRuns];  // of a run: what is not known to come before
  uint32_t bound[kRuns], bytes = 0;
  DGEMMA_UNROLL
  for (int i = 1; i < kRuns; ++i) {
    rest[i].offset = runs.offset + uint32_t(run ^ i) * (kRun * 4);
    bytes -= rest[i].offset;
    // A key of an earlier run comes before its equals, and i's highest bit says whether it is one.
    bound[i] = key + (i < 2 ? run & 1 : i < 4 ? run >> 1 & 1 : run >> 2 & 1);
  }
  DGEMMA_UNROLL
  for (int step = kRun / 2; step > 0; step /= 2) {
    DGEMMA_UNROLL
    for (int i = 1; i < kRuns; ++i)
      if (rest[i].load(step - 1) < bound[i]) rest[i].offset += uint32_t(step) * 4;
  }
  DGEMMA_UNROLL
  for (int i = 1; i < kRuns; ++i) bytes += rest[i].offset + (rest[i].load(0) < bound[i] ? 4 : 0);
  return int(bytes / 4);
}

template <int kThreads>
DGEMMA_DEVICE Place place_of(bool ranked, uint32_t key) {
  using Block = CommitBlock<kThreads>;
  constexpr int kRuns = Block::kWarps < 8 ? Block::kWarps : 8;
  const int thread = Block::thread(), lane = Block::lane();
  Block::keys().store(thread, key);
  hw::sync_warp();
  int rank = hw::count_bits(hw::lanes_equal(key) & ((1u << lane) - 1)), smaller[4] = {};
  DGEMMA_UNROLL
  for (int i = 0; i < hw::kWarp / 4; ++i) {
    const hw::Words4 four = Block::four_keys().load(Block::warp() * (hw::kWarp / 4) + i);
    DGEMMA_UNROLL
    for (int j = 0; j < 4; ++j)
      if (four.word[j] < key) smaller[j] += 4;
  }
  rank += ((smaller[0] + smaller[1]) + (smaller[2] + smaller[3])) / 4;
  if constexpr (kRuns == 1) return {rank, hw::count_bits(hw::ballot(ranked))};
  Block::runs().store(thread - lane + rank, key);
  const int count = hw::sync_count(ranked);
  rank += keys_before<hw::kWarp, kRuns>(key, Block::runs());
  constexpr int kMerged = hw::kWarp * kRuns;
  if constexpr (kMerged < kThreads) {
    Block::keys().store(thread / kMerged * kMerged + rank, key);
    hw::sync_block();
    rank += keys_before<kMerged, kThreads / kMerged>(key, Block::keys());
  }
  return {rank, count};
}

template <int kThreads>
DGEMMA_DEVICE uint32_t smallest_of_block(uint32_t value) {
  using Block = CommitBlock<kThreads>;
  const uint32_t of_warp = hw::smallest_of_warp(value);
  if (Block::lane() == 0) Block::warp_smallest().store(Block::warp(), of_warp);
  hw::sync_block();
  return hw::smallest_of_warp(Block::warp_smallest().load(Block::lane() % Block::kWarps));
}

// The key of rank 1, and whether it is this thread's.
struct First {
  uint32_t key;
  bool own;
};

template <int kThreads>
DGEMMA_DEVICE First first_of_block(uint32_t key) {
  using Block = CommitBlock<kThreads>;
  const uint32_t of_warp = hw::smallest_of_warp(key);
  const int lane = hw::find_first_set(hw::ballot(key == of_warp)) - 1;
  if (Block::lane() == 0) Block::warp_smallest().store(Block::warp(), of_warp);
  hw::sync_block();
  const uint32_t theirs = Block::warp_smallest().load(Block::lane() % Block::kWarps);
  const uint32_t smallest = hw::smallest_of_warp(theirs);
  const int warp = hw::find_first_set(hw::ballot(theirs == smallest)) - 1;
  return {smallest, Block::thread() == warp * hw::kWarp + lane};
}

template <int kThreads>
DGEMMA_DEVICE double sum_of_block(double value) {
  using Block = CommitBlock<kThreads>;
  value = sum_of_warp(value);
  if (Block::lane() == 0) Block::warp_sums().store(Block::warp(), value);
  hw::sync_block();
  double total = 0;
  for (int w = 0; w < Block::kWarps; ++w) total += Block::warp_sums().load(w);
  return total;
}

// The largest value of this thread and those before it.
template <int kThreads>
DGEMMA_DEVICE int32_t largest_so_far(int32_t value, const hw::Shared<int32_t>& per_warp) {
  using Block = CommitBlock<kThreads>;
  for (int delta = 1; delta < hw::kWarp; delta *= 2) {
    const int32_t before = hw::shuffle_up(value, delta);
    if (Block::lane() >= delta && before > value) value = before;
  }
  if (Block::lane() == hw::kWarp - 1) per_warp.store(Block::warp(), value);
  hw::sync_block();
  DGEMMA_NO_UNROLL
  for (int w = 0; w < Block::warp(); ++w) {
    const int32_t before = per_warp.load(w);
    if (before > value) value = before;
  }
  return value;
}

// Whether this thread's position is the best of its run of adjacent ranked positions.
template <int kThreads>
DGEMMA_DEVICE bool is_best_of_run(bool ranked, const Place& place) {
  using Block = CommitBlock<kThreads>;
  const int thread = Block::thread();
  Block::rank().store(thread, place.rank);
  // A run starts behind the latest position that is not ranked.
  const int32_t start = largest_so_far<kThreads>(ranked ? -1 : thread, Block::warp_starts()) + 1;
  // Later runs have larger starts, so the largest pair so far is the best rank of the own run so far.
  constexpr int32_t kPair = 2 * int32_t(kCommitMaxLength);
  const int32_t pair = ranked ? start * kPair + kPair - 1 - place.rank : start * kPair;
  const int32_t best = largest_so_far<kThreads>(pair, Block::warp_bests());
  const bool ends = thread + 1 == kThreads || Block::rank().load(thread + 1) >= place.count;
  if (ranked && ends) Block::run_best().store(start, kPair - 1 - best % kPair);
  hw::sync_block();
  return ranked && Block::run_best().load(start) == place.rank;
}

// What the entropies of a row, by rank, amount to.
struct EntropyRun {
  int taken;     // leading ranks that kEntropyBound takes
  int64_t rest;  // what the own position holds if it is not committed
  bool stops;    // the row; of the last thread
};

// In order and in fp64, so the sum that meets the bound is the same on every backend.
template <int kThreads>
DGEMMA_DEVICE int taken_in_order(const CommitParams& params, const RowRule& rule, int count) {
  using Block = CommitBlock<kThreads>;
  if (Block::thread() == 0) {
    double sum = 0;
    int taken = 0;
    DGEMMA_NO_UNROLL
    for (; taken < count; ++taken) {
      const double next = Block::entropy().load(taken);
      if (!entropy_holds(sum, next, taken + 1, rule.value, params.flags)) break;
      sum += next;
    }
    Block::taken().store(0, taken);
  }
  hw::sync_block();
  return Block::taken().load(0);
}

// sum / length < limit. The product is exact, so only right below it rounding of the quotient could matter.
DGEMMA_DEVICE bool mean_is_below(double sum, int64_t length, float limit) {
  const double product = double(limit) * double(int(length));
  return sum < product && (sum < product * (1 - 0x1p-50) || sum / double(int(length)) < double(limit));
}

// Decides by sums that are added in another order where none is so close to the bound that the order could matter.
// What else a position needs is worked out in the time in which the sums wait for one another.
template <int kThreads>
DGEMMA_DEVICE EntropyRun add_entropies(const CommitParams& params, const RowRule& rule, const Place& place,
                                       Candidate c, bool differs, float confidence, int64_t seed, int64_t offset,
                                       int64_t row) {
  using Block = CommitBlock<kThreads>;
  const int rank = Block::thread(), lane = Block::lane(), warp = Block::warp();
  Block::entropy().store(place.rank, double(c.entropy));
  const bool all_agree = hw::sync_count(differs) == 0;

  const double own = Block::entropy().load(rank);
  double sum = own;
  c.words = random_words(seed, offset, row);
  // As `rest_token` has it, without a branch, around which nothing could be done meanwhile.
  const int64_t drawn = below(c.words.word[kWordRenoiseHigh], c.words.word[kWordRenoiseLow], params.write_argument);
  const int64_t written = params.write == Write::kRemask ? params.write_argument : drawn;
  const int64_t rest = !c.eligible | (params.write == Write::kKeep) ? c.token : written;
  DGEMMA_UNROLL
  for (int delta = 1; delta < hw::kWarp; delta *= 2) {
    const double left = hw::shuffle_up(sum, delta);
    if (lane >= delta) sum += left;
  }
  double before = hw::shuffle_up(sum, 1);
  if (lane == 0) before = 0;
  if constexpr (Block::kWarps > 1) {
    if (lane == hw::kWarp - 1) Block::warp_sums().store(warp, sum);
    hw::sync_block();
    double even = 0, odd = 0;
    DGEMMA_UNROLL
    for (int w = 0; w < Block::kWarps; w += 2) {
      const double first = Block::warp_sums().load(w), second = Block::warp_sums().load(w + 1);
      if (w < warp) even += first;
      if (w + 1 < warp) odd += second;
    }
    before += even + odd;
    sum += even + odd;
  }

  // Sums of n numbers that are not negative differ by less than this part of them, whatever the order.
  constexpr double kSpread = 4 * kThreads * 0x1p-53;
  const double bound = double(rule.value);
  bool holds, fails;
  if (params.flags & kInclusive) {
    holds = rank == 0 || sum * (1 + kSpread) < bound;
    fails = sum * (1 - kSpread) >= bound;
  } else {
    holds = before * (1 + kSpread) <= bound;
    fails = before * (1 - kSpread) > bound;
  }
  const bool unsure = rank < place.count && (!(holds || fails) || !(own >= 0));
  const bool may_stop = rank == kThreads - 1 && params.has_confidence && all_agree;
  const bool stops = may_stop && mean_is_below(sum, params.length, confidence);
  int taken = hw::sync_count(rank < place.count && holds);
  if (hw::sync_count(unsure) != 0) taken = taken_in_order<kThreads>(params, rule, place.count);
  return {taken, rest, stops};
}

// What is read of a position's state: with one canvas of history, which is usual, there is nothing behind it.
struct State {
  int64_t argmax, draft, oldest;
};

DGEMMA_DEVICE State read_state(const CommitParams& params, int64_t index) {
  return {params.argmax[index], params.draft[index], params.depth > 0 ? params.history[index] : 0};
}

// Stores the new draft and the history with it; whether it differs from a canvas of the history.
DGEMMA_DEVICE bool push_draft(const CommitParams& params, int64_t index, int64_t oldest, int64_t draft) {
  params.new_draft[index] = draft;
  if (params.depth == 0) return false;
  const int64_t canvas = params.batch * params.length;
  bool differs = oldest != draft;
  int64_t at = index;
  DGEMMA_NO_UNROLL
  for (int64_t s = 1; s < params.depth; ++s, at += canvas) {
    const int64_t next = params.history[at + canvas];
    differs |= next != draft;
    params.new_history[at] = next;
  }
  params.new_history[at] = draft;
  return differs;
}

template <int kThreads, CommitKind kKind>
DGEMMA_KERNEL DGEMMA_BOUNDS(kThreads, 1) commit_kernel(const CommitParams given) {
  using Block = CommitBlock<kThreads>;
  CommitParams params = given;
  if constexpr (kKind == CommitKind::kEntropyBound) {
    params.select = Select::kEntropyBound;
    params.measure = Measure::kEntropy;
    params.flags &= kInclusive;
  } else if constexpr (kKind == CommitKind::kThreshold) {
    params.select = Select::kThreshold;
    params.flags &= kStrict | kRelative;
  }
  const int thread = Block::thread();
  const int64_t b = hw::block_x(), index = b * params.length + thread;
  const bool inside = thread < int(params.length), has_state = params.finished != nullptr;
  const bool ranks_entropy = params.select == Select::kEntropyBound;

  const int64_t seed = of_row(params.seed, 0), offset = of_row(params.offset, 0);
  const uint8_t finished = has_state ? byte_of(params.finished + b) : 0;
  Position position{};
  State state{};
  if (inside) {
    position = read_position(params, index);
    if (has_state) state = read_state(params, index);
  }
  const RowRule rule = row_rule(params, b);
  const float confidence = params.has_confidence ? of_row(params.confidence, 0) : 0.0f;
  const bool was_finished = finished != 0;

  Candidate c = candidate_of(params, position, thread, was_finished);
  c.eligible = c.eligible && inside;
  c.ranked = c.ranked && inside;
  if ((kKind == CommitKind::kAny && rule_draws(params)) || (params.write == Write::kRenoise && !ranks_entropy))
    add_draws(params, rule, random_words(seed, offset, index), c);

  Ranking ranking{0.0f, 0};
  Place place{1, 0};
  const uint32_t key = descending_key(c.ranked, c.score);
  const bool in_order = needs_ranks(params, rule);
  if ((params.flags & kRelative) || (!in_order && rule.k == 1)) {
    const First first = first_of_block<kThreads>(key);
    ranking.best = score_of(first.key);
    place.rank = first.own ? 0 : 1;
  }
  if (in_order) place = place_of<kThreads>(c.ranked, key);

  bool differs = false, stops = false;
  if (has_state && inside)
    differs = push_draft(params, index, state.oldest, was_finished ? state.draft : state.argmax);

  bool committed = false;
  int num_committed;
  int64_t rest;
  if (ranks_entropy) {
    const EntropyRun run =
        add_entropies<kThreads>(params, rule, place, c, differs, confidence, seed, offset, index);
    committed = c.ranked && place.rank < run.taken;
    num_committed = run.taken;
    rest = run.rest;
    stops = run.stops;
  } else {
    bool best_of_run = false;
    if (params.select == Select::kFactor) {
      const bool fails = c.ranked && !factor_holds(c.score, place.rank + 1, rule.value);
      const uint32_t leading = smallest_of_block<kThreads>(uint32_t(fails ? place.rank : place.count));
      ranking.taken_ranks = factor_length(leading, place.count, params.flags);
    } else if (params.select == Select::kHierarchy) {
      best_of_run = is_best_of_run<kThreads>(c.ranked, place);
    }
    committed = is_committed(params, rule, c, place.rank + 1, ranking, best_of_run);
    rest = rest_token(params, c);
  }

  if (inside) {
    params.committed[index] = committed;
    params.new_tokens[index] = committed ? c.sample : rest;
  }
  if (!ranks_entropy) num_committed = hw::sync_count(committed);
  if (thread == 0) params.num_committed[b] = num_committed;
  if (!has_state) return;
  if (params.has_confidence && !ranks_entropy) {
    const double sum = sum_of_block<kThreads>(double(c.entropy));
    stops = hw::sync_count(differs) == 0 && mean_is_below(sum, params.length, confidence);
  }
  if (thread == kThreads - 1) params.new_finished[b] = was_finished || stops;
}

}  // namespace dgemma
