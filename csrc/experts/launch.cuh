// The launches of one format's products; each file that includes this holds one instantiation.
#pragma once

#include <stdexcept>
#include <string>

#include "../common/cuda_check.h"
#include "experts.h"
#include "product.cuh"

namespace dgemma {

template <bool kGated>
unsigned blocks_of_product(const ExpertsPlaces& places, int64_t columns) {
  const int64_t blocks = places.most * experts_blocks_across<kGated>(columns);
  if (blocks > 0x7fffffff)
    throw std::runtime_error("experts: " + std::to_string(blocks) + " blocks of threads, at most 2^31 - 1");
  return unsigned(blocks);
}

template <class T, WeightFormat kFormat>
void launch_experts_gate_up(const ExpertsParams& params, const ExpertsPlaces& places, void* middle, void* stream) {
  const auto launch_tiles = [&](auto kernel, int shared_bytes) {
    launch("experts", kernel, dim3(blocks_of_product<true>(places, params.width)), kExpertsThreads, shared_bytes,
           stream, params, places, static_cast<T*>(middle));
  };
  if (places.tile_pairs == kExpertsFew)
    launch_tiles(experts_gate_up_kernel<T, kFormat, kExpertsFew>, ExpertsShape<kFormat, kExpertsFew>::kSharedBytes);
  else
    launch_tiles(experts_gate_up_kernel<T, kFormat, kExpertsMany>, ExpertsShape<kFormat, kExpertsMany>::kSharedBytes);
}

template <class T, WeightFormat kFormat>
void launch_experts_down(const ExpertsParams& params, const ExpertsPlaces& places, const void* middle, float* partial,
                         void* stream) {
  const auto launch_tiles = [&](auto kernel, int shared_bytes) {
    launch("experts", kernel, dim3(blocks_of_product<false>(places, params.embedding)), kExpertsThreads, shared_bytes,
           stream, params, places, static_cast<const T*>(middle), partial);
  };
  if (places.tile_pairs == kExpertsFew)
    launch_tiles(experts_down_kernel<T, kFormat, kExpertsFew>, ExpertsShape<kFormat, kExpertsFew>::kSharedBytes);
  else
    launch_tiles(experts_down_kernel<T, kFormat, kExpertsMany>, ExpertsShape<kFormat, kExpertsMany>::kSharedBytes);
}

}  // namespace dgemma
