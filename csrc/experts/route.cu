#include "route.cuh"

#include "../common/cuda_check.h"
#include "experts.h"

namespace dgemma {

void launch_experts_route(const ExpertsParams& params, const ExpertsPlaces& places, void* stream) {
  launch("experts", experts_route_kernel, dim3(unsigned(params.experts + 1)), kExpertsRouteThreads,
         size_t(experts_route_shared_bytes(params.experts)), stream, params, places);
}

}  // namespace dgemma
