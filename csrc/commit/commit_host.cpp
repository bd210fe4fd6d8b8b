// `commit` on CPU threads, a row of the batch at a time.
#include <algorithm>
#include <vector>

#include "../common/parallel.h"
#include "commit.h"
#include "rules.h"

namespace dgemma {
namespace {

void mark_best_of_runs(const std::vector<Candidate>& row, const std::vector<int64_t>& rank,
                       std::vector<char>& best_of_run) {
  const size_t length = row.size();
  for (size_t start = 0; start < length; ++start) {
    if (!row[start].ranked) continue;
    size_t best = start, end = start;
    for (; end < length && row[end].ranked; ++end)
      if (rank[end] < rank[best]) best = end;
    best_of_run[best] = 1;
    start = end - 1;
  }
}

int64_t taken_ranks(const CommitParams& params, const RowRule& rule, const std::vector<Candidate>& row,
                    const std::vector<uint64_t>& keys, int64_t count) {
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
  std::vector<Candidate> row(length);
  std::vector<uint64_t> keys(length);
  int64_t count = 0;
  for (int64_t i = 0; i < length; ++i) {
    row[i] = read_candidate(params, rule, b, i);
    keys[i] = ranking_key(row[i].ranked, row[i].score, uint32_t(i));
    count += row[i].ranked;
  }

  std::vector<int64_t> rank(length, 0);
  std::vector<char> best_of_run(length, 0);
  Ranking ranking{0, 0};
  if (params.select != Select::kBernoulli) {
    std::sort(keys.begin(), keys.end());
    for (int64_t r = 0; r < length; ++r) rank[position_of(keys[r])] = r + 1;
    if (count > 0) ranking.best = row[position_of(keys[0])].score;
    if (params.select == Select::kFactor || params.select == Select::kEntropyBound)
      ranking.taken_ranks = taken_ranks(params, rule, row, keys, count);
    if (params.select == Select::kHierarchy) mark_best_of_runs(row, rank, best_of_run);
  }

  int64_t num_committed = 0;
  for (int64_t i = 0; i < length; ++i) {
    const bool committed = is_committed(params, rule, row[i], rank[i], ranking, best_of_run[i]);
    params.committed[b * length + i] = committed;
    params.new_tokens[b * length + i] = written_token(params, row[i], committed);
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
