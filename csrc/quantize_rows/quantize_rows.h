// Entry point of `quantize_rows`; see params.h for the arguments.
#pragma once

#include "../params.h"

namespace dgemma {

#if defined(DGEMMA_WITH_CUDA)
void quantize_rows_cuda(const QuantizeRowsParams& params, void* stream);
#endif

}  // namespace dgemma
