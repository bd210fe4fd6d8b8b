// What a decision means for a row of a block: the same code on the host and on the device.
#pragma once

#include <cmath>

#include "../common/numeric.h"
#include "../params.h"

namespace dgemma {

// What the positions of a row say of it, joined by or.
constexpr uint32_t kMaskLeft = 1, kChanged = 2, kDecidable = 4, kUndecidable = 8;

DGEMMA_HD uint32_t position_bits(const ProgressParams& params, bool active, int64_t position) {
  const int64_t before = params.tokens[position], after = params.new_tokens[position];
  uint32_t bits = before != after ? kChanged : 0;
  if (!params.open[position]) return bits;
  if (after == params.mask_id) bits |= kMaskLeft;
  if (!active || (!params.noise && before != params.mask_id)) return bits;
  return bits | (params.entropy[position] == INFINITY ? kUndecidable : kDecidable);
}

DGEMMA_HD void write_row(const ProgressParams& params, int64_t row, bool active, uint32_t bits) {
  const bool masks_left = bits & kMaskLeft, unchanged = !(bits & kChanged);
  bool ended = params.finished == nullptr ? !masks_left : params.finished[row];
  if (params.ends_unchanged)
    ended = ended || unchanged;
  else
    ended = ended || (unchanged && !(bits & kDecidable) && (params.noise || masks_left));
  ended = active && (params.last || ended);
  const bool undecided = params.noise ? (bits & kUndecidable) != 0 : masks_left;
  params.new_active[row] = active && !ended;
  params.new_stuck[row] = params.stuck[row] || (ended && undecided);
  params.new_nfe[row] = params.nfe[row] + active;
}

}  // namespace dgemma
