// A loop over independent items on a few threads.
#pragma once

#include <cstdint>
#include <functional>

namespace dgemma {

// Calls body(first, last) for ranges that cover [0, count), `grain` items at most each, on up to `threads`
// threads including the caller's: those of PyTorch's OpenMP where it is loaded, else of a pool. Returns when all are done.
// The body must not throw.
void parallel_for(int64_t count, int64_t grain, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace dgemma
