// The cutoffs of rows of logits on CPU vectors. This file is compiled once per instruction set, so it uses nothing that
// other files could link from it: no standard library templates, no shared inline functions.
//
// Both filters are one search. With S(y) the weights of all logits >= y, 1 each for top-k and e^x for top-p, the cutoff c
// is the least logit above which, ties left out, there is at most the target: k - 1, or the share p of all. Where
// S(y) > target, c >= y, else c < y; so c is enclosed as in a bisection, and what lies outside is left out.
#include "top_k_top_p_host.h"

#include "../common/ordering.h"
#include "../common/vector_math.h"

#if defined(DGEMMA_ISA_AVX512)
#define DGEMMA_TABLE top_k_top_p_host_avx512
#elif defined(DGEMMA_ISA_AVX2)
#define DGEMMA_TABLE top_k_top_p_host_avx2
#else
#define DGEMMA_TABLE top_k_top_p_host_plain
#endif

namespace dgemma {
namespace {

constexpr int64_t kTile = kHostTileVectors * DGEMMA_LANES;
// S is taken at so many places at a time.
constexpr int kPivots = 4;
// So many candidates are put in order.
constexpr int64_t kFew = 32;
// Powers of e below the largest at which a group no longer counts: 2^31 e^-40 < 1e-8.
constexpr float kNegligiblePower = 4.2e-18f;

typedef double VectorDouble __attribute__((vector_size(8 * DGEMMA_LANES)));

DGEMMA_HD void add_to(VectorDouble& sum, Vector value) { sum += __builtin_convertvector(value, VectorDouble); }

DGEMMA_HD double sum_of(const VectorDouble& value) {
  double result = 0;
  for (int lane = 0; lane < DGEMMA_LANES; ++lane) result += value[lane];
  return result;
}

// Weights of logits. A NaN stands for a place without a logit; its weight may be anything.
struct Ones {
  static constexpr bool kCapped = false;
  DGEMMA_MEMBER Vector capped(Vector x) const { return x; }
  DGEMMA_MEMBER Vector of_capped(Vector) const { return splat(1.0f); }
  DGEMMA_MEMBER float logit_of(float) const { return -INFINITY; }
};

template <bool kSoftcap>
struct Powers {
  static constexpr bool kCapped = kSoftcap;
  float softcap, inverse_softcap, max, factor;  // max after softcap

  DGEMMA_MEMBER Vector capped(Vector x) const { return kSoftcap ? tanh(x * inverse_softcap) * softcap : x; }
  // tanh does not rise everywhere by its last bit, and what is above the max would be without bound at low temperatures.
  DGEMMA_MEMBER Vector of_capped(Vector x) const {
    const Vector t = (x - max) * factor;
    return exp2_of_difference(at_least(kSoftcap ? at_most(t, 0.0f) : t, kLowestPower));
  }
  // About where the weight is so large; -inf where that says nothing.
  DGEMMA_MEMBER float logit_of(float weight) const {
    const float x = max + log2f(weight) / factor;
    if (!kSoftcap) return x;
    return fabsf(x) < softcap ? atanhf(x * inverse_softcap) * softcap : -INFINITY;
  }
};

template <class W>
DGEMMA_HD Vector weight_of(const W& weights, Vector x) {
  return weights.of_capped(weights.capped(x));
}

// Some vectors, an even number up to those of a tile, two at a time: take(one, other, weight, other_weight). A softcap has a
// loop of its own, as both at once need more registers than there are.
template <class T, class W, class Take>
DGEMMA_HD void for_weighted(const T* place, int vectors, const W& weights, const Take& take) {
  Vector capped[kHostTileVectors];
  for (int v = 0; W::kCapped && v < vectors; v += 2) {
    Vector one, other;
    load_two(place + v * DGEMMA_LANES, one, other);
    capped[v] = weights.capped(one);
    capped[v + 1] = weights.capped(other);
  }
  for (int v = 0; v < vectors; v += 2) {
    Vector one, other;
    load_two(place + v * DGEMMA_LANES, one, other);
    take(one, other, weights.of_capped(W::kCapped ? capped[v] : one),
         weights.of_capped(W::kCapped ? capped[v + 1] : other));
  }
}

// A row in tiles. The last one is a copy with NaN behind the end, so that all are whole.
template <class T>
struct Tokens {
  const T* logits;
  int64_t full, tiles;
  T last[kTile];

  DGEMMA_MEMBER Tokens(const T* logits, int64_t vocab)
      : logits(logits), full(vocab / kTile), tiles((vocab + kTile - 1) / kTile) {
    __builtin_memset(last, 0xff, sizeof last);
    __builtin_memcpy(last, logits + full * kTile, (vocab - full * kTile) * sizeof(T));
  }
  DGEMMA_MEMBER const T* tile(int64_t i) const { return i < full ? logits + i * kTile : last; }
};

// Bytes by which the first reading fetches ahead, as that of row_stats does.
constexpr int64_t kAhead = 4096;

struct Groups {
  float* maxima;  // a vector for each tile: of the same lane of its vectors; NaN where there is no logit
  int64_t tiles;
};

// The maxima of the row's groups; false where there is a NaN among the logits.
template <class T>
bool read_row(const Tokens<T>& tokens, int64_t vocab, Groups& groups) {
  Lanes unordered = {};
  for (int64_t i = 0; i < tokens.full; ++i) {
    const T* place = tokens.logits + i * kTile;
    Vector max[2];
    load_two(place, max[0], max[1]);
    unordered |= unordered_lanes(max[0], max[1]);
    for (int v = 2; v < kHostTileVectors; v += 2) {
      Vector one, other;
      load_two(place + v * DGEMMA_LANES, one, other);
      unordered |= unordered_lanes(one, other);
      max[0] = larger(one, max[0]);
      max[1] = larger(other, max[1]);
    }
    for (int64_t line = 0; line < kTile * int64_t(sizeof(T)); line += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(place) + kAhead + line);
    store(groups.maxima + i * DGEMMA_LANES, larger(max[1], max[0]));
  }
  bool ordered = !any_of(unordered);
  if (tokens.full < tokens.tiles) {
    for (int64_t i = tokens.full * kTile; i < vocab; ++i) ordered &= !isnan(to_float(tokens.logits[i]));
    Vector max[2];
    load_two(tokens.last, max[0], max[1]);
    for (int v = 2; v < kHostTileVectors; v += 2) {
      Vector one, other;
      load_two(tokens.last + v * DGEMMA_LANES, one, other);
      max[0] = larger(one, max[0]);
      max[1] = larger(other, max[1]);
    }
    store(groups.maxima + tokens.full * DGEMMA_LANES, larger(max[1], max[0]));
  }
  groups.tiles = tokens.tiles;
  return ordered;
}

// Groups of groups.
void read_groups(const Groups& groups, Groups& wide) {
  wide.tiles = (groups.tiles + kHostTileVectors - 1) / kHostTileVectors;
  for (int64_t i = 0; i < wide.tiles; ++i) {
    const int64_t first = i * kHostTileVectors;
    const int64_t end = first + kHostTileVectors < groups.tiles ? first + kHostTileVectors : groups.tiles;
    Vector max = load(groups.maxima + first * DGEMMA_LANES);
    for (int64_t v = first + 1; v < end; ++v) max = larger(load(groups.maxima + v * DGEMMA_LANES), max);
    store(wide.maxima + i * DGEMMA_LANES, max);
  }
}

float largest_of(const Groups& groups) {
  Vector max = splat(-INFINITY);
  for (int64_t i = 0; i < groups.tiles; ++i) max = larger(load(groups.maxima + i * DGEMMA_LANES), max);
  return largest_lane(max);
}

// S(lo).
template <class T, class W>
double mass_of(const Tokens<T>& tokens, const Groups& groups, const W& weights, float lo) {
  VectorDouble sum = {};
  const Vector low = splat(lo), least = splat(kNegligiblePower);
  for (int64_t i = 0; i < tokens.tiles; ++i) {
    const Vector max = load(groups.maxima + i * DGEMMA_LANES);
    const Lanes seen = at_least_lanes(max, low) & at_least_lanes(weight_of(weights, max), least);
    if (!any_of(seen)) continue;
    Vector sums[2] = {};
    const auto take = [&](Vector one, Vector other, Vector weight, Vector other_weight) DGEMMA_INLINE {
      sums[0] = add_where(at_least_lanes(one, low), sums[0], weight);
      sums[1] = add_where(at_least_lanes(other, low), sums[1], other_weight);
    };
    for_weighted(tokens.tile(i), kHostTileVectors, weights, take);
    add_to(sum, sums[0] + sums[1]);
  }
  return sum_of(sum);
}

// S at rising pivots, of a few vectors at a time.
struct Sums {
  Vector pivots[kPivots];
  VectorDouble sums[kPivots];

  DGEMMA_MEMBER explicit Sums(const float* places) {
    for (int j = 0; j < kPivots; ++j) {
      pivots[j] = splat(places[j]);
      sums[j] = VectorDouble{};
    }
  }

  template <class T, class W>
  DGEMMA_MEMBER void add(const T* place, int vectors, const W& weights) {
    Vector own[kPivots] = {};
    const auto take = [&](Vector one, Vector other, Vector weight, Vector other_weight) DGEMMA_INLINE {
      for (int j = 0; j < kPivots; ++j) {
        own[j] = add_where(at_least_lanes(one, pivots[j]), own[j], weight);
        own[j] = add_where(at_least_lanes(other, pivots[j]), own[j], other_weight);
      }
    };
    for_weighted(place, vectors, weights, take);
    for (int j = 0; j < kPivots; ++j) add_to(sums[j], own[j]);
  }
};

// Where the cutoff is: lo <= c < hi, with S(hi) at most the target. A hi of NaN is above all.
struct Interval {
  float lo, hi;
  double above;  // S(hi)

  DGEMMA_MEMBER Lanes of(Vector x) const {
    return lanes_of_first_only(at_least_lanes(x, splat(lo)), at_least_lanes(x, splat(hi)));
  }

  // By sums of what lies inside.
  DGEMMA_MEMBER void narrow(const float* pivots, const VectorDouble* sums, double target) {
    const double known = above;
    for (int j = 0; j < kPivots; ++j) {
      const double all = known + sum_of(sums[j]);
      if (all <= target) {
        hi = pivots[j];
        above = all;
        return;
      }
      lo = pivots[j];
    }
  }
};

DGEMMA_HD float value_of(uint32_t order) { return score_of(~order); }

// Rising places above `from`, up to `to`. One halves the fp32 numbers in between, so that a search ends.
void choose_pivots(float from, float to, float* pivots) {
  const uint32_t low = order_of(from), high = order_of(to);
  const uint32_t middle = low + (high - low) / 2 + 1;
  const float step = (to - from) / kPivots;
  for (int j = 0; j < kPivots; ++j) {
    float pivot = j == 0 ? value_of(middle) : from + step * float(j);
    if (!(pivot > from && pivot <= to)) pivot = value_of(low + uint32_t((uint64_t{high - low} * (j + 1)) / kPivots));
    if (!(pivot > from && pivot <= to)) pivot = value_of(middle);
    int place = j;
    for (; place > 0 && pivots[place - 1] > pivot; --place) pivots[place] = pivots[place - 1];
    pivots[place] = pivot;
  }
}

// Copies what lies in the interval, and closes the last vectors with NaN; returns how many. `out` may be `values`.
int64_t keep(const float* values, int64_t vectors, const Interval& interval, float* out) {
  int64_t count = 0;
  for (int64_t v = 0; v < vectors; ++v) {
    const Vector x = load(values + v * DGEMMA_LANES);
    count += store_lanes(out + count, x, interval.of(x));
  }
  for (int v = 0; v < 2; ++v) store(out + count + v * DGEMMA_LANES, splat(NAN));
  return count;
}

template <class T>
int64_t keep(const Tokens<T>& tokens, const Groups& groups, const Interval& interval, float* out) {
  int64_t count = 0;
  const Vector low = splat(interval.lo);
  for (int64_t i = 0; i < tokens.tiles; ++i) {
    if (!any_of(at_least_lanes(load(groups.maxima + i * DGEMMA_LANES), low))) continue;
    const T* place = tokens.tile(i);
    for (int v = 0; v < kHostTileVectors; v += 2) {
      Vector one, other;
      load_two(place + v * DGEMMA_LANES, one, other);
      count += store_lanes(out + count, one, interval.of(one));
      count += store_lanes(out + count, other, interval.of(other));
    }
  }
  for (int v = 0; v < 2; ++v) store(out + count + v * DGEMMA_LANES, splat(NAN));
  return count;
}

struct Found {
  float cutoff;
  bool exceeded;  // S(cutoff) is above the target, so that no cutoff of more logits can be lower
};

// The cutoff of the values of an interval, at least one, which are overwritten.
template <class W>
Found search(float* values, int64_t count, Interval interval, double target, const W& weights) {
  while (count > kFew) {
    const int64_t vectors = (count + DGEMMA_LANES - 1) / DGEMMA_LANES;
    Vector least = load(values), most = least;
    for (int64_t v = 0; v < vectors; ++v) {
      const Vector x = load(values + v * DGEMMA_LANES);
      most = larger(x, most);
      least = x < least ? x : least;
    }
    const float max = largest_lane(most), min = -largest_lane(-least);
    if (!(min < max)) {
      const double all = interval.above + double(count) * double(weight_of(weights, splat(max))[0]);
      return {max, all > target};
    }
    float pivots[kPivots];
    choose_pivots(min, max, pivots);
    Sums sums(pivots);
    for (int64_t v = 0; v < vectors; v += kHostTileVectors) {
      const int64_t left = (vectors - v + 1) / 2 * 2;
      sums.add(values + v * DGEMMA_LANES, left < kHostTileVectors ? int(left) : kHostTileVectors, weights);
    }
    interval.lo = min;
    interval.narrow(pivots, sums.sums, target);
    const int64_t before = count;
    count = keep(values, vectors, interval, values);
    // Where the processor takes the smallest numbers for 0 they cannot be told apart.
    if (count == before) return {max, false};
  }
  for (int64_t i = 1; i < count; ++i) {
    const float value = values[i];
    int64_t place = i;
    for (; place > 0 && values[place - 1] < value; --place) values[place] = values[place - 1];
    values[place] = value;
  }
  Found found{values[0], false};
  double sum = interval.above;
  for (int64_t i = 0; i < count; i += DGEMMA_LANES) {
    const Vector x = load(values + i), weight = weight_of(weights, x);
    for (int lane = 0; lane < DGEMMA_LANES && i + lane < count; ++lane) {
      if (x[lane] < found.cutoff) {
        if (sum > target) return {found.cutoff, true};
        found.cutoff = x[lane];
      }
      sum += double(weight[lane]);
    }
  }
  found.exceeded = sum > target;
  return found;
}

template <class T>
struct Row {
  const Tokens<T>& tokens;
  Groups groups, wide;
  float max;
  float* candidates;

  // The least logit from `lo` on above which there is at most the target. `lo` is one of them, or -inf.
  template <class W>
  float cutoff(float lo, double target, double all, const W& weights) const {
    // The largest of each group are some of the row's logits, so where they alone exceed the target, all do.
    int64_t places = 0;
    const Groups* const levels[] = {&wide, &groups};
    for (const Groups* level : levels) {
      places = keep(level->maxima, level->tiles, {lo, NAN, 0}, candidates);
      const Found found = search(candidates, places, {lo, NAN, 0}, target, weights);
      if (found.exceeded) lo = found.cutoff;
      if (lo == max) return max;
    }
    const Interval whole{lo, NAN, 0};
    Interval interval = whole;
    // Of many candidates those that are left by a first narrowing are copied. Tokens that all together weigh less than what
    // lies beyond the target are none.
    const double least = (all - target) / double(tokens.tiles * kTile);
    const float from = larger(weights.logit_of(0.95f * float(least)), lo);
    if (from > -INFINITY && from < max && places > groups.tiles) {
      float pivots[kPivots];
      choose_pivots(from, max, pivots);
      Sums sums(pivots);
      const Vector low = splat(pivots[0]);
      for (int64_t i = 0; i < tokens.tiles; ++i)
        if (any_of(at_least_lanes(load(groups.maxima + i * DGEMMA_LANES), low)))
          sums.add(tokens.tile(i), kHostTileVectors, weights);
      if (double(weight_of(weights, splat(from))[0]) < 0.99 * least) interval.lo = from;
      interval.narrow(pivots, sums.sums, target);
    }
    int64_t count = keep(tokens, groups, interval, candidates);
    // By its roundings a share near 1 may not be exceeded at all.
    if (count == 0) count = keep(tokens, groups, interval = whole, candidates);
    return search(candidates, count, interval, target, weights).cutoff;
  }
};

template <class T, class W>
float both_cutoffs(const TopKTopPParams& params, const Row<T>& row, const W& weights) {
  float cutoff = -INFINITY;
  if (params.top_k > 0 && params.top_k <= params.vocab)
    cutoff = row.cutoff(cutoff, double(params.top_k - 1), double(params.vocab), Ones{});
  if (!(params.top_p < 1) || cutoff == row.max) return cutoff;
  // What the other filter has dropped stays dropped, so nothing below its cutoff is looked at.
  const double all = mass_of(row.tokens, row.groups, weights, params.top_k_first ? cutoff : -INFINITY);
  const double target = double(params.top_p) * all;
  // The largest weighs 1.
  return target < 1 ? row.max : row.cutoff(cutoff, target, all, weights);
}

template <class T>
float cutoff_of(const TopKTopPParams& params, const T* logits, float temperature, float* scratch) {
  const Tokens<T> tokens(logits, params.vocab);
  float* maxima = scratch + host_candidates(params.vocab);
  Row<T> row{tokens, {maxima, 0}, {maxima + host_maxima(params.vocab), 0}, 0, scratch};
  const bool ordered = read_row(tokens, params.vocab, row.groups);
  read_groups(row.groups, row.wide);
  row.max = largest_of(row.wide);
  if (temperature == 0) temperature = 1;
  Powers<true> capped{params.softcap, 1.0f / params.softcap, 0, power_factor(inverse_temperature(temperature))};
  capped.max = params.softcap > 0 ? capped.capped(splat(row.max))[0] : row.max;
  if (!ordered || !(fabsf(capped.max / temperature) <= kLargestFloat)) return -INFINITY;
  if (params.softcap > 0) return both_cutoffs(params, row, capped);
  return both_cutoffs(params, row, Powers<false>{0, 0, capped.max, capped.factor});
}

void run_row(const TopKTopPParams& params, int64_t index, float* scratch) {
  const int64_t start = index / params.rows1 * params.stride0 + index % params.rows1 * params.stride1;
  const float temperature = of_row(params.temperature, index);
  const auto cutoff = [&](auto* logits) { return cutoff_of(params, logits + start, temperature, scratch); };
  float& result = params.cutoff[index];
  switch (params.dtype) {
    case Dtype::kFloat32: result = cutoff(static_cast<const float*>(params.logits)); break;
    case Dtype::kFloat16: result = cutoff(static_cast<const Float16*>(params.logits)); break;
    case Dtype::kBFloat16: result = cutoff(static_cast<const Bfloat16*>(params.logits)); break;
  }
}

}  // namespace

const TopKTopPHost DGEMMA_TABLE = {run_row};

}  // namespace dgemma
