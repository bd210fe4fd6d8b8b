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

DGEMMA_HD float measured(const CommitParams& params, int64_t index, int64_t position, float draw) {
  switch (params.measure) {
    case Measure::kSampleProb: return params.sample_prob[index];
    case Measure::kTop1Prob: return params.top1_prob[index];
    case Measure::kEntropy: return -params.entropy[index];
    case Measure::kMargin: return params.top1_prob[index] - params.top2_prob[index];
    case Measure::kRandom: return draw;
    case Measure::kPosition: return -float(position);
  }
  return 0;
}

// `words` are those of the position, whatever stands in them where the rule and the write draw nothing.
DGEMMA_HD Candidate read_candidate(const CommitParams& params, const RowRule& rule, int64_t b, int64_t position,
                                   const PhiloxWords& words) {
  const int64_t index = b * params.length + position;
  Candidate c;
  c.words = words;
  c.draw = uniform_from_word(c.words.word[kWordSelect]);
  c.token = params.tokens[index];
  c.sample = params.sample[index];
  c.entropy = params.entropy[index];
  c.eligible = (params.candidates == nullptr || params.candidates[index]) &&
               !(params.finished != nullptr && params.finished[b]);
  c.ranked = c.eligible && (params.select != Select::kEdit || c.token == params.mask_id);
  c.score = measured(params, index, position, c.draw);
  if (params.flags & kGumbel) c.score = c.score / rule.value2 + gumbel(c.words.word[kWordSelect]);
  return c;
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
DGEMMA_HD bool entropy_holds(double before, float own, int64_t rank, float value, int32_t flags) {
  if (flags & kInclusive) return rank == 1 || before + double(own) < double(value);
  return before <= double(value);
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

DGEMMA_HD int64_t written_token(const CommitParams& params, const Candidate& c, bool committed) {
  if (committed) return c.sample;
  if (!c.eligible || params.write == Write::kKeep) return c.token;
  if (params.write == Write::kRemask) return params.write_argument;
  return below(c.words.word[kWordRenoiseHigh], c.words.word[kWordRenoiseLow], params.write_argument);
}

}  // namespace dgemma
