// Entry points of `commit`; see params.h for the arguments.
#pragma once

#include "../params.h"

namespace dgemma {

void commit_host(const CommitParams& params, int threads);

#if defined(DGEMMA_WITH_CUDA)
// Longest canvas that the CUDA kernel sorts: one position per thread of a block.
constexpr int64_t kCommitMaxLength = 1024;
void commit_cuda(const CommitParams& params, void* stream);
#endif

}  // namespace dgemma
