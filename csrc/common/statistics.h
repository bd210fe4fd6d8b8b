// Statistics of a set of logits, and what those of a whole row say.
//
// With x the logits after softcap: max = max x, second = the second largest x (equal to max on a tie),
// z = sum e^d and s = sum d e^d with d = (x - max) / stats_temperature, and mass = sum e^((x - max) / temperature).
// An empty set has max = second = -inf and zero sums. A NaN or +inf among the logits leaves NaN in z.
#pragma once

#include <math.h>

#include "platform.h"

namespace dgemma {

// Below this exponent e^x is no longer a normal fp32 number; such a token has probability 0.
constexpr float kLowestExponent = -87.33654f;
constexpr float kLargestFloat = 3.402823466e38f;

struct TileStatistics {
  float max, second;
  float z, s;
  float mass;
};

// 1 / temperature that never overflows: a temperature so small is the limit of a one-hot distribution.
DGEMMA_HD float inverse_temperature(float temperature) {
  const float inverse = 1.0f / temperature;
  return inverse > kLargestFloat ? kLargestFloat : inverse;
}

// Powers of two: e^(difference / temperature) = 2^(difference * factor).
DGEMMA_HD float power_factor(float inverse) {
  const float factor = inverse * 1.44269504089f;
  return factor > kLargestFloat ? kLargestFloat : factor;
}

// (x - max) / temperature, for x <= max. A max of -inf (nothing there) gives the lowest value, NaN stays NaN.
DGEMMA_HD float scaled_difference(float x, float max, float inverse) {
  const float reference = max < -kLargestFloat ? -kLargestFloat : max;
  const float difference = (x - reference) * inverse;
  return difference < -200.0f ? -200.0f : difference;
}

// e^d for d <= 0, with exactly 0 where the result would not be a normal number.
DGEMMA_HD float exp_of_difference(float d) { return d < kLowestExponent ? 0.0f : expf(d); }

DGEMMA_HD float larger(float a, float b) { return a > b ? a : b; }
DGEMMA_HD float smaller(float a, float b) { return a > b ? b : a; }

struct RowResult {
  float entropy, logsumexp, top1_prob, top2_prob;
  bool valid;
};

// What the merged statistics of a whole row say; see `row_stats` for an invalid row's values.
DGEMMA_HD RowResult finish_row(float max, float second, double z, double s, float stats_temperature) {
  const double log_z = log(z);
  const float logsumexp = float(double(max) / double(stats_temperature) + log_z);
  RowResult result{INFINITY, NAN, 0.0f, 0.0f, false};
  if (!(fabsf(logsumexp) <= kLargestFloat)) return result;
  const float d = scaled_difference(second, max, inverse_temperature(stats_temperature));
  result.entropy = float(log_z - s / z);
  result.logsumexp = logsumexp;
  result.top1_prob = float(1.0 / z);
  result.top2_prob = float(double(exp_of_difference(d)) / z);
  result.valid = true;
  return result;
}

}  // namespace dgemma
