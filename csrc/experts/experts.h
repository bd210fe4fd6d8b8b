// Entry points of `experts`; see params.h for the arguments.
#pragma once

#include "../params.h"

namespace dgemma {

#if defined(DGEMMA_WITH_CUDA)
struct ExpertsPlaces;

int64_t experts_cuda_workspace(const ExpertsParams& params);
void experts_cuda(const ExpertsParams& params, void* stream);

void launch_experts_route(const ExpertsParams& params, const ExpertsPlaces& places, void* stream);
template <class T, WeightFormat kFormat>
void launch_experts_gate_up(const ExpertsParams& params, const ExpertsPlaces& places, void* middle, void* stream);
template <class T, WeightFormat kFormat>
void launch_experts_down(const ExpertsParams& params, const ExpertsPlaces& places, const void* middle, float* partial,
                         void* stream);
void launch_experts_combine(const ExpertsParams& params, const float* partial, void* stream);
#endif

}  // namespace dgemma
