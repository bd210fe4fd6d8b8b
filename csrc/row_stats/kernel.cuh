// Statistics of rows of logits. The first kernel reads every logit once and leaves one record per tile; the second
// merges the records of a row, picks the tile that holds the sample and reads that one again.
#pragma once

#include <type_traits>

#include "../common/device/qualifiers.cuh"
#include "../common/exponents.cuh"
#include "../common/philox.h"
#include "../params.h"
#include "config.h"

namespace dgemma {

// Statistics of a tile, relative to its largest logit: with d the exponent of 2 of a logit at the stats temperature,
// z = sum 2^d, s = sum d 2^d; mass is z at the sampling temperature. Where the largest logit stands is looked up
// by the second kernel, in one tile per row.
struct alignas(16) TileRecord {
  float max;  // before softcap
  float z, s, mass;
};

constexpr int kRowStatsWarps = kRowStatsThreads / hw::kWarp;

// Tiles of a row. Rows that start on a 16-byte boundary need no room for elements before their first one.
inline int64_t row_stats_tiles(const RowStatsParams& params) {
  const int64_t size = params.dtype == Dtype::kFloat32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % 16 == 0 && params.stride0 * size % 16 == 0 &&
                       params.stride1 * size % 16 == 0;
  const int64_t bytes = (params.vocab + (aligned ? 0 : 16 / size - 1)) * size;
  return (bytes + kRowStatsTileBytes - 1) / kRowStatsTileBytes;
}

// Blocks of the first kernel, a tile per warp.
inline int64_t row_stats_tile_blocks(const RowStatsParams& params) {
  constexpr int kTiles = kRowStatsTileThreads / hw::kWarp;
  return (params.rows0 * params.rows1 * row_stats_tiles(params) + kTiles - 1) / kTiles;
}

// Exponents of logits below a reference, and the least that another temperature multiplies them with: together they
// leave less than -300, whose power is 0, so that a logit of -inf is never drawn.
constexpr float kLowestDifference = -3e38f;
constexpr float kLowestRatio = 1e-36f;
// Logits and their exponents up to it have finite differences.
constexpr float kLargestMagnitude = 1e38f;

// How a row's logits become exponents of 2. One formula makes a logit's and that of the reference which is subtracted,
// so the largest logit has exactly 0.
struct RowExponents : Exponents {
  float scale;        // the rate, times the softcap if there is one
  float ratio;        // from the stats temperature to the sampling temperature
  float temperature;  // of the statistics
  float cutoff;       // logits below it are left out; where none are it is a constant, NaN
  bool greedy, two;

  DGEMMA_DEVICE_MEMBER RowExponents(const RowStatsParams& params, int64_t row, bool has_cutoff) {
    cutoff = has_cutoff ? params.cutoff[row] : NAN;
    const float given = of_row(params.temperature, row);
    greedy = given == 0.0f;
    const float sampling = greedy ? 1.0f : given;
    temperature = params.has_stats_temperature ? of_row(params.stats_temperature, row) : sampling;
    two = !greedy && sampling != temperature;
    rate = exponent_rate(temperature);
    ratio = two ? fmaxf(exponent_rate(sampling) / rate, kLowestRatio) : 1.0f;
    inverse_softcap = params.softcap > 0 ? 1.0f / params.softcap : 0.0f;
    scale = params.softcap > 0 ? fminf(rate * params.softcap, kLargestMagnitude) : rate;
  }

  DGEMMA_DEVICE_MEMBER float reference(float max) const {
    if (capped()) return scaled_tanh(max * inverse_softcap, scale);
    return max < -kLargestFloat ? -kLargestFloat : max;
  }

  // What lies above a kept logit is kept: a tile's largest logit is one of them, or else it has no mass.
  DGEMMA_DEVICE_MEMBER bool left_out(float x) const { return x < cutoff; }

  // NaN stays NaN: it is how a row without a distribution is known.
  DGEMMA_DEVICE_MEMBER float below(float x, float reference) const {
    const float d = capped() ? scaled_tanh(x * inverse_softcap, scale) - reference : (x - reference) * scale;
    return left_out(x) || d < kLowestDifference ? kLowestDifference : d;
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
    const T* logits = row_of_logits<T>(params, uint32_t(row));
    head = int(reinterpret_cast<uintptr_t>(logits) % 16 / sizeof(T));
    first = logits - head;
  }
};

constexpr int kTileVectors = kRowStatsTileBytes / 16;
constexpr int kLaneVectors = kTileVectors / hw::kWarp;  // of a tile that a warp reads
static_assert(kTileVectors == kRowStatsThreads, "the second kernel reads a vector of a tile per thread");

// Vector `index`, with -inf where it lies outside the row.
template <class T>
DGEMMA_DEVICE hw::Words4 read_vector(const RowVectors<T>& row, int64_t index) {
  constexpr int kElements = RowVectors<T>::kElements;
  const int64_t token = index * kElements - row.head;
  if (token >= 0 && token + kElements <= row.vocab) return hw::load_streaming(row.first + index * kElements);
  constexpr uint32_t kNothing = sizeof(T) == 4 ? 0xff800000u : std::is_same_v<T, Bfloat16> ? 0xff80u : 0xfc00u;
  hw::Words4 words{{0, 0, 0, 0}};
  DGEMMA_UNROLL
  for (int i = 0; i < kElements; ++i) {
    uint32_t bits = kNothing;
    if (token + i >= 0 && token + i < row.vocab) bits = bits_of(row.first[index * kElements + i]);
    words.word[i * int(sizeof(T)) / 4] |= bits << (i * int(sizeof(T)) % 4 * 8);
  }
  return words;
}

// Whether element `i` of vector `index` belongs to the row. After softcap one outside would be finite.
template <class T>
DGEMMA_DEVICE bool inside(const RowVectors<T>& row, int64_t index, int i) {
  const int64_t token = index * RowVectors<T>::kElements - row.head + i;
  return token >= 0 && token < row.vocab;
}

struct Sums {
  float z{0.0f}, s{0.0f}, mass{0.0f};

  DGEMMA_DEVICE_MEMBER void add(float d) {
    const float e = hw::exp2_fast(d);
    z += e;
    s = fmaf(d, e, s);
  }
};

// Those of a tile that reaches over an end of the row.
template <class T>
DGEMMA_DEVICE Extremes extremes_of_part(const RowVectors<T>& row, int64_t first) {
  Extremes result;
  DGEMMA_NO_UNROLL
  for (int v = 0; v < kLaneVectors; ++v) {
    const hw::Words4 words = read_vector(row, first + v * hw::kWarp);
    DGEMMA_UNROLL
    for (int i = 0; i < RowVectors<T>::kElements; ++i) result.add(element<T>(words, i), element<T>(words, i));
  }
  return result;
}

DGEMMA_DEVICE Extremes extremes_of_warp(Extremes own) {
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    own.max = fmaxf(own.max, hw::shuffle_xor(own.max, mask));
    own.magnitude = fmaxf(own.magnitude, hw::shuffle_xor(own.magnitude, mask));
  }
  return own;
}

// Sums of a lane's logits, two running ones.
template <class T, bool kTwo, class Exponent>
DGEMMA_DEVICE Sums sum_powers(const hw::Words4 (&words)[kLaneVectors], const Exponent& exponent,
                              const RowExponents& exponents) {
  constexpr int kElements = RowVectors<T>::kElements;
  Sums sums[2];
  DGEMMA_UNROLL
  for (int v = 0; v < kLaneVectors; ++v) {
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const float x = element<T>(words[v], i), below = exponent(x);
      const float d = exponents.left_out(x) ? kLowestDifference : below;
      sums[i % 2].add(d);
      if (kTwo) sums[i % 2].mass += hw::exp2_fast(d * exponents.ratio);
    }
  }
  return {sums[0].z + sums[1].z, sums[0].s + sums[1].s, sums[0].mass + sums[1].mass};
}

template <class T, class Exponent>
DGEMMA_DEVICE Sums sum_powers(const hw::Words4 (&words)[kLaneVectors], const Exponent& exponent,
                              const RowExponents& exponents) {
  if (exponents.two) return sum_powers<T, true>(words, exponent, exponents);
  return sum_powers<T, false>(words, exponent, exponents);
}

// The same for any logits, which are read once more.
template <class T>
DGEMMA_DEVICE Sums sum_any_powers(const RowVectors<T>& row, int64_t first, const RowExponents& exponents, float max) {
  constexpr int kElements = RowVectors<T>::kElements;
  const float reference = exponents.reference(max);
  Sums sums;
  DGEMMA_NO_UNROLL
  for (int v = 0; v < kLaneVectors; ++v) {
    const int64_t index = first + v * hw::kWarp;
    const hw::Words4 words = read_vector(row, index);
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const float below = exponents.below(element<T>(words, i), reference);
      const float d = inside(row, index, i) ? below : kLowestDifference;
      sums.add(d);
      if (exponents.two) sums.mass += hw::exp2_fast(d * exponents.ratio);
    }
  }
  return sums;
}

// A warp takes a tile; a lane keeps its logits as they came between finding the largest one and summing powers. Most
// tiles lie inside their row and hold no logit beyond the softcap: these read memory once and take few instructions a
// logit.
template <class T, bool kCutoff>
DGEMMA_KERNEL DGEMMA_BOUNDS(kRowStatsTileThreads, kRowStatsTileBlocks)
    row_stats_tile_kernel(RowStatsParams params, int tiles) {
  constexpr int kElements = RowVectors<T>::kElements;
  const int lane = hw::thread_x() % hw::kWarp;
  const uint32_t rows = uint32_t(params.rows0 * params.rows1);
  const uint32_t index = uint32_t(hw::block_x()) * (kRowStatsTileThreads / hw::kWarp) + hw::thread_x() / hw::kWarp;
  const uint32_t row_index = index / uint32_t(tiles), tile = index - row_index * uint32_t(tiles);
  if (row_index >= rows) return;
  const RowVectors<T> row(params, row_index);
  const int64_t first = int64_t{tile} * kTileVectors + lane;
  const int64_t token = int64_t{tile} * kTileVectors * kElements - row.head;
  const bool whole = token >= 0 && token + kTileVectors * kElements <= row.vocab;

  hw::Words4 words[kLaneVectors];
  if (whole) {
    DGEMMA_UNROLL
    for (int v = 0; v < kLaneVectors; ++v)
      words[v] = hw::load_streaming(row.first + (first + v * hw::kWarp) * kElements);
  }
  const RowExponents exponents(params, row_index, kCutoff);
  const Extremes extremes = extremes_of_warp(whole ? extremes_of<T>(words) : extremes_of_part(row, first));

  const float max = extremes.max, magnitude = extremes.magnitude, relative = magnitude * exponents.inverse_softcap;
  const bool capped = exponents.capped(), polynomial = whole && capped && exponents.polynomial();
  Sums sums;
  if (polynomial && relative < 0.5f)
    sums = sum_powers<T>(words, capped_below_half(exponents, max), exponents);
  else if (polynomial && relative < 1.0f)
    sums = sum_powers<T>(words, capped_below_1(exponents, max), exponents);
  else if (whole && !capped && fmaxf(magnitude, magnitude * exponents.rate) < kLargestMagnitude)
    sums = sum_powers<T>(words, Uncapped{exponents.rate, max}, exponents);
  else
    sums = sum_any_powers(row, first, exponents, max);

  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    sums.z += hw::shuffle_xor(sums.z, mask);
    sums.s += hw::shuffle_xor(sums.s, mask);
  }
  if (exponents.two) {
    DGEMMA_UNROLL
    for (int mask = 1; mask < hw::kWarp; mask *= 2) sums.mass += hw::shuffle_xor(sums.mass, mask);
  }
  if (lane == 0)
    static_cast<TileRecord*>(params.workspace)[index] = {max, sums.z, sums.s, exponents.two ? sums.mass : sums.z};
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

// Sampling mass of a tile relative to the row's maximum; `d` is the exponent of its own.
DGEMMA_DEVICE double tile_mass(const TileRecord& record, float d, const RowExponents& exponents) {
  return double(record.mass) * double(hw::exp2_fast(d * exponents.ratio));
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
  // A row of one token has no second, which the softcap must not make finite; nor has one that leaves out all others.
  const bool some = params.vocab > 1 && !exponents.left_out(second);
  const float capped_second = some ? capped_logit(params, exponents, second) : -INFINITY;
  return finish_row(capped_logit(params, exponents, plan.max), capped_second, plan.z, plan.s * kLn2,
                    exponents.temperature);
}

// Neighbouring records of one lane: those of lane i before those of lane i + 1.
struct LaneRecords {
  const TileRecord* records;
  int first, end;

  DGEMMA_DEVICE_MEMBER LaneRecords(const TileRecord* records, int tiles) : records(records) {
    const int each = (tiles + hw::kWarp - 1) / hw::kWarp;
    first = int(hw::thread_x() % hw::kWarp) * each;
    end = first + each < tiles ? first + each : tiles;
  }
};

// The first tile at which the cumulated mass exceeds uniform * total, by warp 0; `own` is the mass of the lane's tiles.
DGEMMA_DEVICE void choose_tile(const LaneRecords& lane, double own, float uniform, const RowExponents& exponents,
                               RowPlan& plan) {
  const double inclusive = scan_warp(own), target = double(uniform) * hw::shuffle(inclusive, hw::kWarp - 1);
  const uint32_t positive = hw::ballot(own > 0);
  const uint32_t passed = hw::ballot(own > 0 && inclusive > target);
  // Without a crossing the last tile with mass is chosen, which rounding at the very end may ask for.
  const int winner = passed ? hw::find_first_set(passed) - 1 : 31 - hw::count_leading_zeros(positive);
  if (hw::thread_x() % hw::kWarp == winner) {
    double before = inclusive - own;
    for (int i = lane.first; i < lane.end; ++i) {
      const TileRecord record = lane.records[i];
      const double mass = tile_mass(record, exponents.below(record.max, plan.reference), exponents);
      if (mass > 0) {
        plan.tile = i;
        plan.target = target - before;
        if (before + mass > target) break;
      }
      before += mass;
    }
  }
  plan.tile = hw::shuffle(plan.tile, winner);
  plan.target = hw::shuffle(plan.target > 0 ? plan.target : 0.0, winner);
}

// By warp 0: merges the tiles and picks the sample's.
DGEMMA_DEVICE RowPlan plan_row(const RowStatsParams& params, int64_t row, const TileRecord* records, int tiles,
                               const RowExponents& exponents) {
  const LaneRecords lane(records, tiles);
  RowPlan plan{0.0, 0.0, 0.0, -INFINITY, 0.0f, -INFINITY, 0x7fffffff, -1};
  for (int i = lane.first; i < lane.end; ++i) {
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
  double mass = 0;
  for (int i = lane.first; i < lane.end; ++i) {
    const TileRecord record = records[i];
    const float d = exponents.below(record.max, plan.reference), weight = hw::exp2_fast(d);
    plan.z += double(record.z) * double(weight);
    plan.s += (double(record.s) + double(d) * double(record.z)) * double(weight);
    mass += tile_mass(record, d, exponents);
  }
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    plan.z += hw::shuffle_xor(plan.z, mask);
    plan.s += hw::shuffle_xor(plan.s, mask);
  }
  const bool valid = finish_plan(params, exponents, plan, plan.max).valid;
  if (valid && !exponents.greedy) choose_tile(lane, mass, uniform_of_row(params, row), exponents, plan);
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
  hw::Shared<Rank> ranks{64};    // one per warp
  hw::Shared<double> sums{128};  // one per warp
};
static_assert(sizeof(RowPlan) <= 64, "the first of the arrays begins behind the plan");
static_assert(kRowStatsWarps * sizeof(Rank) <= 64 && kRowStatsWarps * sizeof(double) <= 64, "the arrays");
static_assert(128 + kRowStatsWarps * sizeof(double) <= kRowStatsRowSharedBytes, "the last of the arrays");

// A thread's vector of a tile that is read again.
template <class T>
struct TileVector {
  int64_t index;
  hw::Words4 words;

  DGEMMA_DEVICE_MEMBER TileVector(const RowVectors<T>& row, int tile)
      : index(int64_t{tile} * kTileVectors + hw::thread_x()), words(read_vector(row, index)) {}

  DGEMMA_DEVICE_MEMBER int64_t token(const RowVectors<T>& row) const {
    return index * RowVectors<T>::kElements - row.head;
  }
};

// The largest logits of a warp's part of the first tile that holds the largest one.
template <class T>
DGEMMA_DEVICE Rank rank_of_warp(const RowVectors<T>& row, const TileVector<T>& vector, const RowPlan& plan) {
  Rank rank{0x7fffffff, plan.elsewhere};
  DGEMMA_UNROLL
  for (int i = 0; i < RowVectors<T>::kElements; ++i) {
    const float x = element<T>(vector.words, i);
    const bool top = x == plan.max && inside(row, vector.index, i);
    rank = better(rank, {top ? int32_t(vector.token(row) + i) : 0x7fffffff, top ? -INFINITY : x}, plan.max);
  }
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2)
    rank = better(rank, {hw::shuffle_xor(rank.token, mask), hw::shuffle_xor(rank.second, mask)}, plan.max);
  return rank;
}

// By one thread: all that does not depend on the sample, and the sample where none is drawn.
DGEMMA_DEVICE void write_statistics(const RowStatsParams& params, int64_t row, Rank rank, const RowPlan& plan,
                                    const RowExponents& exponents, const RowShared& shared) {
  for (int w = 1; w < kRowStatsWarps; ++w) rank = better(rank, shared.ranks.load(w), plan.max);
  const RowResult result = finish_plan(params, exponents, plan, rank.second);
  params.entropy[row] = result.entropy;
  params.logsumexp[row] = result.logsumexp;
  params.top1_prob[row] = result.top1_prob;
  params.top2_prob[row] = result.top2_prob;
  params.argmax[row] = result.valid ? rank.token : 0;
  if (plan.tile >= 0) return;
  params.sample[row] = result.valid ? rank.token : 0;
  params.sample_prob[row] = result.top1_prob;
}

template <class T, bool kCutoff>
DGEMMA_KERNEL row_stats_row_kernel(RowStatsParams params, int tiles) {
  constexpr int kElements = RowVectors<T>::kElements;
  const int64_t row_index = hw::block_x();
  const int thread = hw::thread_x(), warp = thread / hw::kWarp, lane = thread % hw::kWarp;
  const RowExponents exponents(params, row_index, kCutoff);
  const RowShared shared;
  if (warp == 0) {
    const TileRecord* records = static_cast<const TileRecord*>(params.workspace) + row_index * tiles;
    const RowPlan plan = plan_row(params, row_index, records, tiles, exponents);
    if (lane == 0) shared.plan.store(0, plan);
  }
  hw::sync_block();
  const RowPlan plan = shared.plan.load(0);
  const bool drawn = plan.tile >= 0;
  const RowVectors<T> row(params, row_index);
  // Both are under way before either is waited for.
  const TileVector<T> top(row, plan.first), sampled(row, drawn ? plan.tile : plan.first);

  const Rank rank = rank_of_warp(row, top, plan);
  float e[kElements];
  double own = 0;
  if (drawn) {
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      const float x = element<T>(sampled.words, i);
      const bool valid = inside(row, sampled.index, i);
      e[i] = valid ? hw::exp2_fast(exponents.below(x, plan.reference) * exponents.ratio) : 0.0f;
      own += double(e[i]);
    }
  }
  const double scanned = scan_warp(own);
  if (lane == 0) shared.ranks.store(warp, rank);
  if (lane == hw::kWarp - 1) shared.sums.store(warp, scanned);
  hw::sync_block();
  if (thread == 0) write_statistics(params, row_index, rank, plan, exponents, shared);
  if (!drawn) return;

  // The first warp at whose end the target is passed, and in it the first lane; where rounding left none, the last one
  // with mass.
  double base = 0, sum = 0;
  int winner = 0;
  bool found = false;
  for (int w = 0; w < kRowStatsWarps; ++w) {
    const double mass = shared.sums.load(w);
    if (mass > 0 && !found) {
      winner = w;
      base = sum;
      found = sum + mass > plan.target;
    }
    sum += mass;
  }
  if (warp != winner) return;
  const uint32_t positive = hw::ballot(own > 0), passed = hw::ballot(own > 0 && base + scanned > plan.target);
  if (lane != (passed ? hw::find_first_set(passed) - 1 : 31 - hw::count_leading_zeros(positive))) return;
  // The lanes before this one did not pass the target, so their sum is where this one starts.
  sum = base + scanned - own;
  int chosen = 0;
  float chosen_x = 0;
  found = false;
  DGEMMA_UNROLL
  for (int i = 0; i < kElements; ++i) {
    sum += double(e[i]);
    if (e[i] > 0 && !found) {
      chosen = i;
      chosen_x = element<T>(sampled.words, i);
      found = sum > plan.target;
    }
  }
  write_sample(params, row_index, sampled.token(row) + chosen, chosen_x, plan, exponents);
}

}  // namespace dgemma
