#include "progress.h"
#include "rules.h"

namespace dgemma {

// A canvas is a few kilobytes: done sooner than another thread wakes up.
void progress_host(const ProgressParams& params) {
  for (int64_t row = 0; row < params.batch; ++row) {
    const bool active = params.active[row];
    uint32_t bits = 0;
    for (int64_t i = 0; i < params.length; ++i) bits |= position_bits(params, active, row * params.length + i);
    write_row(params, row, active, bits);
  }
}

}  // namespace dgemma
