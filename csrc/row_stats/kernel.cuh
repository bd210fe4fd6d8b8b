// Statistics of rows of logits. The first kernel reads every logit once and leaves one record per tile; the second
// merges the records of a row, picks the tile that holds the sample and reads that one again.
#pragma once

#include "../common/device/qualifiers.cuh"
#include "../common/device_math.cuh"
#include "../common/philox.h"
#include "../params.h"
#include "config.h"

namespace dgemma {

// Statistics of a tile, relative to its largest logit: with d the exponent of 2 of a logit at the stats temperature,
// z = sum 2^d, s = sum d 2^d; mass is z at the sampling temperature. Where the largest logit stands is looked up
// by the second kernel, in one tile per row.
struct TileRecord {
  float max;  // before softcap
  float z, s, mass;
};

constexpr int kRowStatsWarps = kRowStatsThreads / hw::kWarp;

// Tiles of a row. Rows that start on a 16-byte boundary need no room for elements before their first one.
inline int64_t row_stats_tiles(const RowStatsParams& params) {
  const int64_t size = params.dtype == Dtype::kFloat32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % 16 == 0 && params.stride0 * size % 16 == 0 &&
                       params.stride1 * size % 16 == 0;
  const int64_t elements = params.vocab + (aligned ? 0 : 16 / size - 1);
  return (elements + kRowStatsTile - 1) / kRowStatsTile;
}

// Exponents of logits below a reference, and the least that another temperature multiplies them with: together they
// leave less than -300, whose power is 0, so that a logit of -inf is never drawn.
constexpr float kLowestDifference = -3e38f;
constexpr float kLowestRatio = 1e-36f;
// Beyond it a temperature is the limit of a one-hot distribution.
constexpr float kLargestRate = 1e30f;

DGEMMA_DEVICE float exponent_rate(float temperature) { return fminf(kLog2E / temperature, kLargestRate); }

// How a row's logits become exponents of 2. One formula makes a logit's and that of the reference which is subtracted,
// so the largest logit has exactly 0.
struct RowExponents {
  float inverse_softcap;  // 0: no softcap
  float scale;            // log2(e) / stats temperature, times the softcap if there is one
  float ratio;            // from the stats temperature to the sampling temperature
  float temperature;      // of the statistics
  bool greedy, two;

  DGEMMA_DEVICE_MEMBER RowExponents(const RowStatsParams& params, int64_t row) {
    const float given = of_row(params.temperature, row);
    greedy = given == 0.0f;
    const float sampling = greedy ? 1.0f : given;
    temperature = params.has_stats_temperature ? of_row(params.stats_temperature, row) : sampling;
    two = !greedy && sampling != temperature;
    scale = exponent_rate(temperature);
    ratio = two ? fmaxf(exponent_rate(sampling) / scale, kLowestRatio) : 1.0f;
    inverse_softcap = params.softcap > 0 ? 1.0f / params.softcap : 0.0f;
    if (params.softcap > 0) scale *= params.softcap;
  }

  DGEMMA_DEVICE_MEMBER bool capped() const { return inverse_softcap > 0; }

  DGEMMA_DEVICE_MEMBER float reference(float max) const {
    if (capped()) return scaled_tanh(max * inverse_softcap, scale);
    return max < -kLargestFloat ? -kLargestFloat : max;
  }

  // NaN stays NaN: it is how a row without a distribution is known.
  DGEMMA_DEVICE_MEMBER float below(float x, float reference) const {
    const float d = capped() ? scaled_tanh(x * inverse_softcap, scale) - reference : (x - reference) * scale;
    return d < kLowestDifference ? kLowestDifference : d;
  }
};

// A row of logits as 16-byte vectors. Vector 0 is the aligned one that holds the first logit, so up to
// `head` elements of it lie before the row.
template <class T>
struct RowVectors {
  static constexpr int kElements = 16 / sizeof(T);

  const T* first;  // the aligned address at or before the row
  int head;
  int64_t vocab;

  DGEMMA_MEMBER RowVectors(const RowStatsParams& params, int64_t row) : vocab(params.vocab) {
    const int64_t start = row / params.rows1 * params.stride0 + row % params.rows1 * params.stride1;
    const T* logits = static_cast<const T*>(params.logits) + start;
    head = int(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    first = logits - head;
  }
};

// kElements logits of vector `index` as fp32; -inf where the vector lies outside the row.
template <class T>
DGEMMA_DEVICE void read_vector(const RowVectors<T>& row, int64_t index, float* x) {
  constexpr int kElements = RowVectors<T>::kElements;
  const int64_t token = index * kElements - row.head;
  if (token >= 0 && token + kElements <= row.vocab) {
    const hw::Words4 words = hw::load_streaming(row.first + index * kElements);
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      if constexpr (sizeof(T) == 4) {
        x[i] = float_from_bits(words.word[i]);
      } else {
        x[i] = to_float(T{uint16_t(words.word[i / 2] >> (i % 2 * 16))});
      }
    }
    return;
  }
  DGEMMA_UNROLL
  for (int i = 0; i < kElements; ++i)
    x[i] = token + i >= 0 && token + i < row.vocab ? to_float(row.first[index * kElements + i]) : -INFINITY;
}

// Whether element `i` of vector `index` belongs to the row. After softcap one outside would be finite.
template <class T>
DGEMMA_DEVICE bool inside(const RowVectors<T>& row, int64_t index, int i) {
  const int64_t token = index * RowVectors<T>::kElements - row.head + i;
  return token >= 0 && token < row.vocab;
}

struct Extremes {
  float max, magnitude;
};

struct Sums {
  float z, s, mass;
};

struct TileShared {
  hw::Shared<Sums> sums{0};                                   // one per warp
  hw::Shared<Extremes> extremes{kRowStatsWarps * sizeof(Sums)};  // one per warp
};
static_assert(kRowStatsWarps * (sizeof(Extremes) + sizeof(Sums)) == kRowStatsTileSharedBytes, "both arrays");

// The largest logit and the largest magnitude of the block's tile, for every thread.
DGEMMA_DEVICE Extremes extremes_of_block(const float* x, const TileShared& shared) {
  Extremes own{-INFINITY, 0.0f};
  DGEMMA_UNROLL
  for (int i = 0; i < kRowStatsPerThread; ++i) {
    own.max = fmaxf(own.max, x[i]);
    own.magnitude = fmaxf(own.magnitude, fabsf(x[i]));
  }
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    own.max = fmaxf(own.max, hw::shuffle_xor(own.max, mask));
    own.magnitude = fmaxf(own.magnitude, hw::shuffle_xor(own.magnitude, mask));
  }
  if (hw::thread_x() % hw::kWarp == 0) shared.extremes.store(hw::thread_x() / hw::kWarp, own);
  hw::sync_block();
  DGEMMA_UNROLL
  for (int w = 0; w < kRowStatsWarps; ++w) {
    const Extremes other = shared.extremes.load(w);
    own.max = fmaxf(own.max, other.max);
    own.magnitude = fmaxf(own.magnitude, other.magnitude);
  }
  return own;
}

// Turns the block's logits into exponents relative to the largest of them.
template <class T>
DGEMMA_DEVICE void subtract_largest(float* x, const Extremes& extremes, const RowExponents& exponents,
                                    const RowVectors<T>& row, int64_t first) {
  constexpr int kElements = RowVectors<T>::kElements;
  const float inverse = exponents.inverse_softcap, scale = exponents.scale;
  if (exponents.capped() && extremes.magnitude * inverse < 1.0f) {
    // Most tiles hold no logit beyond the softcap, and there a polynomial is half the work. Elements outside the row are
    // -inf, so a tile with one of them does not come here.
    const float reference = scaled_tanh_near_0(extremes.max * inverse, scale);
    DGEMMA_UNROLL
    for (int i = 0; i < kRowStatsPerThread; ++i) x[i] = scaled_tanh_near_0(x[i] * inverse, scale) - reference;
    return;
  }
  const float reference = exponents.reference(extremes.max);
  if (exponents.capped()) {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowStatsPerThread; ++i) {
      const bool valid = inside(row, first + i / kElements * kRowStatsThreads, i % kElements);
      x[i] = valid ? exponents.below(x[i], reference) : kLowestDifference;
    }
    return;
  }
  DGEMMA_UNROLL
  for (int i = 0; i < kRowStatsPerThread; ++i) x[i] = exponents.below(x[i], reference);
}

template <class T>
DGEMMA_KERNEL row_stats_tile_kernel(RowStatsParams params, int tiles) {
  constexpr int kElements = RowVectors<T>::kElements;
  constexpr int kVectors = kRowStatsPerThread / kElements;
  const int64_t row_index = hw::block_x() / tiles;
  const int tile = int(hw::block_x() % tiles);
  const int thread = hw::thread_x();
  const RowExponents exponents(params, row_index);
  const RowVectors<T> row(params, row_index);
  const int64_t first = int64_t{tile} * kRowStatsTile / kElements + thread;

  float x[kRowStatsPerThread];
  DGEMMA_UNROLL
  for (int v = 0; v < kVectors; ++v) read_vector(row, first + v * kRowStatsThreads, x + v * kElements);
  const TileShared shared;
  const Extremes extremes = extremes_of_block(x, shared);

  subtract_largest(x, extremes, exponents, row, first);
  Sums sums{0.0f, 0.0f, 0.0f};
  DGEMMA_UNROLL
  for (int i = 0; i < kRowStatsPerThread; ++i) {
    const float e = hw::exp2_fast(x[i]);
    sums.z += e;
    sums.s = fmaf(x[i], e, sums.s);
  }
  if (exponents.two) {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowStatsPerThread; ++i) sums.mass += hw::exp2_fast(x[i] * exponents.ratio);
  }
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    sums.z += hw::shuffle_xor(sums.z, mask);
    sums.s += hw::shuffle_xor(sums.s, mask);
    sums.mass += hw::shuffle_xor(sums.mass, mask);
  }
  if (thread % hw::kWarp == 0) shared.sums.store(thread / hw::kWarp, sums);
  hw::sync_block();
  if (thread != 0) return;
  for (int w = 1; w < kRowStatsWarps; ++w) {
    const Sums other = shared.sums.load(w);
    sums.z += other.z;
    sums.s += other.s;
    sums.mass += other.mass;
  }
  static_cast<TileRecord*>(params.workspace)[row_index * tiles + tile] = {
      extremes.max, sums.z, sums.s, exponents.two ? sums.mass : sums.z};
}

// Inclusive prefix sum over the lanes of a warp.
DGEMMA_DEVICE double scan_warp(double value) {
  DGEMMA_UNROLL
  for (int delta = 1; delta < hw::kWarp; delta *= 2) {
    const double below_lane = hw::shuffle_up(value, delta);
    if (hw::thread_x() % hw::kWarp >= delta) value += below_lane;
  }
  return value;
}

// What warp 0 tells the block about the row.
struct RowPlan {
  double z, s;       // over the row, relative to its largest logit
  double target;     // mass to pass inside the sample's tile
  float max;         // the largest logit, before softcap
  float reference;   // its exponent
  float elsewhere;   // the largest logit of the tiles other than `first`
  int32_t first;     // the first tile that holds the largest logit
  int32_t tile;      // the sample's; -1: nothing to draw
};

// Sampling mass of a tile relative to the row's maximum.
DGEMMA_DEVICE double tile_mass(const TileRecord& record, float reference, const RowExponents& exponents) {
  return double(record.mass) * double(hw::exp2_fast(exponents.below(record.max, reference) * exponents.ratio));
}

// The first tile at which the cumulated mass exceeds uniform * total, by warp 0.
DGEMMA_DEVICE void choose_tile(const TileRecord* records, int tiles, float uniform,
                               const RowExponents& exponents, RowPlan& plan) {
  const int lane = hw::thread_x() % hw::kWarp;
  double total = 0;
  for (int start = 0; start < tiles; start += hw::kWarp) {
    const double own = start + lane < tiles ? tile_mass(records[start + lane], plan.reference, exponents) : 0.0;
    total += hw::shuffle(scan_warp(own), hw::kWarp - 1);
  }
  const double target = double(uniform) * total;
  double before = 0;
  for (int start = 0; start < tiles; start += hw::kWarp) {
    const double own = start + lane < tiles ? tile_mass(records[start + lane], plan.reference, exponents) : 0.0;
    const double inclusive = before + scan_warp(own);
    const uint32_t positive = hw::ballot(own > 0);
    const uint32_t passed = hw::ballot(own > 0 && inclusive > target);
    // Without a crossing the last tile with mass stays chosen, which rounding at the very end may ask for.
    const int winner = passed ? hw::find_first_set(passed) - 1 : 31 - hw::count_leading_zeros(positive);
    if (positive) {
      plan.tile = start + winner;
      const double rest = target - (hw::shuffle(inclusive, winner) - hw::shuffle(own, winner));
      plan.target = rest > 0 ? rest : 0;
    }
    if (passed) return;
    before += hw::shuffle(scan_warp(own), hw::kWarp - 1);
  }
}

DGEMMA_DEVICE float uniform_of_row(const RowStatsParams& params, int64_t row) {
  if (params.uniform) return params.uniform[row];
  return uniform_from_word(
      random_words(of_row(params.seed, 0), of_row(params.offset, 0), row).word[kWordSample]);
}

DGEMMA_DEVICE float capped_logit(const RowStatsParams& params, const RowExponents& exponents, float x) {
  return exponents.capped() ? tanh_device(x * exponents.inverse_softcap) * params.softcap : x;
}

DGEMMA_DEVICE RowResult finish_plan(const RowStatsParams& params, const RowExponents& exponents, const RowPlan& plan,
                                    float second) {
  constexpr double kLn2 = 0.69314718055994530942;
  // A row of one token has no second, which the softcap must not make finite.
  const float capped_second = params.vocab > 1 ? capped_logit(params, exponents, second) : -INFINITY;
  return finish_row(capped_logit(params, exponents, plan.max), capped_second, plan.z, plan.s * kLn2,
                    exponents.temperature);
}

// By warp 0: merges the tiles and picks the sample's.
DGEMMA_DEVICE RowPlan plan_row(const RowStatsParams& params, int64_t row, const TileRecord* records, int tiles,
                               const RowExponents& exponents) {
  const int lane = hw::thread_x() % hw::kWarp;
  RowPlan plan{0.0, 0.0, 0.0, -INFINITY, 0.0f, -INFINITY, 0x7fffffff, -1};
  for (int i = lane; i < tiles; i += hw::kWarp) {
    // A tile later than the first of its size is elsewhere.
    const float max = records[i].max;
    plan.elsewhere = fmaxf(plan.elsewhere, fminf(max, plan.max));
    if (max > plan.max || plan.first == 0x7fffffff) plan.first = i;
    plan.max = fmaxf(plan.max, max);
  }
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    const float max = hw::shuffle_xor(plan.max, mask), elsewhere = hw::shuffle_xor(plan.elsewhere, mask);
    const int32_t first = hw::shuffle_xor(plan.first, mask);
    plan.elsewhere = fmaxf(fmaxf(plan.elsewhere, elsewhere), fminf(plan.max, max));
    if (max > plan.max || (max == plan.max && first < plan.first)) plan.first = first;
    plan.max = fmaxf(plan.max, max);
  }
  plan.reference = exponents.reference(plan.max);
  for (int i = lane; i < tiles; i += hw::kWarp) {
    const float d = exponents.below(records[i].max, plan.reference), weight = hw::exp2_fast(d);
    plan.z += double(records[i].z) * double(weight);
    plan.s += (double(records[i].s) + double(d) * double(records[i].z)) * double(weight);
  }
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    plan.z += hw::shuffle_xor(plan.z, mask);
    plan.s += hw::shuffle_xor(plan.s, mask);
  }
  const bool valid = finish_plan(params, exponents, plan, plan.max).valid;
  if (valid && !exponents.greedy) choose_tile(records, tiles, uniform_of_row(params, row), exponents, plan);
  return plan;
}

DGEMMA_DEVICE void write_sample(const RowStatsParams& params, int64_t row, int64_t token, float x, const RowPlan& plan,
                                const RowExponents& exponents) {
  params.sample[row] = token;
  params.sample_prob[row] = float(double(hw::exp2_fast(exponents.below(x, plan.reference))) / plan.z);
}

// The lowest token that holds the row's largest logit, and the largest logit of the other tokens.
struct Rank {
  int32_t token;
  float second;
};

DGEMMA_DEVICE Rank better(const Rank& a, const Rank& b, float max) {
  const bool both = a.token != 0x7fffffff && b.token != 0x7fffffff;
  return {a.token < b.token ? a.token : b.token, both ? max : fmaxf(a.second, b.second)};
}

struct RowShared {
  hw::Shared<RowPlan> plan{0};
  hw::Shared<double> sums{64};          // one per warp
  hw::Shared<int32_t> winner{128};      // one per warp: the thread that holds the sample, or -1
  hw::Shared<int32_t> last{192};        // one per warp: last token with mass
  hw::Shared<Rank> ranks{256};          // one per warp
};
static_assert(sizeof(RowPlan) <= 64, "the first of the arrays begins behind the plan");
static_assert(256 + kRowStatsWarps * sizeof(Rank) <= kRowStatsRowSharedBytes, "the last of the arrays");

// Looks the largest logit up in the first tile that holds it, and writes all that does not depend on the sample.
template <class T>
DGEMMA_DEVICE void write_statistics(const RowStatsParams& params, int64_t row_index, const RowVectors<T>& row,
                                    const RowPlan& plan, const RowExponents& exponents, const RowShared& shared) {
  constexpr int kElements = RowVectors<T>::kElements;
  constexpr int kVectors = kRowStatsPerThread / kElements;
  const int thread = hw::thread_x();
  const int64_t first = int64_t{plan.first} * kRowStatsTile / kElements + thread;
  Rank rank{0x7fffffff, plan.elsewhere};
  for (int v = 0; v < kVectors; ++v) {
    float x[kElements];
    read_vector(row, first + v * kRowStatsThreads, x);
    const int64_t token = (first + v * kRowStatsThreads) * kElements - row.head;
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const bool top = x[i] == plan.max && inside(row, first + v * kRowStatsThreads, i);
      rank = better(rank, {top ? int32_t(token + i) : 0x7fffffff, top ? -INFINITY : x[i]}, plan.max);
    }
  }
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2)
    rank = better(rank, {hw::shuffle_xor(rank.token, mask), hw::shuffle_xor(rank.second, mask)}, plan.max);
  if (thread % hw::kWarp == 0) shared.ranks.store(thread / hw::kWarp, rank);
  hw::sync_block();
  if (thread != 0) return;
  for (int w = 1; w < kRowStatsWarps; ++w) rank = better(rank, shared.ranks.load(w), plan.max);
  const RowResult result = finish_plan(params, exponents, plan, rank.second);
  params.entropy[row_index] = result.entropy;
  params.logsumexp[row_index] = result.logsumexp;
  params.top1_prob[row_index] = result.top1_prob;
  params.top2_prob[row_index] = result.top2_prob;
  params.argmax[row_index] = params.sample[row_index] = result.valid ? rank.token : 0;
  params.sample_prob[row_index] = result.top1_prob;
}

template <class T>
DGEMMA_KERNEL row_stats_row_kernel(RowStatsParams params, int tiles) {
  constexpr int kElements = RowVectors<T>::kElements;
  constexpr int kVectors = kRowStatsPerThread / kElements;
  const int64_t row_index = hw::block_x();
  const int thread = hw::thread_x(), warp = thread / hw::kWarp, lane = thread % hw::kWarp;
  const RowExponents exponents(params, row_index);
  const TileRecord* records = static_cast<const TileRecord*>(params.workspace) + row_index * tiles;
  const RowShared shared;
  if (warp == 0) {
    const RowPlan plan = plan_row(params, row_index, records, tiles, exponents);
    if (lane == 0) shared.plan.store(0, plan);
  }
  hw::sync_block();
  const RowPlan plan = shared.plan.load(0);
  const RowVectors<T> row(params, row_index);
  write_statistics(params, row_index, row, plan, exponents, shared);
  if (plan.tile < 0) return;

  const int64_t first = int64_t{plan.tile} * kRowStatsTile / kElements + thread;
  double before = 0;
  int32_t last_token = -1;  // of this thread's, the last with mass
  for (int v = 0; v < kVectors; ++v) {
    float x[kElements];
    read_vector(row, first + v * kRowStatsThreads, x);
    float e[kElements];
    double own = 0;
    int last = -1;
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const bool valid = inside(row, first + v * kRowStatsThreads, i);
      e[i] = valid ? hw::exp2_fast(exponents.below(x[i], plan.reference) * exponents.ratio) : 0.0f;
      own += double(e[i]);
      if (e[i] > 0) last = i;
    }
    const int64_t token = (first + v * kRowStatsThreads) * kElements - row.head;
    if (last >= 0) last_token = int32_t(token + last);

    const double scanned = scan_warp(own);
    if (lane == hw::kWarp - 1) shared.sums.store(warp, scanned);
    hw::sync_block();
    double base = before;
    for (int w = 0; w < kRowStatsWarps; ++w) {
      if (w == warp) base = before;
      before += shared.sums.load(w);
    }
    const uint32_t passed = hw::ballot(last >= 0 && base + scanned > plan.target);
    if (lane == 0) shared.winner.store(warp, passed ? warp * hw::kWarp + hw::find_first_set(passed) - 1 : -1);
    hw::sync_block();
    int32_t winner = -1;
    for (int w = kRowStatsWarps - 1; w >= 0; --w) {
      const int32_t of_warp = shared.winner.load(w);
      if (of_warp >= 0) winner = of_warp;
    }
    if (winner < 0) continue;
    if (thread != winner) return;
    // The lanes before this one did not pass the target, so their sum is where this one starts.
    double sum = base + scanned - own;
    int chosen = last;
    float chosen_x = 0;
    bool found = false;
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      sum += double(e[i]);
      if (e[i] > 0 && !found) {
        chosen = i;
        chosen_x = x[i];
        found = sum > plan.target;
      }
    }
    write_sample(params, row_index, token + chosen, chosen_x, plan, exponents);
    return;
  }
  // Rounding left a remainder after the last token with mass, which is then the sample.
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    const int32_t other = hw::shuffle_xor(last_token, mask);
    if (other > last_token) last_token = other;
  }
  if (lane == 0) shared.last.store(warp, last_token);
  hw::sync_block();
  if (thread != 0) return;
  for (int w = 1; w < kRowStatsWarps; ++w) {
    const int32_t other = shared.last.load(w);
    if (other > last_token) last_token = other;
  }
  write_sample(params, row_index, last_token, to_float(row.first[last_token + row.head]), plan, exponents);
}

}  // namespace dgemma
