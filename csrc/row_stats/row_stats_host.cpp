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
  float inverse_stats, inverse_sampling, stats_temperature;
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
  result.inverse_stats = inverse_temperature(result.stats_temperature);
  result.inverse_sampling = inverse_temperature(sampling);
  result.two_temperatures = !result.greedy && sampling != result.stats_temperature;
  return result;
}

struct Tile {
  alignas(64) float x[kHostTile];  // logits after softcap; -inf after the end
  int64_t vectors;                 // vectors that hold a logit
};

template <class T, bool kSoftcap>
void read_tile(const T* logits, int64_t count, float softcap, Tile& tile) {
  const float inverse_softcap = 1.0f / softcap;
  const int64_t full = count / DGEMMA_LANES;
  for (int64_t i = 0; i < full; ++i) {
    Vector x = load(logits + i * DGEMMA_LANES);
    if (kSoftcap) x = tanh(x * inverse_softcap) * softcap;
    store(tile.x + i * DGEMMA_LANES, x);
  }
  tile.vectors = full;
  const int64_t rest = count - full * DGEMMA_LANES;
  if (rest == 0) return;
  T last[DGEMMA_LANES] = {};
  __builtin_memcpy(last, logits + full * DGEMMA_LANES, rest * sizeof(T));
  Vector x = load(last);
  if (kSoftcap) x = tanh(x * inverse_softcap) * softcap;
  for (int64_t lane = rest; lane < DGEMMA_LANES; ++lane) x[lane] = -INFINITY;
  store(tile.x + full * DGEMMA_LANES, x);
  ++tile.vectors;
}

template <class T>
void read_tile(const RowStatsParams& params, const Row& row, int64_t index, Tile& tile) {
  const T* logits = reinterpret_cast<const T*>(row.logits) + index * kHostTile;
  const int64_t left = params.vocab - index * kHostTile;
  const int64_t count = left < kHostTile ? left : kHostTile;
  if (params.softcap > 0)
    read_tile<T, true>(logits, count, params.softcap, tile);
  else
    read_tile<T, false>(logits, count, 1.0f, tile);
}

void read_tile(const RowStatsParams& params, const Row& row, int64_t index, Tile& tile) {
  switch (params.dtype) {
    case Dtype::kFloat32: return read_tile<float>(params, row, index, tile);
    case Dtype::kFloat16: return read_tile<Float16>(params, row, index, tile);
    case Dtype::kBFloat16: return read_tile<Bfloat16>(params, row, index, tile);
  }
}

template <bool kTwoTemperatures>
TileStatistics statistics_of(const Tile& tile, const Row& row) {
  Vector max = splat(-INFINITY), second = max;
  for (int64_t i = 0; i < tile.vectors; ++i) {
    const Vector x = load(tile.x + i * DGEMMA_LANES);
    second = larger(second, smaller(x, max));
    max = larger(x, max);
  }
  TileStatistics result{-INFINITY, -INFINITY, 0, 0, 0};
  for (int lane = 0; lane < DGEMMA_LANES; ++lane) {
    result.second = larger(larger(result.second, second[lane]), smaller(max[lane], result.max));
    result.max = larger(max[lane], result.max);
  }

  const float reference = result.max < -kLargestFloat ? -kLargestFloat : result.max;
  Vector z = {}, s = {}, mass = {};
  for (int64_t i = 0; i < tile.vectors; ++i) {
    const Vector difference = load(tile.x + i * DGEMMA_LANES) - reference;
    const Vector d = at_least(difference * row.inverse_stats, -200.0f);
    const Vector e = exp_of_difference(d);
    z += e;
    s += d * e;
    if (kTwoTemperatures) mass += exp_of_difference(at_least(difference * row.inverse_sampling, -200.0f));
  }
  for (int lane = 0; lane < DGEMMA_LANES; ++lane) {
    result.z += z[lane];
    result.s += s[lane];
    result.mass += kTwoTemperatures ? mass[lane] : z[lane];
  }
  return result;
}

DGEMMA_HD TileStatistics* tiles_of(const RowStatsParams& params, int64_t row) {
  return static_cast<TileStatistics*>(params.workspace) + row * host_tiles(params);
}

void run_tile(const RowStatsParams& params, int64_t row_index, int64_t index) {
  const Row row = row_of(params, row_index);
  Tile tile;
  read_tile(params, row, index, tile);
  tiles_of(params, row_index)[index] =
      row.two_temperatures ? statistics_of<true>(tile, row) : statistics_of<false>(tile, row);
}

DGEMMA_HD double weight(float d) { return d < kLowestExponent ? 0.0 : exp(double(d)); }

int64_t first_equal(const Tile& tile, float value) {
  for (int64_t i = 0; i < tile.vectors * DGEMMA_LANES; ++i)
    if (tile.x[i] == value) return i;
  return 0;
}

// The first token of the tile at which the cumulated mass exceeds `target`, never one without mass.
int64_t invert_tile(Tile& tile, float max, float inverse_sampling, double target) {
  int64_t last = 0;
  double sum = 0;
  for (int64_t i = 0; i < tile.vectors; ++i) {
    const Vector x = load(tile.x + i * DGEMMA_LANES);
    const Vector e = exp_of_difference(at_least((x - max) * inverse_sampling, -200.0f));
    for (int lane = 0; lane < DGEMMA_LANES; ++lane) {
      if (!(e[lane] > 0)) continue;
      last = i * DGEMMA_LANES + lane;
      sum += e[lane];
      if (sum > target) return last;
    }
  }
  return last;
}

void run_finish(const RowStatsParams& params, int64_t row_index) {
  const Row row = row_of(params, row_index);
  const TileStatistics* tiles = tiles_of(params, row_index);
  const int64_t count = host_tiles(params);

  float max = -INFINITY, second = -INFINITY;
  int64_t argmax_tile = 0;
  for (int64_t t = 0; t < count; ++t) {
    second = larger(larger(second, tiles[t].second), smaller(tiles[t].max, max));
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
    mass += tiles[t].mass * weight(scaled_difference(tiles[t].max, max, row.inverse_sampling));
  }

  const RowResult result = finish_row(max, second, z, s, row.stats_temperature);
  params.entropy[row_index] = result.entropy;
  params.logsumexp[row_index] = result.logsumexp;
  params.top1_prob[row_index] = result.top1_prob;
  params.top2_prob[row_index] = result.top2_prob;
  params.argmax[row_index] = params.sample[row_index] = 0;
  params.sample_prob[row_index] = 0;
  if (!result.valid) return;

  Tile tile;
  read_tile(params, row, argmax_tile, tile);
  const int64_t argmax = argmax_tile * kHostTile + first_equal(tile, max);
  params.argmax[row_index] = argmax;
  params.sample[row_index] = argmax;
  params.sample_prob[row_index] = result.top1_prob;
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
  if (chosen != argmax_tile) read_tile(params, row, chosen, tile);
  const int64_t index = invert_tile(tile, max, row.inverse_sampling, target - chosen_before);
  const float d = scaled_difference(tile.x[index], max, row.inverse_stats);
  params.sample[row_index] = chosen * kHostTile + index;
  params.sample_prob[row_index] = float(weight(d) / z);
}

}  // namespace

const RowStatsHost DGEMMA_TABLE = {run_tile, run_finish};

}  // namespace dgemma
