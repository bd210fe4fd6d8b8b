// Runs block_attention's kernels on cases from files: `block_attention FOLDER...`.
//
// Tensors are raw storage, and their lines in `case` say where in it they lie. Where only one kind of case is run,
// EMULATED_HEAD_DIM, EMULATED_BFLOAT16 and EMULATED_WGMMA leave the other kernels uncompiled.
#include "block_attention/kernel.cuh"
#include "block_attention/merge.cuh"
#include "block_attention/sm_90a/kernel.cuh"
#include "block_attention/sm_90a/kernel_hd256.cuh"
#include "case_files.h"

namespace dgemma {
namespace {

HeadsView view(Case& c, const char* name) {
  HeadsView result;
  if (!c.has(name)) return result;
  result.data = c.tensor<char>(name) + c.integer(name) * 2;
  result.batch_stride = int64_t(c.number(name, 1));
  result.head_stride = int64_t(c.number(name, 2));
  result.slot_stride = int64_t(c.number(name, 3));
  result.aligned = c.number(name, 4) != 0;
  return result;
}

template <class Shape>
int64_t tiles_of_rows(const BlockAttentionParams& p) {
  const int64_t rows = p.query_heads / p.kv_heads * p.length;
  return (rows + Shape::kRows - 1) / Shape::kRows * p.batch * p.kv_heads;
}

template <class T, int kHeadDim>
void run(const BlockAttentionParams& p, bool wgmma) {
#if defined(EMULATED_WGMMA)
  if (!wgmma) emulation::fail("the portable kernel is not compiled in");
#else
  if (!wgmma) {
    using Shape = BlockAttentionShape<kHeadDim>;
    emulation::run({tiles_of_rows<Shape>(p), p.splits, 1}, Shape::kThreads, Shape::kSharedBytes,
                   [&] { block_attention_kernel<T, kHeadDim>(p); });
    return;
  }
#endif
  if constexpr (kHeadDim >= 256) {
    using Shape = BlockAttentionWgmmaShape<kHeadDim>;
    emulation::run({tiles_of_rows<Shape>(p) * Shape::kCluster, p.splits, 1}, Shape::kThreads, Shape::kSharedBytes,
                   [&] {
                     if constexpr (Shape::kCluster == 1)
                       block_attention_wgmma_kernel<T>(p);
                     else
                       block_attention_cluster_kernel<T>(p);
                   },
                   Shape::kCluster);
  } else {
    emulation::fail("head_dim %d has no wgmma kernel", kHeadDim);
  }
}

template <class T, int kHeadDim>
void run_and_merge(const BlockAttentionParams& p, bool wgmma) {
  run<T, kHeadDim>(p, wgmma);
  if (p.splits == 1) return;
  const int64_t rows_per_block = kBlockAttentionMergeThreads / (kHeadDim / 4);
  emulation::run({(p.batch * p.query_heads * p.length + rows_per_block - 1) / rows_per_block, 1, 1},
                 kBlockAttentionMergeThreads, 0, [&] { block_attention_merge_kernel<T>(p); });
}

template <class T>
void run_head_dim(const BlockAttentionParams& p, bool wgmma) {
#if defined(EMULATED_HEAD_DIM)
  if (p.head_dim == EMULATED_HEAD_DIM) return run_and_merge<T, EMULATED_HEAD_DIM>(p, wgmma);
#else
  switch (p.head_dim) {
    case 64: return run_and_merge<T, 64>(p, wgmma);
    case 128: return run_and_merge<T, 128>(p, wgmma);
    case 256: return run_and_merge<T, 256>(p, wgmma);
    case 512: return run_and_merge<T, 512>(p, wgmma);
  }
#endif
  emulation::fail("head_dim %lld is not compiled in", (long long)p.head_dim);
}

void run_case(const char* folder) {
  Case c(folder);
  BlockAttentionParams p;
  p.dtype = Dtype(c.integer("dtype"));
  p.batch = c.integer("batch");
  p.query_heads = c.integer("query_heads");
  p.kv_heads = c.integer("kv_heads");
  p.length = c.integer("length");
  p.head_dim = c.integer("head_dim");
  p.prefix_length = c.integer("prefix_length");
  p.query = view(c, "query");
  p.key = view(c, "key");
  p.value = view(c, "value");
  p.prefix_key = view(c, "prefix_key");
  p.prefix_value = view(c, "prefix_value");
  p.prefix_start = c.tensor<int32_t>("prefix_start");
  p.prefix_end = c.tensor<int32_t>("prefix_end");
  p.scale = float(c.number("scale"));
  p.softcap = float(c.number("softcap"));
  p.causal = c.number("causal") != 0;
  if (c.has("window")) p.window = c.integer("window");
  p.splits = c.integer("splits");
  const int64_t rows = p.batch * p.query_heads * p.length, elements = rows * p.head_dim;
  p.output = c.output<uint16_t>("output", elements);
  p.lse = c.output<float>("lse", rows);
  if (p.splits > 1) {
    p.partial_output = c.output<float>("partial_output", elements * p.splits);
    p.partial_lse = c.output<float>("partial_lse", rows * p.splits);
  }
  const bool wgmma = c.has("wgmma");
  if (p.dtype == Dtype::kBFloat16)
    run_head_dim<Bfloat16>(p, wgmma);
  else
#if defined(EMULATED_BFLOAT16)
    emulation::fail("fp16 is not compiled in");
#else
    run_head_dim<Float16>(p, wgmma);
#endif
  c.save();
}

}  // namespace
}  // namespace dgemma

int main(int count, char** arguments) {
  for (int i = 1; i < count; ++i) dgemma::run_case(arguments[i]);
}
