// Shape of the commit kernel.
#pragma once

#include <cstdint>

namespace dgemma {

// One thread per position, so a block ranks at most this many.
constexpr int64_t kCommitMaxLength = 1024;

}  // namespace dgemma
