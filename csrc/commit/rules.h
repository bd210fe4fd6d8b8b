// The arithmetic of one position in `commit`: its score, and whether its rank is taken.
#pragma once

#include <math.h>

#include "../common/ordering.h"
#include "../common/philox.h"
#include "../params.h"

namespace dgemma {

// The numbers of the rule for one row of the batch.
struct RowRule {
  int64_t k;
  float value, value2;
};

DGEMMA_HD RowRule row_rule(const CommitParams& params, int64_t b) {
  return {of_row(params.k, b), of_row(params.value, b), of_row(params.value2, b)};
}

// One position of the canvas, before ranking.
struct Candidate {
  PhiloxWords words;
  int64_t token, sample;
  float score, draw, entropy;
  bool eligible;  // a candidate of an unfinished row
  bool ranked;    // takes part in the ranking; for kEdit only those that hold the mask token
};

DGEMMA_HD float gumbel(uint32_t word) {
  // Half a step away from 0, so that both logarithms are finite.
  const double uniform = (double(word >> 8) + 0.5) * 0x1p-24;
  return float(-log(-log(uniform)));
}

// Whether the rule itself reads words; a write reads those of positions that are not committed.
DGEMMA_HD bool rule_draws(const CommitParams& params) {
  return params.measure == Measure::kRandom || params.select == Select::kBernoulli || (params.flags & kGumbel);
}

// What is read of a position, as it lies in memory. No value decides what else is read, so a GPU has every load under
// way at once.
struct Position {
  int64_t token, sample;
  float entropy, measured, second;
  uint8_t candidate;
};

// A flag as its byte: a compiler asks of a bool what it is where it is loaded, and so waits for it.
DGEMMA_HD uint8_t byte_of(const bool* flag) { return *reinterpret_cast<const uint8_t*>(flag); }

DGEMMA_HD Position read_position(const CommitParams& params, int64_t index) {
  const bool margin = params.measure == Measure::kMargin;
  const float* measured = params.measure == Measure::kSampleProb            ? params.sample_prob
                          : margin || params.measure == Measure::kTop1Prob ? params.top1_prob
                                                                           : params.entropy;
  Position p;
  p.measured = measured[index];
  p.entropy = params.entropy[index];
  p.second = margin ? params.top2_prob[index] : 0.0f;
  p.candidate = params.candidates != nullptr ? byte_of(params.candidates + index) : 1;
  p.token = params.tokens[index];
  p.sample = params.sample[index];
  return p;
}

DGEMMA_HD Candidate candidate_of(const CommitParams& params, const Position& p, int64_t position, bool row_finished) {
  Candidate c{};
  c.token = p.token;
  c.sample = p.sample;
  c.entropy = p.entropy;
  c.score = params.measure == Measure::kEntropy    ? -p.entropy
            : params.measure == Measure::kPosition ? -float(position)
                                                   : p.measured - p.second;  // x - 0 is x
  c.eligible = p.candidate != 0 && !row_finished;
  c.ranked = c.eligible && (params.select != Select::kEdit || c.token == params.mask_id);
  return c;
}

// For a rule that draws: `words` are those of the position.
DGEMMA_HD void add_draws(const CommitParams& params, const RowRule& rule, const PhiloxWords& words, Candidate& c) {
  c.words = words;
  c.draw = uniform_from_word(words.word[kWordSelect]);
  if (params.measure == Measure::kRandom) c.score = c.draw;
  if (__builtin_expect(params.flags & kGumbel, 0))
    c.score = c.score / rule.value2 + gumbel(words.word[kWordSelect]);
}

// What the ranking of a row says as a whole.
struct Ranking {
  float best;          // score of rank 1
  int64_t taken_ranks; // kFactor and kEntropyBound: ranks 1..taken_ranks are taken
};

DGEMMA_HD bool factor_holds(float score, int64_t rank, float value) {
  return rank == 1 || score >= 1.0f - value / float(rank + 1);
}

DGEMMA_HD int64_t factor_length(int64_t leading, int64_t count, int32_t flags) {
  return (flags & kLastRankQuirk) && leading == count - 1 ? count : leading;
}

// Whether the next rank, 1-based, of ascending entropy is taken, given the sum over the ranks before it.
DGEMMA_HD bool entropy_holds(double before, double own, int64_t rank, float value, int32_t flags) {
  if (flags & kInclusive) return rank == 1 || before + own < double(value);
  return before <= double(value);
}

// What a kernel is compiled for: everything, or a selection whose scores are not drawn and nothing else.
enum class CommitKind { kAny, kEntropyBound, kThreshold };

DGEMMA_HD CommitKind kind_of(const CommitParams& params) {
  if (rule_draws(params)) return CommitKind::kAny;
  if (params.select == Select::kThreshold) return CommitKind::kThreshold;
  const bool entropy = params.select == Select::kEntropyBound && params.measure == Measure::kEntropy;
  return entropy ? CommitKind::kEntropyBound : CommitKind::kAny;
}

// Whether the selection asks for ranks beyond the first.
DGEMMA_HD bool needs_ranks(const CommitParams& params, const RowRule& rule) {
  switch (params.select) {
    case Select::kFactor:
    case Select::kEntropyBound:
    case Select::kHierarchy: return true;
    case Select::kBernoulli: return false;
    default: return rule.k > 1;
  }
}

DGEMMA_HD bool is_committed(const CommitParams& params, const RowRule& rule, const Candidate& c, int64_t rank,
                            const Ranking& ranking, bool best_of_run) {
  if (!c.eligible) return false;
  if (!c.ranked) return c.sample != c.token && c.score > rule.value2;
  switch (params.select) {
    case Select::kBernoulli: return c.draw < rule.value;
    case Select::kTopK: return rank <= rule.k;
    case Select::kFactor:
    case Select::kEntropyBound: return rank <= ranking.taken_ranks;
    default: break;
  }
  // The score is minus the entropy, and the value an entropy.
  float threshold = params.measure == Measure::kEntropy ? -rule.value : rule.value;
  if (params.flags & kRelative) {
    const float relative = ranking.best - rule.value2;
    if (!(relative >= threshold)) threshold = relative;  // NaN too, as torch.minimum has it
  }
  const bool strict = (params.flags & kStrict) || params.select == Select::kHierarchy;
  const bool above = strict ? c.score > threshold : c.score >= threshold;
  const bool run = params.select == Select::kHierarchy && best_of_run && c.score > rule.value2;
  return above || rank <= rule.k || run;
}

// What a position holds that is not committed.
DGEMMA_HD int64_t rest_token(const CommitParams& params, const Candidate& c) {
  if (!c.eligible || params.write == Write::kKeep) return c.token;
  if (params.write == Write::kRemask) return params.write_argument;
  return below(c.words.word[kWordRenoiseHigh], c.words.word[kWordRenoiseLow], params.write_argument);
}

}  // namespace dgemma
