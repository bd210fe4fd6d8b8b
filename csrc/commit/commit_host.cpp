// `commit` on CPU threads, a row of the batch at a time.
#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "commit.h"
#include "rules.h"

namespace dgemma {
namespace {

// Keys of the ranked positions of a row, in the order of the positions or of the ranks.
using Keys = std::vector<uint64_t>;

// Below this many keys a comparison sort is the faster one.
constexpr size_t kLeastForRadix = 64;

// Ascending. The keys come in the order of their positions and a pass over 8 bits keeps the order of equals, so the
// bits of the score are all that has to be looked at.
void sort_by_rank(Keys& keys) {
  if (keys.size() < kLeastForRadix) {
    std::sort(keys.begin(), keys.end());
    return;
  }
  constexpr int kPasses = 4, kFirstBit = 31;
  uint32_t counts[kPasses][256] = {};
  for (const uint64_t key : keys)
    for (int pass = 0; pass < kPasses; ++pass) ++counts[pass][(key >> (kFirstBit + 8 * pass)) & 255];
  Keys other(keys.size());
  for (int pass = 0; pass < kPasses; ++pass) {
    const int shift = kFirstBit + 8 * pass;
    if (counts[pass][(keys[0] >> shift) & 255] == keys.size()) continue;
    uint32_t start = 0;
    for (uint32_t& count : counts[pass]) {
      const uint32_t end = start + count;
      count = start;
      start = end;
    }
    for (const uint64_t key : keys) other[counts[pass][(key >> shift) & 255]++] = key;
    keys.swap(other);
  }
}

// Of the highest score among each run of adjacent ranked positions.
void mark_best_of_runs(const Keys& keys, std::vector<char>& best_of_run) {
  for (size_t start = 0; start < keys.size();) {
    size_t best = start, end = start;
    for (; end < keys.size() && position_of(keys[end]) == position_of(keys[start]) + (end - start); ++end)
      if (keys[end] < keys[best]) best = end;
    best_of_run[position_of(keys[best])] = 1;
    start = end;
  }
}

// kFactor and kEntropyBound; the keys in the order of the ranks.
int64_t taken_ranks(const CommitParams& params, const RowRule& rule, const std::vector<Candidate>& row,
                    const Keys& keys) {
  const int64_t count = int64_t(keys.size());
  int64_t taken = 0;
  if (params.select == Select::kFactor) {
    while (taken < count && factor_holds(row[position_of(keys[taken])].score, taken + 1, rule.value)) ++taken;
    return factor_length(taken, count, params.flags);
  }
  double sum = 0;
  for (; taken < count; ++taken) {
    const float own = row[position_of(keys[taken])].entropy;
    if (!entropy_holds(sum, own, taken + 1, rule.value, params.flags)) break;
    sum += double(own);
  }
  return taken;
}

void update_state(const CommitParams& params, int64_t b, const std::vector<Candidate>& row) {
  const int64_t length = params.length, canvas = params.batch * length, start = b * length;
  const bool was_finished = params.finished[b];
  const int64_t* draft = (was_finished ? params.draft : params.argmax) + start;
  bool finished = was_finished;
  if (params.has_confidence) {
    bool stable = true;
    for (int64_t s = 0; s < params.depth; ++s)
      stable = stable && std::equal(draft, draft + length, params.history + s * canvas + start);
    double sum = 0;
    for (const Candidate& c : row) sum += double(c.entropy);
    finished = finished || (stable && sum / double(length) < double(of_row(params.confidence, 0)));
  }
  std::copy(draft, draft + length, params.new_draft + start);
  for (int64_t s = 0; s < params.depth; ++s) {
    const int64_t* source = s + 1 < params.depth ? params.history + (s + 1) * canvas + start : draft;
    std::copy(source, source + length, params.new_history + s * canvas + start);
  }
  params.new_finished[b] = finished;
}

void commit_row(const CommitParams& params, int64_t b) {
  const int64_t length = params.length;
  const RowRule rule = row_rule(params, b);
  const bool drawn = rule_draws(params), was_finished = params.finished != nullptr && params.finished[b];
  const int64_t seed = of_row(params.seed, 0), offset = of_row(params.offset, 0);
  const auto words_of = [=](int64_t i) { return random_words(seed, offset, b * length + i); };
  std::vector<Candidate> row(length);
  Keys keys;
  keys.reserve(length);
  for (int64_t i = 0; i < length; ++i) {
    row[i] = candidate_of(params, read_position(params, b * length + i), i, was_finished);
    if (drawn) add_draws(params, rule, words_of(i), row[i]);
    if (row[i].ranked) keys.push_back(ranking_key(true, row[i].score, uint32_t(i)));
  }

  // Ranks are exact where the selection goes through them in order; for the others it is enough which are among the k
  // best, and those have the ranks 1 to k in any order.
  std::vector<int64_t> rank(length, length + 1);
  std::vector<char> best_of_run(length, 0);
  Ranking ranking{0, 0};
  if (params.select != Select::kBernoulli && !keys.empty()) {
    if (params.flags & kRelative) ranking.best = row[position_of(*std::min_element(keys.begin(), keys.end()))].score;
    if (params.select == Select::kHierarchy) mark_best_of_runs(keys, best_of_run);
    int64_t ranked = int64_t(keys.size());
    if (params.select == Select::kFactor || params.select == Select::kEntropyBound) {
      sort_by_rank(keys);
      ranked = ranking.taken_ranks = taken_ranks(params, rule, row, keys);
    } else if (rule.k < ranked) {
      ranked = std::max<int64_t>(rule.k, 0);
      if (ranked > 0) std::nth_element(keys.begin(), keys.begin() + (ranked - 1), keys.end());
    }
    for (int64_t r = 0; r < ranked; ++r) rank[position_of(keys[r])] = r + 1;
  }

  int64_t num_committed = 0;
  for (int64_t i = 0; i < length; ++i) {
    const bool committed = is_committed(params, rule, row[i], rank[i], ranking, best_of_run[i]);
    if (!drawn && !committed && params.write == Write::kRenoise) row[i].words = words_of(i);
    params.committed[b * length + i] = committed;
    params.new_tokens[b * length + i] = committed ? row[i].sample : rest_token(params, row[i]);
    num_committed += committed;
  }
  params.num_committed[b] = num_committed;
  if (params.finished != nullptr) update_state(params, b, row);
}

}  // namespace

void commit_host(const CommitParams& params, int threads) {
  // Fewer positions than this are done sooner than another thread wakes up on a busy machine.
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, params.length));
  parallel_for(params.batch, grain, threads, [&](int64_t first, int64_t last) {
    for (int64_t b = first; b < last; ++b) commit_row(params, b);
  });
}

}  // namespace dgemma
