// The sum over a warp, the same in all its lanes.
#pragma once

#include "../hardware.cuh"

namespace dgemma {

template <class T>
DGEMMA_DEVICE T sum_of_warp(T value) {
  DGEMMA_UNROLL
  for (int mask = hw::kWarp / 2; mask > 0; mask /= 2) value += hw::shuffle_xor(value, mask);
  return value;
}

}  // namespace dgemma
