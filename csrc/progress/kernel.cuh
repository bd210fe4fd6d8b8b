// A warp looks through one row of the batch.
#pragma once

#include "../common/hardware.cuh"
#include "rules.h"

namespace dgemma {

DGEMMA_KERNEL progress_kernel(const ProgressParams params) {
  const int64_t row = hw::block_x();
  const bool active = params.active[row];
  uint32_t bits = 0;
  for (int64_t i = hw::thread_x(); i < params.length; i += hw::kWarp)
    bits |= position_bits(params, active, row * params.length + i);
  for (int mask = hw::kWarp / 2; mask > 0; mask /= 2) bits |= hw::shuffle_xor(bits, mask);
  if (hw::thread_x() == 0) write_row(params, row, active, bits);
}

}  // namespace dgemma
