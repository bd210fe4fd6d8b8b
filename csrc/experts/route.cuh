// Sorts pairs by expert and cuts each expert's stretch into tiles. No launch depends on the counts, which stay on the
// device.
#pragma once

#include "../common/device/qualifiers.cuh"
#include "../common/device/warp_sum.cuh"
#include "../common/hardware.cuh"
#include "../params.h"
#include "config.h"
#include "places.h"

namespace dgemma {

// Loads of a lane that are under way at a time.
constexpr int kRouteAtOnce = 4;

// The experts of pairs 32 apart; `experts` for what is none.
DGEMMA_DEVICE void read_experts(const ExpertsParams& p, int64_t pair, int64_t end, uint32_t (&experts)[kRouteAtOnce]) {
  DGEMMA_UNROLL
  for (int i = 0; i < kRouteAtOnce; ++i, pair += 32) {
    const int64_t expert = pair < end ? p.index[pair] : -1;
    experts[i] = uint32_t(expert >= 0 && expert < p.experts ? expert : p.experts);
  }
}

// One block of threads for each expert, and one more that marks the tiles that are not used. Each counts all pairs:
// that is less work than waiting for another block's counts.
DGEMMA_KERNEL DGEMMA_BOUNDS(kExpertsRouteThreads, 4)
    experts_route_kernel(const ExpertsParams p, const ExpertsPlaces places) {
  const int thread = hw::thread_x(), lane = thread % 32, warp = thread / 32;
  const int own = int(hw::block_x()), bins = int(p.experts) + 1;
  const hw::Shared<int32_t> counts{0};
  const hw::Shared<int32_t> sums{uint32_t(4 * kExpertsRouteWarps * bins)};

  // Every warp counts a stretch of pairs of its own, so nothing is added to by two.
  for (int i = lane; i < bins; i += 32) counts.store(warp * bins + i, 0);
  hw::sync_warp();
  const int64_t stretch = (places.pairs + 32 * kExpertsRouteWarps - 1) / (32 * kExpertsRouteWarps) * 32;
  const int64_t first = warp * stretch, last = first + stretch < places.pairs ? first + stretch : places.pairs;
  for (int64_t pair = first; pair < last; pair += 32 * kRouteAtOnce) {
    uint32_t expert[kRouteAtOnce];
    read_experts(p, pair + lane, last, expert);
    DGEMMA_UNROLL
    for (int i = 0; i < kRouteAtOnce; ++i) {
      const uint32_t equal = hw::lanes_equal(expert[i]);
      if (hw::find_first_set(equal) - 1 == lane) {
        const int bin = warp * bins + int(expert[i]);
        counts.store(bin, counts.load(bin) + hw::count_bits(equal));
      }
      hw::sync_warp();
    }
  }
  hw::sync_block();

  // Pairs and tiles of the experts in front.
  int before = 0, tiles_before = 0;
  for (int expert = thread; expert < own; expert += kExpertsRouteThreads) {
    int count = 0;
    for (int i = 0; i < kExpertsRouteWarps; ++i) count += counts.load(i * bins + expert);
    before += count;
    tiles_before += (count + places.tile_pairs - 1) / places.tile_pairs;
  }
  before = sum_of_warp(before);
  tiles_before = sum_of_warp(tiles_before);
  if (lane == 0) {
    sums.store(warp, before);
    sums.store(kExpertsRouteWarps + warp, tiles_before);
  }
  hw::sync_block();
  int begin = 0, tile = 0, count = 0, place = 0;
  for (int i = 0; i < kExpertsRouteWarps; ++i) {
    begin += sums.load(i);
    tile += sums.load(kExpertsRouteWarps + i);
    const int of_warp = counts.load(i * bins + own);
    if (i < warp) place += of_warp;
    count += of_warp;
  }

  const bool unused = own == p.experts;
  const int64_t end_tile = unused ? places.most : tile + (count + places.tile_pairs - 1) / places.tile_pairs;
  for (int64_t i = tile + thread; i < end_tile; i += kExpertsRouteThreads) {
    places.tiles[i] = unused ? -1 : own;
    places.tiles[places.most + i] = begin + int(i - tile) * places.tile_pairs;
    places.tiles[2 * places.most + i] = begin + count;
  }
  if (unused || counts.load(warp * bins + own) == 0) return;
  place += begin;
  for (int64_t pair = first; pair < last; pair += 32 * kRouteAtOnce) {
    uint32_t expert[kRouteAtOnce];
    read_experts(p, pair + lane, last, expert);
    DGEMMA_UNROLL
    for (int i = 0; i < kRouteAtOnce; ++i) {
      const uint32_t mine = hw::ballot(expert[i] == uint32_t(own));
      const int in_front = hw::count_bits(mine & ((1u << lane) - 1));
      if (mine >> lane & 1) places.order[place + in_front] = int32_t(pair + 32 * i + lane);
      place += hw::count_bits(mine);
    }
  }
}

}  // namespace dgemma
