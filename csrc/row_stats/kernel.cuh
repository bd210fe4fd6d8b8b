// Statistics of rows of logits. The first kernel reads every logit once and leaves one record per tile; the second
// merges the records of a row, picks the tile that holds the sample and reads that one again.
#pragma once

#include "../common/device/qualifiers.cuh"
#include "../common/device_math.cuh"
#include "../common/philox.h"
#include "../params.h"
#include "config.h"

namespace dgemma {

struct TileRecord {
  TileStatistics stats;
  int32_t argmax;  // index in the vocabulary
};

constexpr int kRowStatsWarps = kRowStatsThreads / hw::kWarp;
static_assert(kRowStatsWarps * sizeof(TileRecord) == kRowStatsTileSharedBytes, "a record per warp");

// Tiles of a row. Rows that start on a 16-byte boundary need no room for elements before their first one.
inline int64_t row_stats_tiles(const RowStatsParams& params) {
  const int64_t size = params.dtype == Dtype::kFloat32 ? 4 : 2;
  const bool aligned = reinterpret_cast<uintptr_t>(params.logits) % 16 == 0 && params.stride0 * size % 16 == 0 &&
                       params.stride1 * size % 16 == 0;
  const int64_t elements = params.vocab + (aligned ? 0 : 16 / size - 1);
  return (elements + kRowStatsTile - 1) / kRowStatsTile;
}

struct RowTemperatures {
  float inverse_stats, inverse_sampling, stats;
  bool greedy, two;
};

DGEMMA_DEVICE RowTemperatures row_temperatures(const RowStatsParams& params, int64_t row) {
  const float temperature = of_row(params.temperature, row);
  RowTemperatures t;
  t.greedy = temperature == 0.0f;
  const float sampling = t.greedy ? 1.0f : temperature;
  t.stats = params.has_stats_temperature ? of_row(params.stats_temperature, row) : sampling;
  t.inverse_stats = inverse_temperature(t.stats);
  t.inverse_sampling = inverse_temperature(sampling);
  t.two = !t.greedy && sampling != t.stats;
  return t;
}

struct DeviceExponential {
  DGEMMA_DEVICE_MEMBER float operator()(float d) const { return exp_device(d); }
};

DGEMMA_DEVICE TileRecord merge_records(const TileRecord& a, const TileRecord& b, const RowTemperatures& t) {
  TileRecord result;
  result.stats = merge(a.stats, b.stats, t.inverse_stats, t.inverse_sampling, t.two, DeviceExponential{});
  const bool second_wins = b.stats.max > a.stats.max || (b.stats.max == a.stats.max && b.argmax < a.argmax);
  result.argmax = second_wins ? b.argmax : a.argmax;
  return result;
}

DGEMMA_DEVICE TileRecord merge_warp(TileRecord record, const RowTemperatures& t) {
  DGEMMA_UNROLL
  for (int mask = 1; mask < hw::kWarp; mask *= 2) {
    TileRecord other;
    other.stats.max = hw::shuffle_xor(record.stats.max, mask);
    other.stats.second = hw::shuffle_xor(record.stats.second, mask);
    other.stats.z = hw::shuffle_xor(record.stats.z, mask);
    other.stats.s = hw::shuffle_xor(record.stats.s, mask);
    other.stats.mass = hw::shuffle_xor(record.stats.mass, mask);
    other.argmax = hw::shuffle_xor(record.argmax, mask);
    // The lower lane is always the first operand, so both lanes compute the same bits.
    record = hw::thread_x() & mask ? merge_records(other, record, t) : merge_records(record, other, t);
  }
  return record;
}

DGEMMA_DEVICE TileRecord empty_record() { return {{-INFINITY, -INFINITY, 0.0f, 0.0f, 0.0f}, 0x7fffffff}; }

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

// After softcap an element outside the row would be finite, so it is told apart by its index.
template <class T>
DGEMMA_DEVICE void cap_vector(const RowVectors<T>& row, int64_t index, float softcap, float inverse_softcap, float* x) {
  constexpr int kElements = RowVectors<T>::kElements;
  const int64_t token = index * kElements - row.head;
  const bool inside = token >= 0 && token + kElements <= row.vocab;
  DGEMMA_UNROLL
  for (int i = 0; i < kElements; ++i) {
    const bool valid = inside || (token + i >= 0 && token + i < row.vocab);
    x[i] = valid ? tanh_device(x[i] * inverse_softcap) * softcap : -INFINITY;
  }
}

template <class T>
DGEMMA_KERNEL row_stats_tile_kernel(RowStatsParams params, int tiles) {
  constexpr int kElements = RowVectors<T>::kElements;
  constexpr int kVectors = kRowStatsPerThread / kElements;
  const int64_t row_index = hw::block_x() / tiles;
  const int tile = int(hw::block_x() % tiles);
  const int thread = hw::thread_x();
  const RowTemperatures t = row_temperatures(params, row_index);
  const RowVectors<T> row(params, row_index);
  const int64_t first = int64_t{tile} * kRowStatsTile / kElements + thread;

  float x[kRowStatsPerThread];
  DGEMMA_UNROLL
  for (int v = 0; v < kVectors; ++v) read_vector(row, first + v * kRowStatsThreads, x + v * kElements);
  if (params.softcap > 0) {
    const float inverse = 1.0f / params.softcap;
    DGEMMA_UNROLL
    for (int v = 0; v < kVectors; ++v)
      cap_vector(row, first + v * kRowStatsThreads, params.softcap, inverse, x + v * kElements);
  }

  TileRecord record = empty_record();
  int best = 0;
  DGEMMA_UNROLL
  for (int i = 0; i < kRowStatsPerThread; ++i) {
    record.stats.second = larger(record.stats.second, smaller(x[i], record.stats.max));
    best = x[i] > record.stats.max ? i : best;
    record.stats.max = larger(x[i], record.stats.max);
  }
  record.argmax = int((first + best / kElements * kRowStatsThreads) * kElements + best % kElements - row.head);

  const float reference = record.stats.max < -kLargestFloat ? -kLargestFloat : record.stats.max;
  DGEMMA_UNROLL
  for (int i = 0; i < kRowStatsPerThread; ++i) {
    const float difference = (x[i] - reference) * t.inverse_stats;
    const float d = difference < -200.0f ? -200.0f : difference;
    const float e = exp_device(d);
    record.stats.z += e;
    record.stats.s += d * e;
  }
  if (t.two) {
    DGEMMA_UNROLL
    for (int i = 0; i < kRowStatsPerThread; ++i)
      record.stats.mass += exp_device(scaled_difference(x[i], record.stats.max, t.inverse_sampling));
  }

  record = merge_warp(record, t);
  const hw::Shared<TileRecord> warps{0};
  if (thread % hw::kWarp == 0) warps.store(thread / hw::kWarp, record);
  hw::sync_block();
  if (thread >= hw::kWarp) return;
  record = merge_warp(thread < kRowStatsWarps ? warps.load(thread) : empty_record(), t);
  if (!t.two) record.stats.mass = record.stats.z;
  if (thread == 0) static_cast<TileRecord*>(params.workspace)[row_index * tiles + tile] = record;
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
  double z;         // sum of exponentials at the stats temperature
  double target;    // mass to pass inside the tile
  float max;
  int32_t tile;     // -1: nothing to draw
};

// Sampling mass of a tile relative to the row's maximum; 0 where no token of it has a normal probability.
DGEMMA_DEVICE double tile_mass(const TileRecord& record, float max, const RowTemperatures& t) {
  const float d = scaled_difference(record.stats.max, max, t.inverse_sampling);
  return d < kLowestExponent ? 0.0 : double(record.stats.mass) * double(exp_device(d));
}

// The first tile at which the cumulated mass exceeds uniform * total, by warp 0.
DGEMMA_DEVICE void choose_tile(const TileRecord* records, int tiles, float uniform, const RowTemperatures& t,
                               RowPlan& plan) {
  const int lane = hw::thread_x() % hw::kWarp;
  double total = 0;
  for (int start = 0; start < tiles; start += hw::kWarp) {
    const double own = start + lane < tiles ? tile_mass(records[start + lane], plan.max, t) : 0.0;
    total += hw::shuffle(scan_warp(own), hw::kWarp - 1);
  }
  const double target = double(uniform) * total;
  double before = 0;
  for (int start = 0; start < tiles; start += hw::kWarp) {
    const double own = start + lane < tiles ? tile_mass(records[start + lane], plan.max, t) : 0.0;
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

DGEMMA_DEVICE RowPlan plan_row(const RowStatsParams& params, int64_t row, const TileRecord* records, int tiles,
                               const RowTemperatures& t) {
  const int lane = hw::thread_x() % hw::kWarp;
  TileRecord merged = empty_record();
  for (int i = lane; i < tiles; i += hw::kWarp) merged = merge_records(merged, records[i], t);
  merged = merge_warp(merged, t);
  const RowResult result =
      finish_row(merged.stats.max, merged.stats.second, merged.stats.z, merged.stats.s, t.stats);
  if (lane == 0) {
    params.entropy[row] = result.entropy;
    params.logsumexp[row] = result.logsumexp;
    params.top1_prob[row] = result.top1_prob;
    params.top2_prob[row] = result.top2_prob;
    params.argmax[row] = params.sample[row] = result.valid ? merged.argmax : 0;
    params.sample_prob[row] = result.top1_prob;
  }
  RowPlan plan{merged.stats.z, 0.0, merged.stats.max, -1};
  if (result.valid && !t.greedy) choose_tile(records, tiles, uniform_of_row(params, row), t, plan);
  return plan;
}

DGEMMA_DEVICE void write_sample(const RowStatsParams& params, int64_t row, int64_t token, float x, const RowPlan& plan,
                                const RowTemperatures& t) {
  params.sample[row] = token;
  params.sample_prob[row] = float(double(exp_device(scaled_difference(x, plan.max, t.inverse_stats))) / plan.z);
}

struct RowShared {
  hw::Shared<RowPlan> plan{0};
  hw::Shared<double> sums{64};          // one per warp
  hw::Shared<int32_t> winner{128};      // one per warp: the thread that holds the sample, or -1
  hw::Shared<int32_t> last{192};        // one per warp: last token with mass
};
static_assert(192 + kRowStatsWarps * sizeof(int32_t) <= kRowStatsRowSharedBytes, "the last of the arrays");

template <class T>
DGEMMA_KERNEL row_stats_row_kernel(RowStatsParams params, int tiles) {
  constexpr int kElements = RowVectors<T>::kElements;
  constexpr int kVectors = kRowStatsPerThread / kElements;
  const int64_t row_index = hw::block_x();
  const int thread = hw::thread_x(), warp = thread / hw::kWarp, lane = thread % hw::kWarp;
  const RowTemperatures t = row_temperatures(params, row_index);
  const TileRecord* records = static_cast<const TileRecord*>(params.workspace) + row_index * tiles;
  const RowShared shared;
  if (warp == 0) {
    const RowPlan plan = plan_row(params, row_index, records, tiles, t);
    if (lane == 0) shared.plan.store(0, plan);
  }
  hw::sync_block();
  const RowPlan plan = shared.plan.load(0);
  if (plan.tile < 0) return;

  const RowVectors<T> row(params, row_index);
  const int64_t first = int64_t{plan.tile} * kRowStatsTile / kElements + thread;
  const float inverse_softcap = params.softcap > 0 ? 1.0f / params.softcap : 0.0f;
  double before = 0;
  int32_t last_token = -1;  // of this thread's, the last with mass
  for (int v = 0; v < kVectors; ++v) {
    float x[kElements];
    read_vector(row, first + v * kRowStatsThreads, x);
    if (params.softcap > 0) cap_vector(row, first + v * kRowStatsThreads, params.softcap, inverse_softcap, x);
    float e[kElements];
    double own = 0;
    int last = -1;
    DGEMMA_UNROLL
    for (int i = 0; i < kElements; ++i) {
      e[i] = exp_device(scaled_difference(x[i], plan.max, t.inverse_sampling));
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
    write_sample(params, row_index, token + chosen, chosen_x, plan, t);
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
  float x = to_float(row.first[last_token + row.head]);
  if (params.softcap > 0) x = tanh_device(x * inverse_softcap) * params.softcap;
  write_sample(params, row_index, last_token, x, plan, t);
}

}  // namespace dgemma
