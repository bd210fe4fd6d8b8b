#include "launch.cuh"

namespace dgemma {

template void launch_experts_gate_up<Bfloat16, WeightFormat::kNvfp4>(
    const ExpertsParams& params, const ExpertsPlaces& places, void* middle, void* stream);
template void launch_experts_down<Bfloat16, WeightFormat::kNvfp4>(
    const ExpertsParams& params, const ExpertsPlaces& places, const void* middle, float* partial, void* stream);

}  // namespace dgemma
