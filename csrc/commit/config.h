// Shape of the commit kernel.
#pragma once

#include <cstdint>

namespace dgemma {

// One thread per position, so a block ranks at most this many.
constexpr int64_t kCommitMaxLength = 1024;

// Dynamic shared memory, bytes: 24 per thread, and two arrays per warp with two scalars.
constexpr int commit_shared_bytes(int threads) { return threads * 24 + 512; }

}  // namespace dgemma
