// Entry points of `commit`; see params.h for the arguments.
#pragma once

#include "../params.h"

namespace dgemma {

void commit_host(const CommitParams& params, int threads);

#if defined(DGEMMA_WITH_CUDA)
void commit_cuda(const CommitParams& params, void* stream);
#endif

}  // namespace dgemma
