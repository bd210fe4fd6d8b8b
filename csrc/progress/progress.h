// Entry points of `progress`; see params.h for the arguments.
#pragma once

#include "../params.h"

namespace dgemma {

void progress_host(const ProgressParams& params);

#if defined(DGEMMA_WITH_CUDA)
void progress_cuda(const ProgressParams& params, void* stream);
#endif

}  // namespace dgemma
