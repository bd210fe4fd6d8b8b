// Statistics of rows of logits on CPU vectors. This file is compiled once per instruction set, so it uses
// nothing that other files could link from it: no standard library templates, no shared inline functions.
#include "row_stats_host.h"

#include "../common/philox.h"
#include "../common/vector_math.h"

#if defined(DGEMMA_ISA_AVX512)
#define DGEMMA_TABLE row_stats_host_avx512
#elif defined(DGEMMA_ISA_AVX2)
#define DGEMMA_TABLE row_stats_host_avx2
#else
#define DGEMMA_TABLE row_stats_host_plain
#endif

namespace dgemma {
namespace {

struct Row {
  const char* logits;
  float inverse_stats, inverse_sampling, stats_temperature, cutoff;
  bool greedy, two_temperatures;
};

DGEMMA_HD int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

Row row_of(const RowStatsParams& params, int64_t row) {
  const int64_t start = row / params.rows1 * params.stride0 + row % params.rows1 * params.stride1;
  const float temperature = of_row(params.temperature, row);
  Row result;
  result.logits = static_cast<const char*>(params.logits) + start * element_size(params.dtype);
  result.greedy = temperature == 0.0f;
  const float sampling = result.greedy ? 1.0f : temperature;
  result.stats_temperature = params.has_stats_temperature ? of_row(params.stats_temperature, row) : sampling;
  result.cutoff = params.cutoff ? params.cutoff[row] : -INFINITY;
  result.inverse_stats = inverse_temperature(result.stats_temperature);
  result.inverse_sampling = inverse_temperature(sampling);
  result.two_temperatures = !result.greedy && sampling != result.stats_temperature;
  return result;
}

// The logits of a tile after softcap, -inf for those that are left out: where they stand, or a copy where they change.
struct Tile {
  const float* x;
  int64_t full;  // vectors that are all logits
  Vector tail;   // what follows them; -inf after the end
  float max;     // -inf where there is nothing; a NaN is passed over
  bool ordered;  // no NaN; said by Reading::kMax alone, which leaves no logits to look at
  alignas(64) float copy[kHostTile];

  DGEMMA_MEMBER Vector at(int64_t i) const { return i < full ? load(x + i * DGEMMA_LANES) : tail; }
};

// Independent accumulators, so that one vector does not wait for the one before.
constexpr int kChains = 4;
// Vectors that an accumulator takes in before it goes into the tile's sum, which carries what it rounds off. A row that
// is nearly constant rounds every addition the same way, so what counts is how many there are one after the other.
constexpr int kRound = 8;

struct CarryingSum {
  Vector sum = {}, carry = {};

  DGEMMA_MEMBER void add(Vector value) {
    const Vector more = value - carry, before = sum;
    sum = before + more;
    carry = (sum - before) - more;
  }
};

// What of a tile is wanted.
enum class Reading {
  kMax,     // its maximum, and whether there is a NaN
  kPowers,  // its maximum and the logits, in any order
  kPlaces,  // its maximum and the logits, each in its place
};

// Bytes by which a maximum fetches ahead. It is done sooner than memory answers, and a processor's own fetching stops
// at each new page.
constexpr int64_t kAhead = 4096;

template <class T, bool kSoftcap, bool kCutoff, Reading kReading>
void read_tile(const T* logits, int64_t count, float softcap, float cutoff, Tile& tile) {
  constexpr bool kOnlyMax = kReading == Reading::kMax;
  constexpr bool kCopy = !kOnlyMax && (kSoftcap || kCutoff || sizeof(T) != sizeof(float));
  const float inverse_softcap = 1.0f / softcap;
  Vector max[kChains];
  for (Vector& chain : max) chain = splat(-INFINITY);
  VectorInt ordered[2] = {VectorInt{} - 1, VectorInt{} - 1};
  const auto capped = [&](Vector x) DGEMMA_INLINE {
    const Vector result = kSoftcap ? tanh(x * inverse_softcap) * softcap : x;
    return kCutoff ? (x < cutoff ? splat(-INFINITY) : result) : result;
  };
  const auto take = [&](int64_t i, Vector x, int c) DGEMMA_INLINE {
    x = capped(x);
    if (kOnlyMax) ordered[c % 2] &= x == x;
    if (kCopy) store(tile.copy + i * DGEMMA_LANES, x);
    max[c] = larger(x, max[c]);
  };
  tile.x = kCopy ? tile.copy : reinterpret_cast<const float*>(logits);
  tile.full = count / DGEMMA_LANES;
  int64_t i = 0;
  for (; i + kChains <= tile.full; i += kChains) {
    for (int c = 0; c < kChains; c += 2) {
      const T* place = logits + (i + c) * DGEMMA_LANES;
      Vector one, other;
      if (kReading == Reading::kPlaces) {
        one = load(place);
        other = load(place + DGEMMA_LANES);
      } else {
        load_two(place, one, other);
      }
      for (int64_t line = 0; kOnlyMax && line < 2 * DGEMMA_LANES * int64_t(sizeof(T)); line += 64)
        __builtin_prefetch(reinterpret_cast<const char*>(place) + kAhead + line);
      take(i + c, one, c);
      take(i + c + 1, other, c + 1);
    }
  }
  for (; i < tile.full; ++i) take(i, load(logits + i * DGEMMA_LANES), 0);

  tile.tail = splat(-INFINITY);
  const int64_t rest = count - tile.full * DGEMMA_LANES;
  if (rest > 0) {
    T last[DGEMMA_LANES] = {};
    __builtin_memcpy(last, logits + tile.full * DGEMMA_LANES, rest * sizeof(T));
    tile.tail = capped(load(last));
    for (int64_t lane = rest; lane < DGEMMA_LANES; ++lane) tile.tail[lane] = -INFINITY;
    if (kOnlyMax) ordered[0] &= tile.tail == tile.tail;
    max[1] = larger(tile.tail, max[1]);
  }
  tile.max = largest_lane(larger(larger(max[0], max[1]), larger(max[2], max[3])));
  if (kOnlyMax) tile.ordered = !any_lane(~(ordered[0] & ordered[1]));
}

template <Reading kReading, bool kCutoff, class T>
void read_tile(const RowStatsParams& params, const Row& row, int64_t index, Tile& tile) {
  const T* logits = reinterpret_cast<const T*>(row.logits) + index * kHostTile;
  const int64_t left = params.vocab - index * kHostTile;
  const int64_t count = left < kHostTile ? left : kHostTile;
  if (params.softcap > 0)
    read_tile<T, true, kCutoff, kReading>(logits, count, params.softcap, row.cutoff, tile);
  else
    read_tile<T, false, kCutoff, kReading>(logits, count, 1.0f, row.cutoff, tile);
}

template <Reading kReading, bool kCutoff>
void read_tile(const RowStatsParams& params, const Row& row, int64_t index, Tile& tile) {
  switch (params.dtype) {
    case Dtype::kFloat32: return read_tile<kReading, kCutoff, float>(params, row, index, tile);
    case Dtype::kFloat16: return read_tile<kReading, kCutoff, Float16>(params, row, index, tile);
    case Dtype::kBFloat16: return read_tile<kReading, kCutoff, Bfloat16>(params, row, index, tile);
  }
}

// Whether there is no NaN in a tile that was kept.
bool is_ordered(const Tile& tile) {
  VectorInt ordered = VectorInt{} - 1;
  for (int64_t i = 0; i <= tile.full; ++i) {
    const Vector x = tile.at(i);
    ordered &= x == x;
  }
  return !any_lane(~ordered);
}

struct Power {
  Vector t, e;  // the exponent, and 2 to it
};

// Of a difference of logits. Bounded, t is kLowestPower at least; else it may be -inf.
template <bool kBounded>
DGEMMA_HD Power power_of(Vector difference, float factor) {
  const Vector t = difference * factor;
#if DGEMMA_HAS_EXP2_OF_ANY
  if (!kBounded) return {t, exp2_of_any(t)};
#endif
  const Vector bounded = at_least(t, kLowestPower);
  return {bounded, exp2_of_difference(bounded)};
}

template <bool kTwoTemperatures>
struct PowerSums {
  float stats, sampling;  // the factors of both temperatures
  Vector z[kChains] = {}, s[kChains] = {}, mass[kChains] = {};
  CarryingSum all_z = {}, all_s = {}, all_mass = {};

  template <bool kBounded>
  DGEMMA_MEMBER void take(Vector difference, int c) {
    const Power power = power_of<kBounded>(difference, stats);
    z[c] += power.e;
    s[c] += power.t * power.e;
    if (kTwoTemperatures) mass[c] += power_of<kBounded>(difference, sampling).e;
  }

  DGEMMA_MEMBER static void add_up(Vector* chains, CarryingSum& all) {
    all.add((chains[0] + chains[1]) + (chains[2] + chains[3]));
    for (int c = 0; c < kChains; ++c) chains[c] = Vector{};
  }

  DGEMMA_MEMBER void end_round() {
    add_up(z, all_z);
    add_up(s, all_s);
    if (kTwoTemperatures) add_up(mass, all_mass);
  }
};

// z, s and mass of a tile whose max is known. `ahead` is where the next tile begins. Unless it is bounded, s is NaN
// where a logit lies infinitely far below the max.
template <bool kTwoTemperatures, bool kBounded>
__attribute__((noinline)) void add_powers(const Tile& tile, float stats, float sampling, const char* ahead,
                                          int64_t ahead_step, TileStatistics& result) {
#if DGEMMA_HAS_EXP2_OF_ANY
  // Not where the factors are made: that of a huge temperature is no normal number, and no 0 either.
  const FlushToZero flush(!kBounded);
#endif
  const float reference = tile.max < -kLargestFloat ? -kLargestFloat : tile.max;
  PowerSums<kTwoTemperatures> sums{stats, sampling};
  const auto take = [&](int64_t i, int c) DGEMMA_INLINE {
    sums.template take<kBounded>(load(tile.x + i * DGEMMA_LANES) - reference, c);
  };
  int64_t i = 0;
  for (; i + kChains * kRound <= tile.full; sums.end_round()) {
    for (int n = 0; n < kRound; ++n, i += kChains) {
      for (int c = 0; c < kChains; ++c) {
        take(i + c, c);
        __builtin_prefetch(ahead + (i + c) * ahead_step);
      }
    }
  }
  for (; i + kChains <= tile.full; i += kChains)
    for (int c = 0; c < kChains; ++c) take(i + c, c);
  for (; i < tile.full; ++i) take(i, 0);
  // After the row's end it is -inf.
  sums.template take<true>(tile.tail - reference, 1);
  sums.end_round();
  result.z = sum_of_lanes(sums.all_z.sum);
  result.s = sum_of_lanes(sums.all_s.sum) * 0.693147180559945f;
  result.mass = kTwoTemperatures ? sum_of_lanes(sums.all_mass.sum) : result.z;
}

// A bound costs a tenth of the time, so it comes with the first tile that turns out to need it, and stays for the next.
template <bool kTwoTemperatures>
void add_powers(const Tile& tile, float stats, float sampling, const char* ahead, int64_t ahead_step, bool& bounded,
                TileStatistics& result) {
  if (!bounded) {
    add_powers<kTwoTemperatures, false>(tile, stats, sampling, ahead, ahead_step, result);
    bounded = isnan(result.s) && !isnan(result.z);
    if (!bounded) return;
  }
  add_powers<kTwoTemperatures, true>(tile, stats, sampling, ahead, ahead_step, result);
}

DGEMMA_HD TileStatistics* tiles_of(const RowStatsParams& params, int64_t row) {
  return static_cast<TileStatistics*>(params.workspace) + row * host_tiles(params);
}

// A tile this far below another one, in powers of e, holds less than 2^31 e^-60 < 2e-17 of the row's mass: nothing
// that a sum, an entropy or a draw could see.
constexpr float kNegligible = -60.0f;

template <bool kCutoff>
void run_segment(const RowStatsParams& params, bool statistics, int64_t row_index, int64_t segment) {
  const Row row = row_of(params, row_index);
  const bool powers = statistics || !row.greedy;
  const int64_t size = element_size(params.dtype), tiles = host_tiles(params);
  const int64_t first = segment * kHostSegment;
  const int64_t end = first + kHostSegment < tiles ? first + kHostSegment : tiles;
  const float slower = row.inverse_stats < row.inverse_sampling ? row.inverse_stats : row.inverse_sampling;
  float highest = -INFINITY;
  const float stats = power_factor(row.inverse_stats), sampling = power_factor(row.inverse_sampling);
  // Where a difference of logits that is no normal number makes a power of its own, it must not be flushed. What is left
  // out lies infinitely far below the max.
  bool bounded = !DGEMMA_HAS_EXP2_OF_ANY || kCutoff || larger(stats, sampling) > 0x1p100f;
  Tile tile;
  for (int64_t index = first; index < end; ++index) {
    TileStatistics& result = tiles_of(params, row_index)[index];
    result = TileStatistics{-INFINITY, -INFINITY, 0, 0, 0};
    if (powers)
      read_tile<Reading::kPowers, kCutoff>(params, row, index, tile);
    else
      read_tile<Reading::kMax, kCutoff>(params, row, index, tile);
    result.max = tile.max;
    highest = larger(tile.max, highest);
    if (!powers || scaled_difference(tile.max, highest, slower) < kNegligible) {
      // Powers show a NaN by themselves; without them it has to be looked for.
      const bool ordered = powers ? is_ordered(tile) : tile.ordered;
      if (!ordered) result.z = result.mass = NAN;
      continue;
    }
    const char* ahead = row.logits + (index + 1) * kHostTile * size;
    if (row.two_temperatures)
      add_powers<true>(tile, stats, sampling, ahead, DGEMMA_LANES * size, bounded, result);
    else
      add_powers<false>(tile, stats, sampling, ahead, DGEMMA_LANES * size, bounded, result);
  }
}

DGEMMA_HD double weight(float d) { return d < kLowestExponent ? 0.0 : exp(double(d)); }

struct Top {
  int64_t first;  // the first place of the tile's maximum
  float second;   // the largest of the others
};

Top top_of(const Tile& tile) {
  Top result{0, -INFINITY};
  Vector second = splat(-INFINITY);
  int64_t equal = 0;
  for (int64_t i = 0; i <= tile.full; ++i) {
    const Vector x = tile.at(i);
    const VectorInt same = x == tile.max;
    second = larger(same ? splat(-INFINITY) : x, second);
    if (!any_lane(same)) continue;
    for (int lane = 0; lane < DGEMMA_LANES; ++lane)
      if (same[lane] && equal++ == 0) result.first = i * DGEMMA_LANES + lane;
  }
  result.second = equal > 1 ? tile.max : largest_lane(second);
  return result;
}

// The first token of the tile at which the cumulated mass exceeds `target`, never one without mass.
int64_t invert_tile(const Tile& tile, float max, float inverse_sampling, double target) {
  const float factor = power_factor(inverse_sampling);
  const auto power = [&](int64_t i) DGEMMA_INLINE {
    return exp2_of_difference(at_least((tile.at(i) - max) * factor, kLowestPower));
  };
  double sum = 0;
  int64_t i = 0;
  // What does not reach the target is passed over, a round of vectors at a time and then one.
  for (; i + kRound <= tile.full; i += kRound) {
    Vector round = power(i);
    for (int n = 1; n < kRound; ++n) round += power(i + n);
    const double own = sum_of_lanes(round);
    if (sum + own > target) break;
    sum += own;
  }
  for (; i <= tile.full; ++i) {
    const Vector e = power(i);
    const double own = sum_of_lanes(e);
    if (!(sum + own > target)) {
      sum += own;
      continue;
    }
    int lane = 0;
    for (int n = 0; n < DGEMMA_LANES; ++n) {
      if (!(e[n] > 0)) continue;
      lane = n;
      sum += e[n];
      if (sum > target) break;
    }
    return i * DGEMMA_LANES + lane;
  }
  // Sums in another order may have reached it: the last with mass.
  for (i = tile.full; i >= 0; --i) {
    const Vector e = power(i);
    for (int lane = DGEMMA_LANES - 1; lane >= 0; --lane)
      if (e[lane] > 0) return i * DGEMMA_LANES + lane;
  }
  return 0;
}

template <bool kCutoff>
void run_finish(const RowStatsParams& params, bool statistics, int64_t row_index) {
  const Row row = row_of(params, row_index);
  const TileStatistics* tiles = tiles_of(params, row_index);
  const int64_t count = host_tiles(params);

  float max = -INFINITY, second = -INFINITY;
  int64_t argmax_tile = 0;
  for (int64_t t = 0; t < count; ++t) {
    second = larger(smaller(tiles[t].max, max), second);
    if (tiles[t].max > max) {
      max = tiles[t].max;
      argmax_tile = t;
    }
  }
  double z = 0, s = 0, mass = 0;
  for (int64_t t = 0; t < count; ++t) {
    const double d = scaled_difference(tiles[t].max, max, row.inverse_stats);
    const double factor = weight(float(d));
    z += tiles[t].z * factor;
    s += (tiles[t].s + tiles[t].z * d) * factor;
    mass += tiles[t].mass * (row.inverse_sampling == row.inverse_stats
                                 ? factor
                                 : weight(scaled_difference(tiles[t].max, max, row.inverse_sampling)));
  }

  Tile tile;
  read_tile<Reading::kPlaces, kCutoff>(params, row, argmax_tile, tile);
  const Top top = top_of(tile);
  second = larger(top.second, second);
  if (row.greedy && !statistics) {
    // No power was summed: z is 0, or NaN where there was one.
    z = z == 0 && fabsf(max) <= kLargestFloat ? 1 : NAN;
  }
  const RowResult result = finish_row(max, second, z, s, row.stats_temperature);
  // Without statistics too, +inf says that the row has no distribution.
  params.entropy[row_index] = statistics || !result.valid ? result.entropy : NAN;
  params.logsumexp[row_index] = statistics ? result.logsumexp : NAN;
  params.top1_prob[row_index] = statistics ? result.top1_prob : NAN;
  params.top2_prob[row_index] = statistics ? result.top2_prob : NAN;
  params.sample_prob[row_index] = statistics ? result.top1_prob : NAN;
  params.argmax[row_index] = params.sample[row_index] = 0;
  if (!result.valid) return;

  const int64_t argmax = argmax_tile * kHostTile + top.first;
  params.argmax[row_index] = params.sample[row_index] = argmax;
  if (row.greedy) return;

  const float uniform = params.uniform ? params.uniform[row_index]
                                       : uniform_from_word(random_words(of_row(params.seed, 0), of_row(params.offset, 0),
                                                                        row_index)
                                                               .word[kWordSample]);
  const double target = double(uniform) * mass;
  double before = 0;
  int64_t chosen = argmax_tile;
  double chosen_before = 0;
  for (int64_t t = 0; t < count; ++t) {
    const double own = tiles[t].mass * weight(scaled_difference(tiles[t].max, max, row.inverse_sampling));
    if (!(own > 0)) continue;
    chosen = t;
    chosen_before = before;
    before += own;
    if (before > target) break;
  }
  if (chosen != argmax_tile) read_tile<Reading::kPlaces, kCutoff>(params, row, chosen, tile);
  const int64_t index = invert_tile(tile, max, row.inverse_sampling, target - chosen_before);
  const float d = scaled_difference(tile.at(index / DGEMMA_LANES)[index % DGEMMA_LANES], max, row.inverse_stats);
  params.sample[row_index] = chosen * kHostTile + index;
  if (statistics) params.sample_prob[row_index] = float(weight(d) / z);
}

}  // namespace

const RowStatsHost DGEMMA_TABLE[] = {{run_segment<false>, run_finish<false>}, {run_segment<true>, run_finish<true>}};

}  // namespace dgemma
