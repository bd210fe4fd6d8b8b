#if defined(DGEMMA_WITH_CUDA)
#include <stdexcept>
#include <string>

#include "../common/numeric.h"
#include "experts.h"
#include "places.h"

namespace dgemma {
namespace {

template <class T>
void launch_products(const ExpertsParams& params, const ExpertsPlaces& places, char* middle, float* partial,
                     void* stream) {
  constexpr auto kPlain = WeightFormat::kPlain, kFp8 = WeightFormat::kFp8, kNvfp4 = WeightFormat::kNvfp4;
  switch (params.gate_up.format) {
    case kPlain: launch_experts_gate_up<T, kPlain>(params, places, middle, stream); break;
    case kFp8: launch_experts_gate_up<T, kFp8>(params, places, middle, stream); break;
    case kNvfp4: launch_experts_gate_up<T, kNvfp4>(params, places, middle, stream); break;
  }
  switch (params.down.format) {
    case kPlain: return launch_experts_down<T, kPlain>(params, places, middle, partial, stream);
    case kFp8: return launch_experts_down<T, kFp8>(params, places, middle, partial, stream);
    case kNvfp4: return launch_experts_down<T, kNvfp4>(params, places, middle, partial, stream);
  }
}

}  // namespace

int64_t experts_cuda_workspace(const ExpertsParams& params) { return experts_workspace(params).bytes; }

void experts_cuda(const ExpertsParams& params, void* stream) {
  if (params.experts > kExpertsMost || params.width % 32 || params.embedding % 32)
    throw std::runtime_error("experts: " + std::to_string(params.experts) + " experts of " +
                             std::to_string(params.width) + " x " + std::to_string(params.embedding) +
                             ", supported are " + std::to_string(kExpertsMost) + " and multiples of 32");
  // Offsets within a matrix of one expert are 32 bits wide.
  if (2 * params.width * params.embedding >= int64_t(1) << 31)
    throw std::runtime_error("experts: matrices of " + std::to_string(2 * params.width * params.embedding) +
                             " numbers, at most 2^31 - 1 are supported");
  const ExpertsWorkspace workspace = experts_workspace(params);
  const ExpertsPlaces places = experts_places(params, workspace);
  char* memory = static_cast<char*>(params.workspace);
  char* middle = memory + workspace.middle;
  float* partial = reinterpret_cast<float*>(memory + workspace.partial);
  launch_experts_route(params, places, stream);
  switch (params.dtype) {
    case Dtype::kBFloat16: launch_products<Bfloat16>(params, places, middle, partial, stream); break;
    case Dtype::kFloat16: launch_products<Float16>(params, places, middle, partial, stream); break;
    case Dtype::kFloat32: throw std::runtime_error("experts: fp32 has no CUDA kernel");
  }
  launch_experts_combine(params, partial, stream);
}

}  // namespace dgemma
#endif
