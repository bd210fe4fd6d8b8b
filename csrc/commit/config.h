// Shape of the commit kernel.
#pragma once

#include <cstdint>

namespace dgemma {

// One thread per position, so a block ranks at most this many.
constexpr int64_t kCommitMaxLength = 1024;

// Threads of a block: one warp, or 8, 16 or 32.
constexpr int commit_threads(int64_t length) {
  return length <= 32 ? 32 : length <= 256 ? 256 : length <= 512 ? 512 : 1024;
}

// Dynamic shared memory, bytes: five arrays with a value per thread, three with a value per warp, and one number.
constexpr int commit_shared_bytes(int threads) { return threads * 24 + 528; }

}  // namespace dgemma
