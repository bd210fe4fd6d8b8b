// Runs the CUDA kernels of experts on the host: `experts_emulated FOLDER...`, a case per folder.
//
// Where only some cases are run, EMULATED_FORMAT leaves the kernels of other formats uncompiled.
#include "case_files.h"
#include "experts/combine.cuh"
#include "experts/product.cuh"
#include "experts/route.cuh"

namespace dgemma {
namespace {

ExpertsMatrix matrix_of(Case& c, const char* name) {
  ExpertsMatrix matrix;
  matrix.format = WeightFormat(c.integer(name, "_format"));
  matrix.weights = c.tensor<unsigned char>(name);
  matrix.scale = c.tensor<unsigned char>(name, "_scale");
  matrix.scale_by_row = c.integer(name, "_scale_by_row") != 0;
  matrix.global_scale = c.tensor<float>(name, "_global_scale");
  matrix.global_scales = c.integer(name, "_global_scales");
  return matrix;
}

template <class T, WeightFormat kFormat, int kPairs>
void gate_up(const ExpertsParams& p, const ExpertsPlaces& places, T* middle) {
  emulation::run({places.most * experts_blocks_across<true>(p.width), 1, 1}, kExpertsThreads, ExpertsShape<kFormat, kPairs>::kSharedBytes,
                 [&] { experts_gate_up_kernel<T, kFormat, kPairs>(p, places, middle); });
}

template <class T, WeightFormat kFormat, int kPairs>
void down(const ExpertsParams& p, const ExpertsPlaces& places, const T* middle, float* partial) {
  emulation::run({places.most * experts_blocks_across<false>(p.embedding), 1, 1}, kExpertsThreads,
                 ExpertsShape<kFormat, kPairs>::kSharedBytes,
                 [&] { experts_down_kernel<T, kFormat, kPairs>(p, places, middle, partial); });
}

// function(format) with the format as a constant.
template <class Function>
void of_format(WeightFormat format, Function function) {
#if defined(EMULATED_FORMAT)
  constexpr WeightFormat kOnly = WeightFormat(EMULATED_FORMAT);
  if (format != kOnly) emulation::fail("format %d is not compiled in", int(format));
  function(std::integral_constant<WeightFormat, kOnly>());
#else
  switch (format) {
    case WeightFormat::kPlain: return function(std::integral_constant<WeightFormat, WeightFormat::kPlain>());
    case WeightFormat::kFp8: return function(std::integral_constant<WeightFormat, WeightFormat::kFp8>());
    case WeightFormat::kNvfp4: return function(std::integral_constant<WeightFormat, WeightFormat::kNvfp4>());
  }
#endif
}

template <class T, int kPairs>
void run_kernels(Case& c, const ExpertsParams& p, const ExpertsPlaces& places) {
  auto* middle = c.output<T>("middle", places.pairs * p.width);
  auto* partial = c.output<float>("partial", places.pairs * p.embedding);
  emulation::run({p.experts + 1, 1, 1}, kExpertsRouteThreads, uint32_t(experts_route_shared_bytes(p.experts)),
                 [&] { experts_route_kernel(p, places); });
  of_format(p.gate_up.format, [&](auto format) { gate_up<T, decltype(format)::value, kPairs>(p, places, middle); });
  of_format(p.down.format, [&](auto format) { down<T, decltype(format)::value, kPairs>(p, places, middle, partial); });
  emulation::run({p.rows * experts_combine_across(p.embedding), 1, 1}, kExpertsCombineThreads, 0,
                 [&] { experts_combine_kernel<T>(p, partial); });
}

template <class T>
void run_tiles(Case& c, const ExpertsParams& p, const ExpertsPlaces& places) {
  if (places.tile_pairs == kExpertsFew)
    run_kernels<T, kExpertsFew>(c, p, places);
  else
    run_kernels<T, kExpertsMany>(c, p, places);
}

void run_case(const char* folder) {
  Case c(folder);
  ExpertsParams p;
  p.dtype = Dtype(c.integer("dtype"));
  p.rows = c.integer("rows");
  p.top_k = c.integer("top_k");
  p.experts = c.integer("experts");
  p.width = c.integer("width");
  p.embedding = c.integer("embedding");
  p.activation = Activation(c.integer("activation"));
  p.hidden = c.tensor<uint16_t>("hidden");
  p.hidden_stride = c.integer("hidden_stride");
  p.index = c.tensor<int64_t>("index");
  p.choice_weights = c.tensor<unsigned char>("choice_weights");
  p.choice_dtype = Dtype(c.integer("choice_dtype"));
  p.choice_stride0 = c.integer("choice_stride0");
  p.choice_stride1 = c.integer("choice_stride1");
  p.gate_up = matrix_of(c, "gate_up");
  p.down = matrix_of(c, "down");
  p.output = c.output<uint16_t>("output", p.rows * p.embedding);

  const ExpertsWorkspace workspace = experts_workspace(p);
  ExpertsPlaces places;
  places.pairs = workspace.pairs;
  places.most = workspace.most;
  places.tile_pairs = workspace.tile_pairs;
  places.order = c.output<int32_t>("order", places.pairs);
  places.tiles = c.output<int32_t>("tiles", 3 * places.most);
  if (p.dtype == Dtype::kBFloat16)
    run_tiles<Bfloat16>(c, p, places);
  else
#if defined(EMULATED_FORMAT)
    emulation::fail("fp16 is not compiled in");
#else
    run_tiles<Float16>(c, p, places);
#endif
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}
