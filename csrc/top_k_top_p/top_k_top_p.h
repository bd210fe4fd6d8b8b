// Entry points of `top_k_top_p`; see params.h for the arguments.
#pragma once

#include <string>

#include "../params.h"

namespace dgemma {

void top_k_top_p_host(const TopKTopPParams& params, int threads, const std::string& isa);
#if defined(DGEMMA_WITH_CUDA)
void top_k_top_p_cuda(const TopKTopPParams& params, void* stream);
#endif

}  // namespace dgemma
