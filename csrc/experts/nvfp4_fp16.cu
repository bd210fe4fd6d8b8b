#include "launch.cuh"

namespace dgemma {

template void launch_experts_gate_up<Float16, WeightFormat::kNvfp4>(
    const ExpertsParams& params, const ExpertsPlaces& places, void* middle, void* stream);
template void launch_experts_down<Float16, WeightFormat::kNvfp4>(
    const ExpertsParams& params, const ExpertsPlaces& places, const void* middle, float* partial, void* stream);

}  // namespace dgemma
