// Shape of the commit kernel.
#pragma once

#include <cstdint>

namespace dgemma {

// One thread per position, so a block ranks at most this many.
constexpr int64_t kCommitMaxLength = 1024;

// Threads of a block: the sort wants a power of two, and whole warps.
constexpr int commit_threads(int64_t length) {
  int threads = 32;
  while (threads < length) threads *= 2;
  return threads;
}

// Dynamic shared memory, bytes: five arrays with a value per thread, three with a value per warp, and one number.
constexpr int commit_shared_bytes(int threads) { return threads * 24 + 528; }

}  // namespace dgemma
